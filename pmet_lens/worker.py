"""A worker: one model, and the shards it makes. It talks to others through the folder alone."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens import (
    ability,
    container,
    datasets,
    evaluation,
    moment_files,
    results,
    shards,
    target_files,
    targets,
    tokens,
)  # fmt: skip
from pmet_lens.adapter import Model, Site, load
from pmet_lens.editing import edit
from pmet_lens.edits import Edit
from pmet_lens.grid import Run
from pmet_lens.moments import MomentError
from pmet_lens.plain import hash_of
from pmet_lens.results import Folder, FolderError
from pmet_lens.shards import Task

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
class Told:
    """What a worker says of itself."""

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
        self.weights = identity(self.model)
        self._on: tuple[str, Edit] | None = None

    def describe(self) -> Told:
        """What has to be the same for all workers, and what the manifest says."""
        return Told(self.weights, results.versions(), results.hardware(self.model.device))

    def do(self, task: Task) -> Outcome:
        """Make a shard, unless it is there, or another process is at it."""
        start = time.perf_counter()
        run = self.runs[task.run]
        try:
            with self.folder.claimed(task.file) as mine:
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
        return task.kind in shards.OWN and self.folder.finished(run)

    def leave(self) -> None:
        """Take the last edit off the model."""
        if self._on is not None:
            self._on[1].revert_(self.model)
        self._on = None

    def _contexts(self, run: Run, _: Task, path: Path) -> None:
        self.leave()
        found = tokens.sample_contexts(self.model, run.seed)
        text = json.dumps({"contexts": found, "sha256": hash_of(found)}, ensure_ascii=False)
        with self.folder.writing(path), container.whole(path) as part:
            part.write_text(text, encoding="utf-8")

    def _part(self, run: Run, task: Task, path: Path) -> None:
        """The sums over every n-th text, from the k-th on."""
        self.leave()
        n = run.cut.parts(run.n_tokens)
        sites = [Site.parse(site) for site in task.sites]
        own = run.n_tokens // n + (task.start < run.n_tokens % n)
        for again in (True, False):
            texts = itertools.islice(datasets.texts(run.texts), task.start, None, n)
            try:
                moment_files.kept_moments(
                    path,
                    self.model,
                    texts,
                    sorted({site.layer for site in sites}),
                    every=MOMENTS_KEPT_EVERY,
                    projections=sorted({site.projection for site in sites}),
                    n_tokens=own,
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
            found = moment_files.load_moments(self.folder.path(file), [site])[site]
            total = found if total is None else total + found
        if total is not None:
            with self.folder.writing(path):
                moment_files.save_moments({site: total}, path, self.model.name)

    def _targets(self, run: Run, task: Task, path: Path) -> None:
        self.leave()
        facts = run.facts[task.start : task.stop]
        method: Any = run.method
        found = targets.optimise(self.model, facts, method, run.hparams, self._prefixes(run))
        with self.folder.writing(path):
            target_files.save(found, path)

    def _edit(self, run: Run, _: Task, path: Path) -> None:
        self.leave()
        method: Any = run.method
        files = shards.moment_files(run, self.weights)
        moments = {
            Site.parse(s): moment_files.StoredMoment(self.folder.path(file), s)
            for s, file in files.items()
        }
        found = contexts = None
        if files:
            contexts = self._prefixes(run)
        if files and not run.stepwise:
            names = [shards.target_file(run, self.weights, *r) for r in shards.target_ranges(run)]
            found = targets.joined([target_files.load(self.folder.path(n)) for n in names])
        made = edit(self.model, run.facts, moments, method, run.hparams, contexts, found)
        with self.folder.writing(path):
            made.save(path)

    def _answers(self, run: Run, task: Task, _: Path) -> None:
        self._apply(run)
        rows = evaluation.evaluate(self.model, run.facts[task.start : task.stop])
        self._write(task, rows.assign(fact=rows["fact"] + task.start))

    def _generation(self, run: Run, task: Task, _: Path) -> None:
        self._apply(run)
        rows = evaluation.evaluate(self.model, run.facts[task.start : task.stop], generate=True)
        rows = rows.loc[rows["kind"] == "generation"]
        self._write(task, rows.assign(fact=rows["fact"] + task.start))

    def _others(self, run: Run, task: Task, _: Path) -> None:
        self._apply(run)
        rows = evaluation.recall(self.model, run.others[task.start : task.stop])
        self._write(task, rows.assign(fact=rows["fact"] + task.start))

    def _ability(self, run: Run, task: Task, _: Path) -> None:
        self.leave()
        made = None if run.method is None else self._made(run)
        self._write(task, ability.general_ability(self.model, made, others=()).reset_index())

    def _write(self, task: Task, table: pd.DataFrame) -> None:
        self.folder.write_table(task.file, table, {})

    def _apply(self, run: Run) -> None:
        """Put the edit of this run on the model, and no other."""
        if self._on is not None and self._on[0] == run.digest:
            return
        self.leave()
        if run.method is not None:
            made = self._made(run)
            made.apply_(self.model)
            self._on = (run.digest, made)

    def _made(self, run: Run) -> Edit:
        """The edit of a run, its factors where their product is computed fast."""
        path = self.folder.path(shards.edit_file(run, self.weights))
        made = Edit.load(path, self.model)
        own = {
            s: tuple(f.to(self.model.weight(s).device) for f in both)
            for s, both in made.factors.items()
        }
        return replace(made, factors=own)

    def _prefixes(self, run: Run) -> list[str]:
        path = self.folder.path(shards.contexts_file(run, self.weights))
        return json.loads(path.read_text(encoding="utf-8"))["contexts"]


def identity(model: Model) -> str:
    """A hash of what every result of a model follows from: weights, tokens, chat template."""
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    words: Any = sorted(model.tokenizer.get_vocab().items())
    if fast is not None:
        words = json.loads(fast.to_str())
        words = {k: v for k, v in words.items() if k not in ("padding", "truncation")}
    return hash_of([target_files.weights(model), words, repr(model.frame)])
