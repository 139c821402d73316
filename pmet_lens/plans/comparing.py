"""Methods side by side on the same facts: `compare`, with settings given or tuned in one way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from pmet_lens.data.facts import Fact, listed
from pmet_lens.editing.method import SettingsError
from pmet_lens.evaluation import metrics
from pmet_lens.experiments.trials import Bench, Trial, measured
from pmet_lens.plans.goals import Goal
from pmet_lens.plans.spaces import tunable
from pmet_lens.plans.tuned import Tuned
from pmet_lens.plans.tuning import PER_FACT, refuse_overlap, tune

FRONT = ("ES", "NS", "collateral")
"""Efficacy against locality against collateral."""


def compare(
    bench: Bench,
    trials: Mapping[str, Trial],
    facts: Sequence[Fact],
    others: Sequence[Fact] = (),
    baseline: str | Sequence[str] = "PMET",
    on_trial: Callable[[int, int], object] | None = None,
    *,
    tune_on: Sequence[Fact] | None = None,
    budget: int | None = None,
    goal: Goal | str = "S",
    front: bool = False,
    on_tuned: Callable[[str, Tuned], object] | None = None,
) -> pd.DataFrame:
    """Every trial on the same facts, all at once, and what it changes against `baseline`, paired.

    Columns: run, metric (those of `evaluate`'s summary, and "collateral": facts `others` still
    answered right), mean, ci_low, ci_high (95 % bootstrap over facts), n, difference,
    difference_low, difference_high (trial − baseline, per fact; missing for the baseline itself).
    Of several baselines each has its rows, and the column against names it.

    With `tune_on` the comparison is fair by construction: every method is tuned (`tune`) for the
    same `goal` on these facts, none of which may be among `facts`, with the same `budget` of
    targets (None: 4 per fact); a trial's own settings are its first guess. Then also the columns
    budget, spent (targets; 0 for a method that has nothing to tune) and settings; `attrs` of the
    table has tuned_on (how many facts), budget and goal. `on_tuned(run, Tuned)` hears of each. The
    bench's folder keeps what was found. A floor on collateral is tuned for with every second one of
    `others`; collateral is then of the rest.

    `front`: also the column front: whether the run is on the Pareto front (`pareto`) of ES, NS and
    collateral, as far as they were measured.

    Raises KeyError if `baseline` is no trial; FactError for facts that are tuned on and edited;
    SettingsError for `budget` without `tune_on`.
    """
    baselines = [baseline] if isinstance(baseline, str) else list(baseline)
    for name in baselines:
        if name not in trials:
            raise KeyError(name)
    tuned: dict[str, Tuned] = {}
    if tune_on is not None:
        refuse_overlap(listed(tune_on), listed(facts))
        budget = PER_FACT * len(listed(tune_on)) if budget is None else budget
        goal = Goal(goal) if isinstance(goal, str) else goal
        asked: Sequence[Fact] = ()
        if goal.collateral is not None:
            asked, others = others[::2], others[1::2]
        for name, trial in trials.items():
            if tunable(trial.method):
                how: dict[str, Any] = {"goal": goal, "others": asked, "n_edits": len(facts)}
                tuned[name] = tune(bench, tune_on, trial, budget, **how)
                if on_tuned is not None:
                    on_tuned(name, tuned[name])
        trials = {
            name: replace(trial, hparams=tuned[name].hparams, change={}) if name in tuned else trial
            for name, trial in trials.items()
        }
    elif budget is not None:
        raise SettingsError("A budget is for tuning: pass tune_on= facts that are not edited.")
    seen = {}
    for i, (name, trial) in enumerate(trials.items()):
        seen[name] = measured(bench, trial, facts, others)
        if on_trial is not None:
            on_trial(i + 1, len(trials))
    tables = [_against(name, seen) for name in baselines]
    if len(tables) > 1:
        named = zip(baselines, tables, strict=True)
        tables = [table.assign(against=name) for name, table in named]
    table = pd.concat(tables, ignore_index=True)
    if front:
        found = pareto(tables[0])
        table["front"] = table["run"].isin(found.index[found["front"]])
    if tune_on is not None:
        spent = {name: one.spent for name, one in tuned.items()}
        chosen = {name: repr(one.hparams) for name, one in tuned.items()}
        table["budget"] = budget
        table["spent"] = [spent.get(name, 0) for name in table["run"]]
        table["settings"] = [chosen.get(name, "as it was trained") for name in table["run"]]
        table.attrs = {"tuned_on": len(tune_on), "budget": budget, "goal": str(goal)}
    return table


def _against(baseline: str, seen: Mapping[str, tuple[pd.DataFrame, Any]]) -> pd.DataFrame:
    """The table against one of the trials, of what was measured of each: rows of `evaluate`, and
    whether the other facts are still answered right."""
    first, tables = seen[baseline], []
    for name, (rows, right) in seen.items():
        table = metrics.summarise(rows)
        if len(right):
            table.loc["collateral"] = list(metrics.interval(right))
        if name != baseline:
            change = metrics.paired(rows, first[0])
            if len(right):
                gap = right - first[1]
                change.loc["collateral"] = list(metrics.interval(gap))
            change = change.drop(columns="n")
            change.columns = ["difference", "difference_low", "difference_high"]
            table = table.join(change)
        tables.append(table.reset_index().assign(run=name))
    columns = ["run", "metric", "mean", "ci_low", "ci_high", "n"]
    columns += ["difference", "difference_low", "difference_high"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns).astype({"n": int})


def pareto(table: pd.DataFrame, metrics: Sequence[str] = FRONT) -> pd.DataFrame:
    """Which runs of a table of `compare` no other beats: one row per run (index), a column per
    metric (those of `metrics` that every run has; of all higher is better) and front: False where
    another run is nowhere worse and somewhere better. Means are compared, not intervals: what
    `compare` says of the difference decides whether a step to the next run is one.

    Raises SettingsError where the table has none of the metrics.
    """
    wide = table.pivot(index="run", columns="metric", values="mean").loc[
        list(dict.fromkeys(table["run"]))
    ]
    shown = [m for m in metrics if m in wide and wide[m].notna().all()]
    if not shown:
        raise SettingsError(f"No run of the table has all of {', '.join(metrics)}.")
    values = wide[shown].to_numpy(dtype=float)
    beaten = [
        any(bool((other >= own).all() and (other > own).any()) for other in values)
        for own in values
    ]
    return wide[shown].assign(front=[not one for one in beaten]).rename_axis(columns=None)
