"""The paper's statements about MHSA and FFN, each with the number that speaks for or against it.

A statement here is a comparison of two measured numbers, so that it can fail. What it is tested on
matters more than the test: see the notebook `01_mhsa_knowledge_patterns`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pmet_lens.evaluation import metrics
from pmet_lens.evaluation.metrics import where

Tables = Mapping[str, pd.DataFrame]
Layers = set[int] | None
ENDS = ["ci_low", "ci_high"]


@dataclass(frozen=True)
class _Claim:
    """A statement, what is measured, the number, and the number against it: per layer (index), or
    at 0 where there are no layers; columns number, ci_low, ci_high."""

    statement: str
    measured: str
    number: pd.DataFrame
    against: pd.DataFrame
    layers: tuple[pd.DataFrame, pd.DataFrame] | None = None
    """Both numbers layer by layer, where they are others than those that are averaged."""
    differ: bool = False
    """Whether the statement is of a difference in either direction, layer by layer."""


def claims(tables: Tables) -> pd.DataFrame:
    """What the study says about the paper's statements, one row per statement.

    `tables`: any of "similarity" (`component_similarity`), "variance" (`variance_split`),
    "transfer" (`patch`), "patterns" (`pattern_similarity`), "gain" (`answer_gain`) and "drift", of
    one model; statements whose table is missing are left out.

    Columns: statement, measured (what the two numbers are), number, against, holds (number is the
    larger), ci_low, ci_high, against_low, against_high (95 % intervals; over several layers the
    means of their ends, which is wider than the interval of the mean; missing where there is none),
    verdict ("holds" or "does not hold" where the intervals are apart, else "open"; where there are
    none the numbers decide). Means over layers leave out the layers in which nothing is read from
    the subject: those below the one at which patching `attn_out` first moves the answer are decided
    by the words alone; without "transfer" all layers count.
    """
    rows = []
    for one in _claims(tables):
        number, against = one.number.mean(), one.against.mean()
        row: dict[str, Any] = {"statement": one.statement, "measured": one.measured}
        row |= {"number": number["number"], "against": against["number"]}
        row["holds"] = bool(row["number"] > row["against"])
        row |= {end: number[end] for end in ENDS}
        row |= {f"against_{end[3:]}": against[end] for end in ENDS}
        rows.append(row | {"verdict": _verdict(number, against)})
    names = ["statement", "measured", "number", "against", "holds", *ENDS]
    return pd.DataFrame(rows, columns=[*names, "against_low", "against_high", "verdict"])


def claims_by_layer(tables: Tables) -> pd.DataFrame:
    """The statements of `claims` that are about layers, one row per statement and layer (of all,
    the lowest too): columns statement, layer, number, ci_low, ci_high, against, against_low,
    against_high (95 % intervals) and verdict. Where the statement is that two things differ,
    "holds" says that their intervals are apart, whichever is larger."""
    frames = []
    for one in _claims(tables, every=True):
        number, against = one.layers or (one.number, one.against)
        if len(number) < 2:
            continue
        names = {"number": "against", "ci_low": "against_low", "ci_high": "against_high"}
        both = number.join(against.rename(columns=names), how="inner").reset_index()
        both.insert(0, "statement", one.statement)
        told = [_verdict(number.loc[n], against.loc[n]) for n in both["layer"]]
        if one.differ:
            told = ["open" if one == "open" else "holds" for one in told]
        frames.append(both.assign(verdict=told))
    columns = ["statement", "layer", "number", *ENDS, "against", "against_low", "against_high"]
    empty = pd.DataFrame(columns=[*columns, "verdict"])
    return pd.concat(frames, ignore_index=True) if frames else empty


def _claims(tables: Tables, every: bool = False) -> Iterator[_Claim]:
    """`every`: of every layer, not only of those in which something is read."""
    reading = None if every else _reading_layers(tables)
    for name, test in _TESTS.items():
        if name in tables:
            yield from test(tables[name], reading)


def _verdict(number: pd.Series, against: pd.Series) -> str:
    ends = [number["ci_low"], number["ci_high"], against["ci_low"], against["ci_high"]]
    low, high, other_low, other_high = map(float, ends)
    if any(map(math.isnan, (number["number"], against["number"]))):
        return "not measured"
    if any(map(math.isnan, (low, high, other_low, other_high))):
        return "holds" if number["number"] > against["number"] else "does not hold"
    return "holds" if low > other_high else "does not hold" if high < other_low else "open"


def _reading_layers(tables: Tables) -> Layers:
    """Layers from the first on at which patching `attn_out` between subjects changes answers."""
    table = tables.get("transfer")
    if table is None:
        return None
    kind = "same relation, other subject"
    rows = where(table, stream="attn_out", kind=kind, outcome="donor").dropna(subset=["layer"])
    moved = rows.loc[rows["ci_low"] > 0, "layer"]
    return {int(n) for n in rows["layer"] if moved.empty or n >= moved.min()}


def _side(table: pd.DataFrame, value: str, layers: Layers = None, **wanted: str) -> pd.DataFrame:
    """The rows with these values as one of the two numbers."""
    rows = where(table, **wanted)
    if layers is not None:
        rows = rows.loc[rows["layer"].isin(list(layers))]
    rows = rows.assign(number=rows[value], layer=rows["layer"].fillna(0).astype(int))
    return rows.set_index("layer")[["number", *ENDS]].astype(float)


def _one(number: float, low: float, high: float) -> pd.DataFrame:
    """A number that is not of a layer."""
    row = {"number": [number], "ci_low": [low], "ci_high": [high]}
    return pd.DataFrame(row, index=pd.Index([0], name="layer"))


def _similarity(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    sides = [
        _side(table, "mean", position="last", measure="cosine", component=component)
        for component in ("MHSA", "FFN")
    ]
    apart = (sides[0]["ci_low"] > sides[1]["ci_high"]) | (sides[1]["ci_low"] > sides[0]["ci_high"])
    yield _Claim(
        "MHSA and FFN change their input in different ways",
        "share of layers whose cosine intervals do not overlap (against half)",
        _one(float(apart.mean()), math.nan, math.nan),
        _one(0.5, 0.5, 0.5),
        (sides[0], sides[1]),
        differ=True,
    )


def _variance(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    def share(stream: str, factor: str) -> pd.DataFrame:
        return _side(table, "share", reading, stream=stream, factor=factor)

    yield _Claim(
        "MHSA holds general patterns: its output tells what is asked, not about whom",
        "variance of attn_out explained by the relation (against: by the subject)",
        share("attn_out", "relation, other phrasing"),
        share("attn_out", "subject"),
    )
    yield _Claim(
        "FFN holds the facts: its output depends on the subject more than MHSA's does",
        "variance explained by the subject, of mlp_out (against: of attn_out)",
        share("mlp_out", "subject"),
        share("attn_out", "subject"),
    )


def _transfer(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    swaps = where(table, kind="same relation, other subject", stream="attn_out")
    whole = swaps["layer"].isna()
    sides = [
        [_side(rows, "share", outcome=outcome) for outcome in ("own", "donor")]
        for rows in (swaps.loc[whole], swaps.loc[~whole])
    ]
    yield _Claim(
        "MHSA output at the answer position can be swapped between subjects of one relation",
        "answers that stay the recipient's (against: that follow the donor)",
        *sides[0],
        layers=(sides[1][0], sides[1][1]),
    )


def _patterns(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    yield _Claim(
        "Where the heads look depends on the relation",
        "overlap of attention within a relation, other phrasing (against: across relations)",
        _side(table, "mean", reading, pair="same relation, other phrasing"),
        _side(table, "mean", reading, pair="other relation"),
    )


def _gain(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    per_fact = table.pivot(index="fact", columns="stream", values="gain")["attn_out"]
    change = table.groupby("fact")["change"].first()
    share = metrics.bootstrap_ratio(per_fact.to_numpy(), change.to_numpy())
    yield _Claim(
        "δ^a takes a part of the change that FFN then need not store",
        "share of the new answer's gain that comes from δ^a (against a tenth)",
        _one(float(per_fact.mean() / change.mean()), *share),
        _one(0.1, 0.1, 0.1),
    )


def _drift(table: pd.DataFrame, reading: Layers) -> Iterator[_Claim]:
    def moved(stream: str, kind: str) -> pd.DataFrame:
        return _side(table, "mean", reading, stream=stream, kind=kind, position="last")

    yield _Claim(
        "MHSA weights need no update: unchanged, they extract the new answer where it is asked",
        "relative change of attn_out at the answer, edited facts (against: neighbours)",
        moved("attn_out", "rewrite"),
        moved("attn_out", "neighbour"),
    )


_TESTS = {
    "similarity": _similarity,
    "variance": _variance,
    "transfer": _transfer,
    "patterns": _patterns,
    "gain": _gain,
    "drift": _drift,
}
