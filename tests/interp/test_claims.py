"""Statements against tables that are planted, and against the committed ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import pmet_lens as pl

RESULTS = Path(__file__).parents[2] / "figures" / "results"
FILES = {
    "similarity": "component_similarity",
    "variance": "variance",
    "transfer": "transfer",
    "patterns": "patterns",
    "drift": "drift",
}
MORE, LESS = "same relation, other phrasing", "other relation"


def committed(name: str, model: str) -> pd.DataFrame:
    table = pd.read_csv(RESULTS / f"{name}.csv", keep_default_na=False, na_values=[""])
    return table[table["model"] == model]


def patterns(**layers: tuple[float, float]) -> pd.DataFrame:
    """Overlap within a relation and across, per layer, each with an interval of ±0.1."""
    rows = [
        (int(name[1:]), pair, mean, mean - 0.1, mean + 0.1, 5)
        for name, pair_of in layers.items()
        for pair, mean in zip((MORE, LESS), pair_of, strict=True)
    ]
    return pd.DataFrame(rows, columns=["layer", "pair", "mean", "ci_low", "ci_high", "n"])


@pytest.mark.parametrize("model", ["world", "world-sequential", "world-unmasked"])
def test_the_committed_statements_follow_from_the_committed_tables(model):
    tables = {key: committed(name, model) for key, name in FILES.items()}
    tables = {key: table for key, table in tables.items() if len(table)}
    old = committed("claims", model).set_index("statement")
    new = pl.claims(tables).set_index("statement")
    assert len(new) == (6 if "drift" in tables else 5)
    old = old.loc[new.index]
    for column in ("number", "against"):
        assert new[column].to_numpy() == pytest.approx(old[column].to_numpy(), abs=2e-4)
    assert list(new["holds"]) == list(old["holds"])


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [((0.8, 0.5), "holds"), ((0.5, 0.8), "does not hold"), ((0.6, 0.5), "open")],
)
def test_a_verdict_needs_intervals_that_are_apart(pair, verdict):
    (row,) = pl.claims({"patterns": patterns(l0=pair)}).to_dict("records")
    assert row["verdict"] == verdict
    assert row["holds"] == (pair[0] > pair[1])
    assert row["ci_high"] - row["ci_low"] == pytest.approx(0.2)


def test_layers_are_told_apart_where_the_mean_hides_them():
    tables = {"patterns": patterns(l0=(0.2, 0.9), l1=(0.9, 0.2))}
    assert list(pl.claims(tables)["verdict"]) == ["open"]
    by_layer = pl.claims_by_layer(tables)
    assert list(by_layer["layer"]) == [0, 1]
    assert list(by_layer["verdict"]) == ["does not hold", "holds"]
    assert list(by_layer["against_low"]) == pytest.approx([0.8, 0.1])


def test_a_difference_holds_whichever_side_is_larger():
    rows = [
        (layer, "last", "cosine", component, mean, mean - 0.1, mean + 0.1)
        for layer, pair in enumerate([(0.1, 0.9), (0.9, 0.1), (0.5, 0.5)])
        for component, mean in zip(("MHSA", "FFN"), pair, strict=True)
    ]
    names = ["layer", "position", "measure", "component", "mean", "ci_low", "ci_high"]
    tables = {"similarity": pd.DataFrame(rows, columns=names)}
    assert list(pl.claims_by_layer(tables)["verdict"]) == ["holds", "holds", "open"]
    assert pl.claims(tables)["number"].item() == pytest.approx(2 / 3)


def test_the_gain_has_an_interval_over_facts():
    rows = [
        (f, s, g, 4.0) for f in range(9) for s, g in (("attn_out", 1.0 + f % 2), ("mlp_out", 2))
    ]
    gain = pd.DataFrame(rows, columns=["fact", "stream", "gain", "change"])
    (row,) = pl.claims({"gain": gain}).to_dict("records")
    assert row["number"] == pytest.approx((5 * 1 + 4 * 2) / 36)
    assert 0.25 <= row["ci_low"] < row["number"] < row["ci_high"] <= 0.5
    assert row["verdict"] == "holds"
    assert pl.claims_by_layer({"gain": gain}).empty


def test_what_nobody_measured_is_not_decided():
    table = patterns(l0=(0.8, 0.5))
    (row,) = pl.claims({"patterns": table[table["pair"] == LESS]}).to_dict("records")
    assert (row["verdict"], row["holds"]) == ("not measured", False)
