"""Successive halving over facts: what `tune` runs (see there).

What is spent is counted in targets, not in seconds, so that the same call gives the same answer on
every machine, also after a cut.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pmet_lens.data import progress
from pmet_lens.data.facts import Fact
from pmet_lens.editing import objective, targets
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.solvers import Exact
from pmet_lens.editing.targets import Targets
from pmet_lens.evaluation import ability
from pmet_lens.evaluation.knowledge import recalled
from pmet_lens.experiments import target_files
from pmet_lens.experiments.trials import Bench, Trial
from pmet_lens.models.model import Model, Site
from pmet_lens.plans.goals import Goal, Judge, Seen
from pmet_lens.plans.spaces import Space

FEW = 5
"""Facts of the first stage at least."""
OTHERS = 200
"""Facts that a floor on collateral asks, where none are given."""
PUBLISHED = "published"
"""The stage in which the winner of a search with fast steps has its method's own."""


@dataclass(frozen=True)
class Row:
    """One setting of one stage."""

    stage: int | str
    group: int
    hp: Any
    facts: int
    seen: Seen


class Search:
    """The stages of one call of `tune`."""

    def __init__(
        self,
        bench: Bench,
        trial: Trial,
        facts: Sequence[Fact],
        guess: Any,
        goal: Goal,
        others: Sequence[Fact],
        fast: bool | None,
        budget: int,
        on_trial: Callable[[int, int], object] | None,
    ) -> None:
        self.bench, self.trial, self.goal, self.budget = bench, trial, goal, budget
        self.on_trial, self.spent = on_trial, 0
        # Lists are often in the order of relations, of which the first stage would see one.
        order = list(range(len(facts)))
        random.Random(0).shuffle(order)
        self.facts = [facts[i] for i in order]
        ways = trial.method.write if isinstance(trial.method, Method) else ()
        usable = {
            n for n in range(bench.model.n_layers) if all(Site(n, p) in bench.moments for p in ways)
        }
        self.space = Space(trial.method, guess, bench.model.n_layers, frozenset(usable))  # type: ignore[arg-type]
        self.fast = _may_be_fast(bench.model, trial.method) if fast is None else fast
        # A guess that has fast steps itself leaves nothing to confirm.
        self.fast &= isinstance(guess, Hparams) and guess != guess.fast()
        groups = self.space.groups()
        self.stages = stages(len(facts), len(groups), budget, self.space.dear, self.fast)
        self.groups = groups[: self.stages[0][1]]
        identity = target_files.identity(bench.model)
        if not others and goal.collateral is not None:
            others = ability.others_of(recalled(bench.model, n=OTHERS), facts)
        self.judge = Judge(bench, goal, others, identity)
        self._parts: dict[Any, list[Targets]] = {}

    def run(self) -> list[Row]:
        """Every setting of every stage."""
        with progress.line("tuning", "target") as tell:
            tell(0, self.budget)
            with progress.silent():
                return self._run(lambda done: tell(done, self.budget))

    def _run(self, tell: Callable[[int], object]) -> list[Row]:
        rows: list[Row] = []
        best = dict(enumerate(self.groups))
        alive = list(best)
        before = 0
        for number, (n, count) in enumerate(self.stages):
            if number:
                alive = self._survivors(rows, alive, count)
            first, last = number == 0, number == len(self.stages) - 1
            stage: list[Row] = []
            for group in alive:
                tried = self.space.near(best[group], first, last and not first)
                if group == 0 and last and self.space.centre not in tried:
                    tried.append(self.space.centre)  # to say what tuning is worth
                own = [self._row(number, group, hp, n, self.fast) for hp in tried]
                best[group] = max(own, key=self._rank).hp
                stage += own
                self.spent += len(tried) * n if self.space.dear else n - before
                tell(self.spent)
                if self.on_trial is not None:
                    self.on_trial(self.spent, self.budget)
            rows, before = [*rows, *stage], n
        if self.fast:
            final = [row for row in rows if row.stage == len(self.stages) - 1]
            winner = max(final, key=self._rank)
            tried = self.space.near(winner.hp, False, True)
            n = len(self.facts)
            rows += [self._row(PUBLISHED, winner.group, hp, n, False) for hp in tried]
            self.spent += len(tried) * n if self.space.dear else n
        return rows

    def _survivors(self, rows: list[Row], alive: list[int], count: int) -> list[int]:
        """The best groups of the stage before; the guess stays."""
        stage = rows[-1].stage
        of = {
            g: max(self._rank(r) for r in rows if r.stage == stage and r.group == g) for g in alive
        }
        ordered = sorted(alive, key=lambda g: (*(-v for v in of[g]), g))
        kept = ordered[:count]
        return kept if 0 in kept else [*kept[:-1], 0]

    def _rank(self, row: Row) -> tuple[float, float, float]:
        return row.seen.rank(self.goal)

    def _row(self, stage: int | str, group: int, hp: Any, n: int, fast: bool) -> Row:
        share = together(self.trial.method, n, len(self.facts))
        here = self.space.scaled(hp, share)
        here = here.fast() if fast else here
        trial = Trial(self.trial.method, prefixes=self.trial.prefixes, hparams=here)
        # Those of a stage are optimised together, so that a run that goes on finds the same files.
        ends = [n] if stage == PUBLISHED else [size for size, _ in self.stages if size <= n]
        found = self.judge.see(trial, self.facts[:n], lambda: self._targets(trial, ends))
        return Row(stage, group, hp, n, found)

    def _targets(self, trial: Trial, ends: Sequence[int]) -> Targets | None:
        """Of the facts up to the last of `ends`, from one to the next; those of earlier stages are
        there already."""
        way, n = trial.method, ends[-1]
        if not isinstance(way, Method) or (way.at_once or n) < n:
            return None
        parts = self._parts.setdefault(target_files.strengths(trial.hparams), [])
        done = sum(map(len, parts))
        for end in [end for end in ends if end > done]:
            found = self.bench.targets(trial, self.facts[done:end])
            assert found is not None
            parts.append(found)
            done = end
        return targets.joined(parts)[:n]


def stages(n: int, groups: int, budget: int, dear: bool, confirmed: bool) -> list[tuple[int, int]]:
    """(facts, groups of settings) of every stage: of as many groups as the budget allows on few
    facts, then half as many on twice the facts, to the best ones and the guess on all `n`.

    `dear`: every stage optimises its facts anew. `confirmed`: the winner is optimised again.

    Raises:
        SettingsError: for a budget that does not even try two groups.
    """
    sizes = [n]
    while math.ceil(sizes[0] / 2) >= FEW:
        sizes.insert(0, math.ceil(sizes[0] / 2))

    def plan(count: int) -> list[tuple[int, int]]:
        return [(size, max(2, math.ceil(count / 2**i))) for i, size in enumerate(sizes)]

    def cost(count: int) -> int:
        new = sizes if dear else [b - a for a, b in zip([0, *sizes], sizes, strict=False)]
        own = sum(g * m for (_, g), m in zip(plan(count), new, strict=True))
        return own + (n if confirmed else 0)

    affordable = [count for count in range(2, max(2, groups) + 1) if cost(count) <= budget]
    if not affordable or groups < 2:
        raise SettingsError(
            f"A budget of {budget} targets does not try two settings on {n} facts: give at least "
            f"{cost(2)}, or fewer facts."
        )
    return plan(affordable[-1])


def _may_be_fast(model: Model, method: Any) -> bool:
    """Whether fewer steps are worth it, and were tried for such a method (`Hparams.fast`)."""
    steps = isinstance(method, Method) and not isinstance(method.solver, Exact)
    return steps and objective.large(model)


def together(method: Any, n: int, other: int) -> float:
    """How many facts are solved for at once where `n` are edited, relative to where `other` are."""
    most = getattr(method, "at_once", None)
    return min(most or n, n) / min(most or other, other)
