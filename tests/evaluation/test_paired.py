"""Paired differences of two tables, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pmet_lens.evaluation.metrics import paired, summarise

KINDS = {"ES": "rewrite", "PS": "paraphrase", "NS": "neighbour"}
Prompts = Mapping[str, Sequence[float]]


def table(facts: Mapping[int, Prompts], column: str = "success") -> pd.DataFrame:
    """A table of `evaluate` with one row per value: fact -> ES, PS, NS -> a value per prompt."""
    rows = [
        {"fact": fact, "kind": KINDS[metric], column: value}
        for fact, own in facts.items()
        for metric, values in own.items()
        for value in values
    ]
    return pd.DataFrame(rows)


BEFORE = table({
    0: {"ES": [0], "PS": [0, 0], "NS": [1, 1]},
    1: {"ES": [1], "PS": [1, 0], "NS": [1, 0]},
    2: {"ES": [0], "PS": [0, 1], "NS": [1, 1]},
    3: {"ES": [1], "PS": [1, 1], "NS": [1, 1]},
})  # fmt: skip
AFTER = table({
    0: {"ES": [1], "PS": [1, 1], "NS": [1, 0]},
    1: {"ES": [1], "PS": [1, 1], "NS": [1, 0]},
    2: {"ES": [1], "PS": [0, 1], "NS": [0, 0]},
    3: {"ES": [0], "PS": [1, 1], "NS": [1, 1]},
})  # fmt: skip


def test_a_difference_is_that_of_the_means():
    """ES 50 → 75, PS (0, 50, 50, 100) → (100, 100, 50, 100), NS (100, 50, 100, 100) →
    (50, 50, 0, 100), all per fact."""
    change = paired(AFTER, BEFORE)
    assert list(change.columns) == ["mean", "ci_low", "ci_high", "n"]
    assert change.index.name == "metric"
    assert list(change.index) == ["S", "ES", "PS", "NS"]
    assert change.loc["ES", "mean"] == pytest.approx(75 - 50)
    assert change.loc["PS", "mean"] == pytest.approx(87.5 - 50)
    assert change.loc["NS", "mean"] == pytest.approx(50 - 87.5)
    assert list(change["n"]) == [4, 4, 4, 4]


def test_the_difference_of_scores_is_that_of_the_harmonic_means():
    """S is the harmonic mean of 75, 87.5, 50 after and of 50, 50, 87.5 before; not of the
    differences, and not the mean of anything per fact."""
    after, before = 3 / (1 / 75 + 1 / 87.5 + 1 / 50), 3 / (1 / 50 + 1 / 50 + 1 / 87.5)
    assert paired(AFTER, BEFORE).loc["S", "mean"] == pytest.approx(after - before)


def test_a_score_with_a_part_at_zero_is_zero():
    nothing = BEFORE.assign(success=BEFORE["success"].where(BEFORE["kind"] != "rewrite", 0.0))
    before = 3 / (1 / 50 + 1 / 50 + 1 / 87.5)
    assert paired(BEFORE, nothing).loc["S", "mean"] == pytest.approx(before)
    assert paired(nothing, BEFORE).loc["S", "mean"] == pytest.approx(-before)


def test_every_difference_is_that_of_the_summaries():
    one, other = summarise(AFTER), summarise(BEFORE)
    change = paired(AFTER, BEFORE)
    assert change["mean"].to_numpy() == pytest.approx((one["mean"] - other["mean"]).to_numpy())


def test_exchanging_the_tables_turns_the_signs():
    change, back = paired(AFTER, BEFORE), paired(BEFORE, AFTER)
    assert back["mean"].to_numpy() == pytest.approx(-change["mean"].to_numpy())
    assert back["ci_low"].to_numpy() == pytest.approx(-change["ci_high"].to_numpy())
    assert back["ci_high"].to_numpy() == pytest.approx(-change["ci_low"].to_numpy())


def test_a_table_does_not_differ_from_itself():
    change = paired(AFTER, AFTER.copy())
    assert len(change) == 4
    assert (change[["mean", "ci_low", "ci_high"]] == 0).all(axis=None)


# -- intervals ------------------------------------------------------------------------------------


def test_a_difference_that_is_the_same_for_every_fact_is_certain():
    """Both tables vary much, but not what changes: their facts are resampled together."""
    values = np.random.default_rng(1).random(30)
    before = table({i: {"ES": [v]} for i, v in enumerate(values)}, "margin")
    after = before.assign(margin=before["margin"] + 0.25)
    row = paired(after, before).loc["EM"]
    assert (row["mean"], row["ci_low"], row["ci_high"]) == pytest.approx((25, 25, 25))
    alone = summarise(after).loc["EM"]
    assert alone["ci_high"] - alone["ci_low"] > 10


def test_the_interval_agrees_with_normal_theory():
    generator = np.random.default_rng(2)
    old, gain = generator.random(400), generator.normal(0.1, 0.05, 400)
    before = table({i: {"ES": [v]} for i, v in enumerate(old)}, "margin")
    after = table({i: {"ES": [v]} for i, v in enumerate(old + gain)}, "margin")
    row = paired(after, before).loc["EM"]
    half = 100 * 1.96 * gain.std() / np.sqrt(400)
    assert row["ci_low"] == pytest.approx(100 * gain.mean() - half, abs=0.1 * half)
    assert row["ci_high"] == pytest.approx(100 * gain.mean() + half, abs=0.1 * half)


def test_an_interval_is_of_the_facts_not_of_their_prompts():
    """One fact has a hundred prompts, all better; the resamples draw it or not, as the others."""
    before = table({0: {"NS": [0] * 100}, 1: {"NS": [0]}, 2: {"NS": [0]}, 3: {"NS": [0]}})
    after = table({0: {"NS": [1] * 100}, 1: {"NS": [0]}, 2: {"NS": [0]}, 3: {"NS": [0]}})
    row = paired(after, before).loc["NS"]
    assert row["mean"] == pytest.approx(25)
    assert (row["ci_low"], row["ci_high"]) == (0, 75)
    assert row["n"] == 4


def test_the_interval_follows_from_the_tables():
    assert paired(AFTER, BEFORE).equals(paired(AFTER, BEFORE))


def of(rows: pd.DataFrame, keep: Any) -> pd.DataFrame:
    return pd.DataFrame(rows[keep])


# -- which facts ----------------------------------------------------------------------------------


def test_the_order_of_the_facts_does_not_matter():
    want = paired(AFTER, BEFORE)
    mixed = AFTER.sample(frac=1, random_state=3)
    assert list(mixed["fact"]) != list(AFTER["fact"])
    assert paired(mixed, BEFORE).equals(want)
    assert paired(AFTER, BEFORE.iloc[::-1]).equals(want)


def test_a_fact_meets_itself_and_no_other():
    """By its number, not by its place: here one table begins with a fact of its own."""
    before = table({5: {"ES": [0]}, 1: {"ES": [1]}, 3: {"ES": [1]}})
    after = table({3: {"ES": [1]}, 0: {"ES": [0]}, 5: {"ES": [0]}, 1: {"ES": [1]}})
    row = paired(after, before).loc["ES"]
    assert (row["mean"], row["ci_low"], row["ci_high"], row["n"]) == (0, 0, 0, 3)


def test_only_facts_of_both_tables_count():
    some = of(AFTER, AFTER["fact"] != 3)
    extra = table({9: {"ES": [0], "PS": [0], "NS": [0]}})
    want = paired(some, of(BEFORE, BEFORE["fact"] != 3))
    more, other = (pd.DataFrame(pd.concat([rows, extra])) for rows in (some, BEFORE))
    assert paired(some, other).equals(want)
    assert paired(more, BEFORE).equals(want)
    assert list(want["n"]) == [3, 3, 3, 3]
    # Fact 3 is the one that lost its rewrite: 0, 100, 0 → 100 without it.
    assert want.loc["ES", "mean"] == pytest.approx(100 - 100 / 3)


def test_a_fact_without_a_metric_is_left_out_of_that_metric_alone():
    lacking = of(AFTER, (AFTER["fact"] != 2) | (AFTER["kind"] != "neighbour"))
    change = paired(lacking, BEFORE)
    assert change.loc["NS", "n"] == 3
    assert change.loc["NS", "mean"] == pytest.approx((50 + 50 + 100) / 3 - 250 / 3)
    assert change.loc["ES", "n"] == change.loc["PS", "n"] == 4
    assert change.loc["PS", "mean"] == pytest.approx(37.5)


def test_a_metric_of_one_table_alone_is_left_out():
    change = paired(AFTER, of(BEFORE, BEFORE["kind"] != "neighbour"))
    assert list(change.index) == ["ES", "PS"]
    assert list(paired(of(AFTER, AFTER["kind"] == "rewrite"), BEFORE).index) == ["ES"]


def test_tables_without_a_common_fact_are_refused():
    with pytest.raises(ValueError, match="the two tables have no fact in common"):
        paired(of(AFTER, AFTER["fact"] < 2), of(BEFORE, BEFORE["fact"] >= 2))


# -- which metrics --------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_tables_and_collateral_is_not_needed():
    """Accuracies and margins in per cent, generation in its own unit; recall is no part of it."""
    both = [
        pd.DataFrame({
            "fact": [0, 0, 0, 1, 1, 1],
            "kind": ["rewrite", "paraphrase", "generation"] * 2,
            "success": [1.0, 0.0, np.nan, 0.0, 1.0, np.nan],
            "correct": [hit, 0.0, np.nan, 0.0, hit, np.nan],
            "margin": [0.5 * hit, 0.0, np.nan, 0.5, 0.5, np.nan],
            "fluency": [np.nan, np.nan, 400.0 + 10 * hit, np.nan, np.nan, 500.0],
        })
        for hit in (1.0, 0.0)
    ]  # fmt: skip
    change = paired(*both)
    assert change["mean"].to_dict() == pytest.approx(
        {"ES": 0, "PS": 0, "EA": 50, "PA": 50, "EM": 25, "PM": 0, "GE": 5}
    )
    assert list(change.index) == ["ES", "PS", "EA", "PA", "EM", "PM", "GE"]
    assert set(change.index) == set(summarise(both[0]).index)


def test_zsre_has_its_own_score():
    rows = BEFORE.rename(columns={"success": "token_accuracy"}).assign(benchmark="zsre")
    better = AFTER.rename(columns={"success": "token_accuracy"}).assign(benchmark="zsre")
    change = paired(better, rows)
    assert list(change.index) == ["score", "efficacy", "paraphrase", "specificity"]
    assert change["mean"].to_numpy() == pytest.approx(paired(AFTER, BEFORE)["mean"].to_numpy())
