"""How fast a machine makes the shards of a grid: a little of each kind is made, and timed."""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pmet_lens.data import datasets
from pmet_lens.data.facts import Fact
from pmet_lens.data.file_format import hash_of, to_plain
from pmet_lens.editing import targets as targeting
from pmet_lens.editing.locate_and_edit import edit
from pmet_lens.editing.method import Method
from pmet_lens.evaluation import ability, scoring
from pmet_lens.experiments import target_files
from pmet_lens.experiments.grid import Run
from pmet_lens.experiments.tasks import Task, sites_of
from pmet_lens.experiments.worker import Worker
from pmet_lens.models import tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.moments import moment_files
from pmet_lens.moments.second_moments import Moment, second_moments
from pmet_lens.plans import costs

FACTS, OTHERS, TOKENS, TEXTS = 12, 100, 4096, 20
"""How much of everything is made."""


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


class Probe:
    """Times on one model; what was timed once is known."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[Any, Any] = {}

    def seconds(self, task: Task, run: Run) -> float:
        """How long this shard will take."""
        return getattr(self, f"_{task.kind}")(run, task)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of the facts: `run` will say so
                self._known[key] = make()
        return self._known[key]

    def _timed(self, key: Any, work: Callable[[], object]) -> float:
        def timed() -> float:
            clock = Clock()
            work()
            self._wait()
            return clock.seconds()

        return self._once(key, timed)

    def _wait(self) -> None:
        backend: Any = getattr(torch, self.model.device.type, None)
        if hasattr(backend, "synchronize"):
            backend.synchronize()

    def _contexts(self, run: Run, task: Task) -> float:
        return self._timed("contexts", lambda: tokens.sample_contexts(self.model, run.seed))

    def _part(self, run: Run, task: Task) -> float:
        wanted = run.n_tokens // run.cut.parts(run.n_tokens)
        n, sites = min(wanted, TOKENS), [Site.parse(s) for s in task.sites]
        layers = sorted({site.layer for site in sites})
        texts = list(itertools.islice(datasets.texts(run.texts), TOKENS))

        def read() -> None:
            projections: Any = sorted({site.projection for site in sites})
            second_moments(self.model, texts, layers, projections=projections, n_tokens=n)

        self._once("warm", read)
        return self._timed(("part", task.sites, n), read) * wanted / n

    def _moments(self, run: Run, task: Task) -> float:
        site = Site.parse(task.sites[0])
        d = self.model.d_in(site)
        moments = {site: Moment(torch.eye(d, dtype=torch.float64), 1)}

        def there_and_back() -> None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "m.safetensors"
                moment_files.save_moments(moments, path)
                moment_files.load_moments(path)

        return self._timed(("moments", d), there_and_back) * (len(task.needs) + 1) / 2

    def _targets(self, run: Run, task: Task) -> float:
        some = self._some(run)
        self._optimised(run)
        return self._known[("seconds", *self._key(run))] * (task.stop - task.start) / len(some)

    def _optimised(self, run: Run) -> targeting.Targets:
        """The targets of some facts of a run; how long they took is kept beside."""
        key, method = self._key(run), run.method
        assert isinstance(method, Method)

        def make() -> targeting.Targets:
            some, prefixes = self._some(run), self._prefixes()
            targeting.optimise(self.model, some[:1], method, run.hparams, prefixes)  # warm
            clock = Clock()
            optimised = targeting.optimise(self.model, some, method, run.hparams, prefixes)
            self._wait()
            self._known[("seconds", *key)] = clock.seconds()
            return optimised

        return self._once(key, make)

    def _key(self, run: Run) -> tuple[str, ...]:
        """What the time of a fact's targets follows from."""
        method: Any = run.method
        read = asdict(target_files.strengths(run.hparams))
        return ("targets", hash_of([method.delta_at, method.position, read]))

    def _steps(self, run: Run, task: Task) -> float:
        first, again = self._solved(run, self._some(run)[:1])
        per_fact = self._known[("seconds", *self._key(run))] / len(self._some(run))
        steps = (task.stop - task.start) * (again + per_fact)
        return steps + (max(first - again, 0.0) if task.start == task.first else 0.0)

    def _edit(self, run: Run, task: Task) -> float:
        some, n, method = self._some(run), task.stop - task.start, run.method
        if not isinstance(method, Method):
            took = self._timed(
                ("edit", hash_of([to_plain(method), to_plain(run.hparams)])),
                lambda: edit(self.model, some, None, method or "", run.hparams),
            )
            return took * n / len(some)
        if run.stepwise:
            return 0.0  # a sum of what there is
        first, again = self._solved(run, some)
        few, all_ = (
            costs.estimate(self.model, some, method, run.hparams, self._prefixes(), n_facts=k)
            for k in (len(some), n)
        )
        ratio = (all_.keys + all_.solve) / (few.keys + few.solve)
        return max(first - again, 0.0) + again * ratio

    def _solved(self, run: Run, some: Sequence[Fact]) -> tuple[float, float]:
        """Seconds of the edit of these facts, which have targets: the first time, and again, when
        its moments are factorised."""
        method: Any = run.method
        known, prefixes = self._optimised(run)[: len(some)], self._prefixes()
        moments = {Site.parse(s): self._regular(Site.parse(s)) for s in sites_of(run)}
        kept: dict[Site, Any] = {}

        def work() -> None:
            edit(self.model, some, moments, method, run.hparams, prefixes, known, factorised=kept)

        key = ("edit", hash_of([to_plain(method), to_plain(run.hparams)]), len(some))
        return self._timed((*key, 1), work), self._timed((*key, 2), work)

    def _regular(self, site: Site) -> torch.Tensor:
        """A second moment no factorisation minds: regular, some directions hardly used."""
        how: Any = {"dtype": torch.float64, "device": self.model.device}
        return torch.diag(torch.linspace(1e-3, 1, self.model.d_in(site), **how))

    def _answers(self, run: Run, task: Task) -> float:
        some = self._some(run)
        self._once("asked", lambda: scoring.evaluate(self.model, some[:2]))  # warm
        key = ("answers", hash_of([fact.record() for fact in some]))
        took = self._timed(key, lambda: scoring.evaluate(self.model, some))
        return took * (task.stop - task.start) / len(some)

    def _generation(self, run: Run, task: Task) -> float:
        some = self._some(run)[:2]
        key = ("generation", hash_of([fact.record() for fact in some]))
        took = self._timed(key, lambda: scoring.evaluate(self.model, some, generate=True))
        return took * (task.stop - task.start) / len(some)

    def _others(self, run: Run, task: Task) -> float:
        some = run.others[:OTHERS]
        key = ("others", hash_of([fact.record() for fact in some]))
        took = self._timed(key, lambda: scoring.recall(self.model, some))
        return took * (task.stop - task.start) / len(some)

    def _ability(self, run: Run, task: Task) -> float:
        """Twice the prompts where there is an edit."""
        texts = list(itertools.islice(datasets.texts(), TEXTS))
        prompts = [f.text for f in run.facts[:TEXTS]]

        def work() -> None:
            ability.general_ability(self.model, texts=texts, prompts=prompts, others=())

        took = self._timed("ability", work) * run.n_texts / max(len(texts), 1)
        return took * (1 if run.method is None else 1.3)

    def _prefixes(self) -> list[str]:
        return self._once("prefixes", lambda: tokens.sample_contexts(self.model))

    def _some(self, run: Run) -> Sequence[Fact]:
        """Facts from everywhere in the list."""
        return run.facts[:: max(1, len(run.facts) // FACTS)][:FACTS]


def seconds_of(worker: Worker, tasks: Sequence[Task]) -> list[float]:
    """What each of these shards would take a worker of Ray, by making a little of every kind."""
    probe = Probe(worker.model)
    return [probe.seconds(task, worker.runs[task.run]) for task in tasks]
