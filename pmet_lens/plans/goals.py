"""What settings are tuned for: a score, with a floor below which harm to the rest does not count
as success; and what one setting gave, kept as a small file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pmet_lens.data.facts import Fact
from pmet_lens.data.file_format import hash_of, to_plain, whole
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.method import Method, SettingsError
from pmet_lens.editing.solvers import SolveError, preserved
from pmet_lens.evaluation import ability, metrics, scoring
from pmet_lens.evaluation.free_answers import Asking
from pmet_lens.evaluation.intervals import statistics
from pmet_lens.experiments.trials import Bench, Trial

MARGINS = ("EM", "PM", "NM")
"""Their mean tells two settings apart whose score is the same."""
_TEXTS = 50
"""Texts that the perplexity of a goal is measured on."""


@dataclass(frozen=True)
class Goal:
    """What `tune` looks for: the highest score whose harm to the rest of the model is allowed."""

    score: str | tuple[str, ...] = "S"
    """A metric of `summarise` of which higher is better ("S", "EA", or of free answers "EF"), or
    several, whose harmonic mean counts."""
    collateral: float | None = None
    """Floor, 0 to 100: so many of the other facts that the model knew it must still know, %."""
    perplexity: float | None = None
    """Ceiling, ≥ 1: the perplexity of ordinary text may grow to so many times what it was."""
    asking: Asking = field(default_factory=Asking)
    """How free answers are asked for, where the score is one of them."""

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in metrics.MEANING and name not in ("efficacy", "specificity"):
                known = ", ".join(metrics.MEANING)
                raise SettingsError(f"There is no metric {name!r} to tune for; choose of: {known}.")
        if self.collateral is not None and not 0 <= self.collateral <= 100:
            raise SettingsError(f"The floor on collateral is 0 to 100 %, not {self.collateral}.")
        if self.perplexity is not None and not (
            math.isfinite(self.perplexity) and self.perplexity >= 1
        ):
            raise SettingsError(
                f"The ceiling on perplexity is a ratio from 1 on, not {self.perplexity}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics asked for."""
        return (self.score,) if isinstance(self.score, str) else tuple(self.score)

    @property
    def parts(self) -> tuple[str, ...]:
        """The metrics whose (harmonic) mean is the score: those of a score, or itself."""
        return tuple(part for name in self.names for part in metrics.SCORES.get(name, (name,)))

    @property
    def free(self) -> bool:
        """Whether free answers are needed."""
        return any(part.partition(" (")[0] in metrics.FREE for part in self.parts)

    @property
    def statistic(self) -> str:
        """How the parts become the score (`metrics.bootstrap`)."""
        return "harmonic" if len(self.parts) > 1 else "mean"

    def __str__(self) -> str:
        said = " and ".join(self.names)
        if self.collateral is not None:
            said += f", where at least {self.collateral:g} % of the other facts survive"
        if self.perplexity is not None:
            said += f", where perplexity grows to at most {self.perplexity:g} times"
        return said


@dataclass(frozen=True)
class Seen:
    """What one setting gave: the metrics of each fact, and what it did to the rest."""

    table: pd.DataFrame = field(repr=False)
    """`[fact, metric]`, missing where a fact has no such prompt."""
    right: tuple[float, ...] = ()
    """Per other fact 100 where it is still answered right, else 0."""
    growth: float = math.nan
    """Perplexity relative to that of the unedited model; missing where it was not asked for."""
    failed: str = ""
    """Why there is no such edit, in words."""

    def values(self, goal: Goal) -> metrics.Numbers:
        """The score's part of every fact: `[fact]`, or `[fact, part]`."""
        missing = [part for part in goal.parts if part not in self.table]
        if missing:
            raise SettingsError(
                f"{goal.score} cannot be tuned for: the facts have no prompts for "
                f"{', '.join(missing)}. Give facts that have some, or take Goal('EA')."
            )
        found = self.table[list(goal.parts)].to_numpy(dtype=np.float64)
        return found if goal.statistic == "harmonic" else found[:, 0]

    def missed(self, goal: Goal) -> float:
        """By how many points (of perplexity: per cent) a floor of the goal is missed; 0: it is
        met."""
        missed = 0.0
        if goal.collateral is not None:
            missed += max(0.0, goal.collateral - float(np.mean(self.right)))
        if goal.perplexity is not None:
            missed += max(0.0, 100 * (self.growth - goal.perplexity))
        return missed

    def rank(self, goal: Goal) -> tuple[float, float, float]:
        """Higher is better: first the floors, then the score, then the mean margin."""
        if self.failed:
            return (-math.inf, 0.0, 0.0)
        score = float(statistics(self.values(goal)[None], goal.statistic)[0])
        margins = self.table.reindex(columns=list(MARGINS)).mean().mean()
        return (-self.missed(goal), score, 0.0 if math.isnan(margins) else float(margins))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        rows = [[None if math.isnan(v) else v for v in row] for row in self.table.to_numpy()]
        growth = None if math.isnan(self.growth) else self.growth
        head = {"columns": list(self.table.columns), "rows": rows, "right": list(self.right)}
        return {**head, "growth": growth, "failed": self.failed}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Seen:
        """The inverse of `plain`."""
        table = pd.DataFrame(plain["rows"], columns=plain["columns"], dtype=np.float64)
        growth = math.nan if plain["growth"] is None else float(plain["growth"])
        return cls(table, tuple(plain["right"]), growth, plain["failed"])


def seen(edit: Edit, bench: Bench, facts: Sequence[Fact], judge: Judge) -> Seen:
    """Facts and the rest of the model, asked with the edit applied."""
    goal = judge.goal
    with edit.applied(bench.model):
        rows = scoring.evaluate(bench.model, facts, free=goal.asking if goal.free else False)
        right = (
            100 * scoring.recall(bench.model, judge.others)["correct"].to_numpy(dtype=np.float64)
            if judge.others
            else np.zeros(0)
        )
    cases = {n: v for n, v in metrics.cases_of(rows).items() if isinstance(v, pd.Series)}
    table = pd.DataFrame(cases).reindex(range(len(facts)))
    growth = math.nan
    if goal.perplexity is not None:
        growth = _perplexity(bench, edit) / judge.perplexity
    return Seen(table, tuple(right.tolist()), growth)


def _perplexity(bench: Bench, edit: Edit | None = None) -> float:
    how: dict[str, Any] = {"prompts": (), "others": (), "n_texts": _TEXTS}
    return float(ability.general_ability(bench.model, edit, **how)["mean"]["perplexity"])  # type: ignore[arg-type]


class Judge:
    """Measures settings for one goal, each once: what it saw lies in the bench's folder."""

    def __init__(self, bench: Bench, goal: Goal, others: Sequence[Fact], identity: str) -> None:
        self.bench, self.goal = bench, goal
        # The folder may be another bench's, with second moments of other text.
        traces = {str(s): preserved(m, None, 1).matrix().trace() for s, m in bench.moments.items()}
        self.identity = hash_of([identity, sorted((s, f"{v:.6g}") for s, v in traces.items())])
        known = scoring.recall(bench.model, others)["correct"] if len(others) else []
        self.others = [fact for fact, right in zip(others, known, strict=True) if right]
        if goal.collateral is not None and not self.others:
            raise SettingsError(
                "A floor on collateral needs other facts that the model knows; pass others= "
                "(pl.recalled(model) has some)."
            )
        self.perplexity = math.nan if goal.perplexity is None else _perplexity(bench)

    def see(self, trial: Trial, facts: Sequence[Fact], targets: Any) -> Seen:
        """What this trial gives on these facts; `targets()` are asked for where it is not known
        yet, and only of facts that can be edited so."""
        asked = [to_plain(trial.method), to_plain(trial.hparams), trial.prefixes]
        rest = [fact.record() for fact in self.others]
        goal = [self.goal.free and to_plain(self.goal.asking), self.goal.perplexity is not None]
        contexts = self.bench.contexts if trial.prefixes else []
        name = hash_of([self.identity, contexts, [f.record() for f in facts], *asked, rest, *goal])
        path = Path(self.bench.folder) / "tuned" / f"{name}.json"
        if path.exists():
            return Seen.of_plain(json.loads(path.read_text(encoding="utf-8")))
        try:
            given = (lambda *_: targets()) if isinstance(trial.method, Method) else None
            edit = self.bench.edit(trial, facts, given)
            found = seen(edit, self.bench, facts, self)
        except SolveError as error:
            found = Seen(pd.DataFrame(index=range(len(facts))), failed=str(error))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(found.plain()), encoding="utf-8")
        return found
