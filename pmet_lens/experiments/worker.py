"""A worker: one model, and the shards it makes. It talks to others through the folder alone."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data import datasets, file_format, progress
from pmet_lens.data.facts import Fact
from pmet_lens.data.file_format import hash_of
from pmet_lens.editing import targets
from pmet_lens.editing.edits import Edit, merged
from pmet_lens.editing.locate_and_edit import edit
from pmet_lens.editing.method import Method
from pmet_lens.evaluation import ability, scoring
from pmet_lens.experiments import store, target_files, tasks
from pmet_lens.experiments.grid import Run
from pmet_lens.experiments.store import Folder, FolderError
from pmet_lens.experiments.tasks import Task
from pmet_lens.models import generation
from pmet_lens.models.loading import aligned, load
from pmet_lens.models.model import Model, Site
from pmet_lens.moments import moment_files
from pmet_lens.moments.second_moments import MomentError, check_fit

MOMENTS_KEPT_EVERY = 60.0
"""Seconds after which the sums of a part of the text are kept, so that it can be gone on with."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    state: str
    """"done"; "busy": another process works on it; "failed"; "stop": no file can be written."""
    seconds: float = 0.0
    """Zero where the shard was there already."""
    error: str = ""


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker reports of itself."""

    weights: str
    """A hash of all weights, of the tokens, and of what stands around a prompt."""
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


class Worker:
    """The model of `runs` (they have the same), and the folder it writes to."""

    def __init__(
        self,
        folder: str,
        runs: Mapping[str, Run],
        device: str | None = None,
        device_map: Any = None,
        model: Model | None = None,
    ) -> None:
        """`runs`: digest → run. `model`: one that is loaded already."""
        self.folder, self.runs = Folder(Path(folder)), runs
        first = next(iter(runs.values()))
        self.model = model or load(
            first.model,
            device=device,
            dtype=first.dtype,
            device_map=device_map,
            template=first.template,
        )
        aligned(self.model.hf)  # the same bits in every worker
        self.weights = target_files.identity(self.model)
        self._on: tuple[tuple[str, ...], Edit] | None = None
        """The files of the edits that are on the model, and their sum."""

    def describe(self) -> WorkerInfo:
        """What has to be the same for all workers, and what the manifest says."""
        return WorkerInfo(self.weights, store.versions(), store.hardware(self.model.device))

    def do(self, task: Task) -> Outcome:
        """Make a shard, unless it is there, or another process is at it."""
        start = time.perf_counter()
        run = self.runs[task.run]
        try:
            with self.folder.claimed(task.file) as mine, progress.silent():
                if not mine:
                    return Outcome("busy")
                if self.folder.present(task.file):
                    return Outcome("done")
                if self._is_over(task, run):
                    return Outcome("done")
                getattr(self, f"_{task.kind}")(run, task, self.folder.path(task.file))
        except FolderError as error:
            return Outcome("stop", error=str(error))
        except (OSError, ValueError) as error:  # every error of this package is one
            return Outcome("failed", error=str(error))
        return Outcome("done", time.perf_counter() - start)

    def _is_over(self, task: Task, run: Run) -> bool:
        """Whether another driver made what this shard is for, and has tidied up."""
        if task.kind == "part":
            folder = Path(task.file).parent
            files = [str(folder / f"{site}.safetensors") for site in task.sites]
            return all(map(self.folder.present, files))
        return task.kind in tasks.OWN and self.folder.finished(run)

    def leave(self) -> None:
        """Take the last edit off the model."""
        if self._on is not None:
            self._on[1].revert_(self.model)
        self._on = None

    def _contexts(self, run: Run, _: Task, path: Path) -> None:
        self.leave()
        contexts = generation.sample_contexts(self.model, run.seed)
        text = json.dumps({"contexts": contexts, "sha256": hash_of(contexts)}, ensure_ascii=False)
        with self.folder.writing(path), file_format.whole(path) as part:
            part.write_text(text, encoding="utf-8")

    def _part(self, run: Run, task: Task, path: Path) -> None:
        """The sums over every n-th text, from the k-th on."""
        self.leave()
        n = run.cut.parts(run.n_tokens)
        sites = [Site.parse(site) for site in task.sites]
        n_tokens = run.n_tokens // n + (task.start < run.n_tokens % n)
        for again in (True, False):
            whole = datasets.texts(run.texts)
            check_fit(self.model, whole)
            texts = itertools.islice(whole, task.start, None, n)
            try:
                moment_files.kept_moments(
                    path,
                    self.model,
                    texts,
                    sorted({site.layer for site in sites}),
                    every=MOMENTS_KEPT_EVERY,
                    projections=sorted({site.projection for site in sites}),
                    n_tokens=n_tokens,
                )
                break
            except MomentError:
                begun = path.with_name(f"{path.name}.begun")
                if not (again and begun.exists()):
                    raise
                begun.unlink()  # what was begun may be damaged: begin again, once
        if not path.exists():
            raise FolderError(
                f"{path} could not be written (see the warning above). Free some space or raise "
                "the quota and start again: what was finished is kept."
            )

    def _moments(self, _: Run, task: Task, path: Path) -> None:
        """One site: the sum over the parts, in their order."""
        (site,) = map(Site.parse, task.sites)
        total = None
        for file in task.needs:
            part = moment_files.load_moments(self.folder.path(file), [site])[site]
            total = part if total is None else total + part
        if total is not None:
            with self.folder.writing(path):
                moment_files.save_moments({site: total}, path, self.model.name)

    def _targets(self, run: Run, task: Task, path: Path) -> None:
        self.leave()
        facts = run.facts[task.start : task.stop]
        method: Any = run.method
        optimised = targets.optimise(self.model, facts, method, run.hparams, self._prefixes(run))
        with self.folder.writing(path):
            target_files.save(optimised, path)

    def _steps(self, run: Run, task: Task, path: Path) -> None:
        """A part of an edit in steps, on the model as edited so far."""
        self._put(self._before(run, task.first, task.start))
        self._save(self._edited(run, task, None), path)

    def _edit(self, run: Run, task: Task, path: Path) -> None:
        if run.stepwise:
            self._save(self._made(self._before(run, task.first, task.stop)), path)
            return
        self.leave()
        known = None
        if isinstance(run.method, Method):
            known = targets.joined([*self._read_targets(run, task.start, task.stop)])
        self._save(self._edited(run, task, known), path)

    def _edited(self, run: Run, task: Task, known: targets.Targets | None) -> Edit:
        """The edit of the facts of this task on the model as it is."""
        method, contexts = run.method, None
        files = tasks.moment_files(run, self.weights)
        moments = {
            Site.parse(s): moment_files.StoredMoment(self.folder.path(file), s)
            for s, file in files.items()
        }
        assert method is not None
        if files:
            contexts = self._prefixes(run)
        facts = run.facts[task.start : task.stop]
        return edit(self.model, facts, moments, method, run.hparams, contexts, known, check=False)

    def _save(self, made: Edit, path: Path) -> None:
        with self.folder.writing(path):
            made.save(path)

    def _before(self, run: Run, first: int, stop: int) -> tuple[str, ...]:
        """The files of the steps up to fact `stop`."""
        ranges = tasks.step_ranges(run, first, stop)
        return tuple(tasks.step_file(run, self.weights, first, end) for _, end in ranges)

    def _read_targets(self, run: Run, first: int, end: int) -> Iterator[targets.Targets]:
        """The targets of these facts, shard by shard."""
        for start, stop in tasks.target_ranges(run):
            if start < end and stop > first:
                file = tasks.target_file(run, self.weights, start, stop)
                shard = target_files.load(self.folder.path(file))
                yield shard[max(first - start, 0) : min(end, stop) - start]

    def _answers(self, run: Run, task: Task, _: Path) -> None:
        self._ask(task, run.facts, scoring.evaluate)

    def _generation(self, run: Run, task: Task, _: Path) -> None:
        def generated(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
            rows = scoring.evaluate(model, facts, generate=True)
            return rows.loc[rows["kind"] == "generation"]

        self._ask(task, run.facts, generated)

    def _others(self, run: Run, task: Task, _: Path) -> None:
        self._ask(task, run.others, scoring.recall)

    def _ask(
        self,
        task: Task,
        facts: Sequence[Fact],
        score: Callable[[Model, Sequence[Fact]], pd.DataFrame],
    ) -> None:
        """Score the facts of a task with its edit on the model."""
        self._put(task.needs)
        rows = score(self.model, facts[task.start : task.stop])
        self._write(task, rows.assign(fact=rows["fact"] + task.start))

    def _ability(self, run: Run, task: Task, _: Path) -> None:
        self.leave()
        made = self._made(task.needs) if task.needs else None
        table = ability.general_ability(self.model, made, others=(), n_texts=run.n_texts)
        self._write(task, table.reset_index())

    def _write(self, task: Task, table: pd.DataFrame) -> None:
        self.folder.write_table(task.file, table, {})

    def _put(self, files: tuple[str, ...]) -> None:
        """Put the sum of these edits on the model, and nothing else."""
        if files == (self._on[0] if self._on else ()):
            return
        made = self._made(files) if files else None
        self.leave()
        if made is not None:
            made.apply_(self.model)
            self._on = (files, made)

    def _made(self, files: tuple[str, ...]) -> Edit:
        """The sum of these edits. What is on the model is not read again."""
        known, parts = (), []
        if self._on is not None and files[: len(self._on[0])] == self._on[0]:
            known, parts = self._on[0], [self._on[1]]
        return merged([*parts, *map(self._read, files[len(known) :])])

    def _read(self, file: str) -> Edit:
        """An edit, its factors where their product is computed fast."""
        made = Edit.load(self.folder.path(file))
        factors = {
            s: tuple(f.to(self.model.weight(s).device) for f in both)
            for s, both in made.factors.items()
        }
        return replace(made, factors=factors)

    def _prefixes(self, run: Run) -> list[str]:
        path = self.folder.path(tasks.contexts_file(run, self.weights))
        return json.loads(path.read_text(encoding="utf-8"))["contexts"]
