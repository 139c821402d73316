"""The work of a grid in numbers: operations and bytes, shard by shard, counted and not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pmet_lens.editing.method import Method
from pmet_lens.experiments import tasks
from pmet_lens.experiments.grid import Run
from pmet_lens.models import tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.plans import costs
from pmet_lens.plans.costs import Estimate, Sizes

SAMPLE = 64
"""Facts of a run whose tokens are counted; the others have the same mean."""
ROW = 150
"""Bytes of one row of answers, about."""
CONTEXTS = [
    tokens.PLAIN,
    *(f"It was the {n} of these. {{}}" for n in ("1st", "2nd", "3rd", "4th", "5th")),
]
"""Prefixes of about the length that is sampled, for counting."""


@dataclass
class Shard:
    task: tasks.Task
    run: Run
    units: float | int
    operations: float | int
    exact: float | int
    """Operations in float64: second moments, factors, solves."""
    kept: int
    passing: int
    """Bytes that are removed later."""
    seconds: float = 0.0


_Number = int | float
_Work = tuple[_Number, _Number, _Number, int, int]
"""Units, operations, those in float64, bytes that stay, bytes that pass."""


class Count:
    """Operations and bytes of shards of one model."""

    def __init__(self, model: Model, sizes: Sizes) -> None:
        self.model, self.sizes, self.memory = model, sizes, sizes.weights
        self._estimates: dict[str, Estimate] = {}
        self._forward: dict[tuple[str, str], float] = {}
        self._pass = 2.0 * (sum(sizes.blocks) + sizes.embedding)  # per token

    def shard(self, task: tasks.Task, group: Sequence[Run]) -> Shard:
        """One shard."""
        run = next(r for r in group if r.digest == task.run)
        return Shard(task, run, *getattr(self, f"_{task.kind}")(run, task))

    def estimate(self, run: Run) -> Estimate:
        """Of the edit of a run."""
        if run.digest not in self._estimates:
            estimate = costs.estimate(
                self.model, run.facts[:SAMPLE], run.method or "", run.hparams, CONTEXTS,
                n_facts=run.edits, sizes=self.sizes,
            )  # fmt: skip
            self._estimates[run.digest] = estimate
            sites = len(tasks.sites_of(run))
            moments = 8 * sites * self._largest(run) ** 2
            most = max(estimate.activations, estimate.moment, moments)
            self.memory = max(self.memory, self.sizes.weights + most + estimate.host)
        return self._estimates[run.digest]

    def _largest(self, run: Run) -> int:
        return max(self.sizes.d_in[Site.parse(s).projection] for s in tasks.sites_of(run))

    def _contexts(self, run: Run, task: tasks.Task) -> _Work:
        return 1, 40 * self._pass, 0, 400, 0

    def _part(self, run: Run, task: tasks.Task) -> _Work:
        sites = [Site.parse(s) for s in task.sites]
        n = float(run.n_tokens // run.cut.parts(run.n_tokens))
        products = sum(self.sizes.d_in[s.projection] ** 2 for s in sites)
        below = 2 * sum(self.sizes.blocks[: 1 + max(s.layer for s in sites)])
        return n, n * (below + products), n * products, 0, 8 * products

    def _moments(self, run: Run, task: tasks.Task) -> _Work:
        d = self.sizes.d_in[Site.parse(task.sites[0]).projection]
        sums = float(len(task.needs)) * d**2
        return 1, sums, sums, 2 * 8 * d**2, 0  # and its factor

    def _targets(self, run: Run, task: tasks.Task) -> _Work:
        estimate, n = self.estimate(run), task.stop - task.start
        method: Any = run.method
        values = 2 * len(method.delta_at) * self.sizes.d_model * self.model.dtype.itemsize
        history = 8 * 11 * run.hparams.n_steps
        return n, estimate.targets * n / estimate.facts, 0, n * (values + history), 0

    def _steps(self, run: Run, task: tasks.Task) -> _Work:
        n, estimate = task.stop - task.start, self.estimate(run)
        solved, exact, size = self._solved(run, n, factorised=task.start == task.first)
        return n, solved + estimate.targets * n / estimate.facts, exact, size, 0

    def _edit(self, run: Run, task: tasks.Task) -> _Work:
        n = task.stop - task.start
        if not isinstance(run.method, Method):
            return n, float("nan"), 0, 0, 8 * self.sizes.d_model * 2 * max(self.sizes.d_in.values())
        solved, exact, size = self._solved(run, n, factorised=True)
        return (n, 0, 0, 0, size) if run.stepwise else (n, solved, exact, 0, size)

    def _solved(self, run: Run, n: int, factorised: bool) -> tuple[float, float, int]:
        """Operations of the keys and solves of `n` facts, those in float64, bytes of the edit."""
        estimate = self.estimate(run)
        size = [self.sizes.d_in[Site.parse(s).projection] for s in tasks.sites_of(run)]
        exact = estimate.solve * n / estimate.facts + (
            sum(d**3 / 3 for d in size) if factorised else 0
        )
        rank = min(n, self.sizes.d_model)  # `edit_files.thin`
        kept = 8 * rank * sum(d + self.sizes.d_model for d in size)
        return estimate.keys * n / estimate.facts + exact, exact, kept

    def _answers(self, run: Run, task: tasks.Task) -> _Work:
        n = task.stop - task.start
        prompts = sum(1 + len(f.paraphrases) + len(f.neighbours) for f in run.facts) / len(
            run.facts
        )
        size = round(ROW * n * prompts)
        return n, n * self._asked(run, "answers"), 0, size, size

    def _generation(self, run: Run, task: tasks.Task) -> _Work:
        n, prompts = task.stop - task.start, len(run.facts[0].generation)
        asked = 100 * prompts * self._pass + self._asked(run, "answers")
        return n, n * asked, 0, 600 * n, 600 * n

    def _others(self, run: Run, task: tasks.Task) -> _Work:
        n = task.stop - task.start
        return n, n * self._asked(run, "others"), 0, ROW * n, ROW * n

    def _ability(self, run: Run, task: tasks.Task) -> _Work:
        return 1, (run.n_texts * 128 + 200 * 2 * 12) * self._pass, 0, 0, 2000

    def _asked(self, run: Run, what: str) -> float:
        """Operations of asking for one fact: the tokens of its distinct prompts."""
        facts = (run.facts if what == "answers" else run.others)[:SAMPLE]
        key = (what, run.digest)
        if key not in self._forward:
            texts = [{f.text} for f in facts]
            if what == "answers":
                for prompts, f in zip(texts, facts, strict=True):
                    prompts.update(f.paraphrases, (p for p, _ in f.neighbours))
            every = list(chain.from_iterable(texts))
            read = sum(map(len, self.model.tokenizer(every)["input_ids"])) + len(every)
            self._forward[key] = read * self._pass / len(facts)
        return self._forward[key]
