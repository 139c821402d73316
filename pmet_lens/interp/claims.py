"""The paper's statements about MHSA and FFN, each with the number that speaks for or against it.

A statement here is a comparison of two measured numbers, so that it can fail. What it is tested on
matters more than the test: see the notebook `01_mhsa_knowledge_patterns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from pmet_lens.evaluation.metrics import where

Tables = Mapping[str, pd.DataFrame]
Layers = set[int] | None
Row = tuple[str, str, float, float]
"""Statement, what is measured, the number, and the number against it."""


def claims(tables: Tables) -> pd.DataFrame:
    """What the study says about the paper's statements, one row per statement.

    `tables`: any of "similarity" (`component_similarity`), "variance" (`variance_split`),
    "transfer" (`patch`), "patterns" (`pattern_similarity`), "gain" (`answer_gain`) and "drift", of
    one model; statements whose table is missing are left out.

    Columns: statement, measured (what the two numbers are), number, against, holds. Means over
    layers leave out the layers in which nothing is read from the subject: those below the one at
    which patching `attn_out` first moves the answer are decided by the words alone; without
    "transfer" all layers count.
    """
    reading = _reading_layers(tables)
    rows = [
        row
        for name, test in _TESTS.items()
        if name in tables
        for row in test(tables[name], reading)
    ]
    frame = pd.DataFrame(rows, columns=["statement", "measured", "number", "against"])
    return frame.assign(holds=[bool(row[2] > row[3]) for row in rows])


def _reading_layers(tables: Tables) -> Layers:
    """Layers from the first on at which patching `attn_out` between subjects changes answers."""
    table = tables.get("transfer")
    if table is None:
        return None
    kind = "same relation, other subject"
    rows = where(table, stream="attn_out", kind=kind, outcome="donor").dropna(subset=["layer"])
    moved = rows.loc[rows["ci_low"] > 0, "layer"]
    return {int(n) for n in rows["layer"] if moved.empty or n >= moved.min()}


def _mean(table: pd.DataFrame, value: str, layers: Layers = None, **wanted: str) -> float:
    rows = where(table, **wanted)
    if layers is not None:
        rows = rows.loc[rows["layer"].isin(list(layers))]
    return float(rows[value].mean())


def _similarity(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    cosine = where(table, position="last", measure="cosine")
    wide = cosine.pivot(index="layer", columns="component", values=["ci_low", "ci_high"])
    apart = (wide["ci_low", "MHSA"] > wide["ci_high", "FFN"]) | (
        wide["ci_low", "FFN"] > wide["ci_high", "MHSA"]
    )
    yield (
        "MHSA and FFN change their input in different ways",
        "share of layers whose cosine intervals do not overlap (against half)",
        float(apart.mean()),
        0.5,
    )


def _variance(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    def share(stream: str, factor: str) -> float:
        return _mean(table, "share", reading, stream=stream, factor=factor)

    yield (
        "MHSA holds general patterns: its output tells what is asked, not about whom",
        "variance of attn_out explained by the relation (against: by the subject)",
        share("attn_out", "relation, other phrasing"),
        share("attn_out", "subject"),
    )
    yield (
        "FFN holds the facts: its output depends on the subject more than MHSA's does",
        "variance explained by the subject, of mlp_out (against: of attn_out)",
        share("mlp_out", "subject"),
        share("attn_out", "subject"),
    )


def _transfer(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    whole = where(table.loc[table["layer"].isna()], kind="same relation, other subject")
    yield (
        "MHSA output at the answer position can be swapped between subjects of one relation",
        "answers that stay the recipient's (against: that follow the donor)",
        _mean(whole, "share", stream="attn_out", outcome="own"),
        _mean(whole, "share", stream="attn_out", outcome="donor"),
    )


def _patterns(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    yield (
        "Where the heads look depends on the relation",
        "overlap of attention within a relation, other phrasing (against: across relations)",
        _mean(table, "mean", reading, pair="same relation, other phrasing"),
        _mean(table, "mean", reading, pair="other relation"),
    )


def _gain(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    per_fact = table.pivot(index="fact", columns="stream", values="gain")
    change = table.groupby("fact")["change"].first()
    yield (
        "δ^a takes a part of the change that FFN then need not store",
        "share of the new answer's gain that comes from δ^a (against a tenth)",
        float(per_fact["attn_out"].mean() / change.mean()),
        0.1,
    )


def _drift(table: pd.DataFrame, reading: Layers) -> Iterator[Row]:
    def moved(stream: str, kind: str) -> float:
        return _mean(table, "mean", reading, stream=stream, kind=kind, position="last")

    yield (
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
