"""Metrics as pure functions on numbers, strings and tables, and their 95 % bootstrap intervals.

Range and direction stand in every docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pmet_lens.data import markup
from pmet_lens.evaluation.intervals import INTERVAL as INTERVAL
from pmet_lens.evaluation.intervals import Interval as Interval
from pmet_lens.evaluation.intervals import Numbers as Numbers
from pmet_lens.evaluation.intervals import bootstrap as bootstrap
from pmet_lens.evaluation.intervals import bootstrap_ratio as bootstrap_ratio
from pmet_lens.evaluation.intervals import change as change
from pmet_lens.evaluation.intervals import interval as interval
from pmet_lens.evaluation.intervals import interval_table as interval_table
from pmet_lens.evaluation.text_metrics import consistency as consistency
from pmet_lens.evaluation.text_metrics import fluency as fluency
from pmet_lens.evaluation.text_metrics import ngram_entropy as ngram_entropy


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of values ≥ 0, in their unit; 0 if one is 0. Higher is better.

    Summarises ES, PS and NS as the score S (ROME, arXiv 2202.05262, section 3.4).
    """
    if not len(values):
        raise ValueError("harmonic_mean needs at least one value.")
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / v for v in values)


def says_new(nll_new: float, nll_true: float) -> bool:
    """Whether the new answer is more likely than the true one: mean −log P per target token of
    each, in nats, lower is likelier (ES and PS; the negation, with roles swapped, is NS)."""
    return nll_new < nll_true


def where(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows in which each named column has the given value."""
    chosen = np.ones(len(table), dtype=bool)
    for column, value in wanted.items():
        chosen &= (table[column] == value).to_numpy()
    return table.loc[chosen]


def means(frame: pd.DataFrame, by: Sequence[str], value: str, case: str = "fact") -> pd.DataFrame:
    """Mean of column `value` per group of `by`, first within each `case`, then over cases: columns
    `by`, mean, ci_low, ci_high (95 % bootstrap over cases) and n (cases)."""
    rows = []
    grouping = {"sort": False, "dropna": False}
    per_case = frame.groupby([*by, case], as_index=False, **grouping).agg({value: "mean"})
    for key, group in per_case.groupby(list(by), **grouping):
        values = group[value].dropna().to_numpy(dtype=np.float64)
        if len(values):
            rows.append((*key, *interval(values)))  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*by, *INTERVAL])


_KINDS = {"E": "rewrite", "P": "paraphrase", "N": "neighbour"}
_MEASURES = {"S": "success", "A": "correct", "M": "margin"}
_FREE = {"F": "contains", "X": "exact", "T": "talks_on"}
FREE = frozenset((*(k + m for m in _FREE for k in _KINDS), "free portability", "free locality"))
"""Metrics of free answers (`evaluate(…, free=True)`)."""
# Metric -> the kind of prompt and the column of `evaluate` that it is the mean of.
_COLUMNS: Mapping[str, tuple[str, str]] = {
    **{
        k + m: (kind, column)
        for m, column in {**_MEASURES, **_FREE}.items()
        for k, kind in _KINDS.items()
    },
    "portability": ("portability", "correct"),
    "free portability": ("portability", "contains"),
    "locality": ("locality", "correct"),
    "free locality": ("locality", "contains"),
    "GE": ("generation", "fluency"),
    "RS": ("generation", "consistency"),
}
_ZSRE: Mapping[str, tuple[str, str]] = {
    "efficacy": ("rewrite", "token_accuracy"),
    "paraphrase": ("paraphrase", "token_accuracy"),
    "specificity": ("neighbour", "token_accuracy"),
}
_BY_KIND = ("portability", "free portability", "locality", "free locality")
SCORES: Mapping[str, tuple[str, ...]] = {"S": ("ES", "PS", "NS"), "score": tuple(_ZSRE)}
"""Scores, each the harmonic mean of these metrics."""
_ORDER = ("S", *_COLUMNS, "score", *_ZSRE)
MEANING: Mapping[str, str] = {
    "S": "harmonic mean of ES, PS and NS, %",
    "ES": "edited prompts on which the new answer is likelier, %",
    "PS": "paraphrases on which the new answer is likelier, %",
    "NS": "neighbours on which the true answer is still likelier, %",
    "EA": "edited prompts answered word for word, %",
    "PA": "paraphrases answered word for word, %",
    "NA": "neighbours answered word for word, %",
    "EM": "edited prompts: probability of the new answer minus the old one's, points",
    "PM": "paraphrases: probability of the new answer minus the old one's, points",
    "NM": "neighbours: probability of the true answer minus the new one's, points",
    "EF": "edited prompts whose free answer holds the new answer, %",
    "PF": "paraphrases whose free answer holds the new answer, %",
    "NF": "neighbours whose free answer holds the true answer, %",
    "EX": "edited prompts whose free answer is the new answer and no more, %",
    "PX": "paraphrases whose free answer is the new answer and no more, %",
    "NX": "neighbours whose free answer is the true answer and no more, %",
    "ET": "edited prompts whose free answer begins with the new answer and talks on, %",
    "PT": "paraphrases whose free answer begins with the new answer and talks on, %",
    "NT": "neighbours whose free answer begins with the true answer and talks on, %",
    "portability": "prompts whose answer follows from the new one, answered word for word, %",
    "free portability": "prompts whose free answer holds what follows from the new one, %",
    "locality": "prompts whose answer has to stay, answered word for word, %",
    "free locality": "prompts whose answer has to stay, and stands in the free answer, %",
    "GE": "fluency of generated text, bits × 100",
    "RS": "consistency of generated text with texts about the new answer, 0 to 100",
    "score": "zsRE: harmonic mean of the three below, %",
}


def meaning_of(metric: str) -> str:
    """What a metric says, in words; empty for one that has none here."""
    name, _, kind = metric.partition(" (")
    said = MEANING.get(name, "")
    return f"{kind[:-1]}: {said}" if said and kind else said


class Summary(pd.DataFrame):
    """The table of `summarise`, which shows itself in a notebook with what each metric says."""

    def _repr_html_(self) -> str:
        rows = [
            [name, mean, f"[{low:.1f}, {high:.1f}]", int(n), meaning_of(str(name))]
            for name, mean, low, high, n in self.itertuples()
        ]
        return markup.table(rows, ("metric", "mean", "95 % interval", "facts", "what it says"))


def summarise(rows: pd.DataFrame, before: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of `evaluate` in one row per metric (index), columns mean, ci_low, ci_high (95 %
    bootstrap over facts), n (facts). Averaged per fact first, then over facts.

    In per cent, higher is better: ES, PS, NS (success on rewrite, paraphrase and neighbour
    prompts), S (their harmonic mean), EA, PA, NA (accuracies), EM, PM, NM (mean probability
    margins, −100 to 100), portability (accuracy on what follows from the new answer, where facts
    have such prompts), locality (on what has to stay), and both for each kind of implication,
    "portability (second hop)". `before`, the table of the unedited model, asked in the same way:
    then locality counts only the prompts that it answers right. Of free answers (`evaluate(…,
    free=True)`): EF, PF, NF (they hold the wanted answer), EX, PX, NX (they are it), ET, PT, NT
    (they begin with it and talk on; of these lower is better), free portability, free locality.

    GE (fluency) in bits × 100. RS (consistency), 0 to 100.

    Of zsRE facts (`benchmark` "zsre"), and of no others, also efficacy, paraphrase and specificity:
    the share of the answer's tokens that are the argmax under teacher forcing on the question, on
    its rephrasing and on the "nq question", 0 to 100, and score, their harmonic mean (MEMIT, arXiv
    2210.07229, section 5.1). EA, PA and NA of the same prompts ask for *every* token.
    """
    cases = cases_of(rows, before)
    table = {k: interval(cases[k].to_numpy(), _statistic(k)) for k in _ordered(cases)}
    return Summary(interval_table(table))


def _statistic(metric: str) -> str:
    return "harmonic" if metric in SCORES else "mean"


def _ordered(cases: Mapping[str, object]) -> list[str]:
    """Their names in the order of the summary, those of kinds behind the whole."""
    places = {name: i for i, name in enumerate(_ORDER)}
    return sorted(cases, key=lambda name: (places[name.partition(" (")[0]], name))


def cases_of(rows: pd.DataFrame, before: pd.DataFrame | None = None) -> dict[str, Any]:
    """Metric -> its value per fact; of a score those of its parts, side by side."""
    if before is not None:
        rows = _known_before(rows, before)
    cases: dict[str, Any] = dict(_per_fact(rows, _COLUMNS))
    if "implication" in rows:
        for kind, own in rows.groupby("implication"):
            found = _per_fact(own, {name: _COLUMNS[name] for name in _BY_KIND})
            cases |= {f"{name} ({kind})": value for name, value in found.items()}
    if "benchmark" in rows:
        cases |= _per_fact(rows.loc[rows["benchmark"] == "zsre"], _ZSRE)
    for name, parts in SCORES.items():
        if set(parts) <= set(cases):
            cases[name] = pd.concat([cases[part] for part in parts], axis=1)
    return cases


def _known_before(rows: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """The rows without the locality scores of prompts that the unedited model answers wrong."""
    place = ["fact", "kind", "index"]
    rows, stays = rows.copy(), rows["kind"] == "locality"
    known = before.set_index(place)
    here = rows.set_index(place).index
    for column in {"correct", "token_accuracy", "contains", "exact", "talks_on"} & {*rows}:
        told = "contains" if column in _FREE.values() and "contains" in known else "correct"
        right = known[told].reindex(here).to_numpy() == 1
        rows[column] = rows[column].where(~stays | right)
    return rows


def paired(
    rows: pd.DataFrame, baseline: pd.DataFrame, before: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What changes from `baseline` to `rows`, two tables of `evaluate` of the same facts. `before`:
    as in `summarise`.

    One row per metric of `summarise` (index), columns mean (the difference, rows − baseline, in the
    metric's unit), ci_low, ci_high (95 % bootstrap over facts, resampled together in both tables)
    and n (facts in both). A difference whose interval leaves out 0 is not of the choice of facts.

    Raises ValueError for tables without a fact in common.
    """
    one, other = (cases_of(table, before) for table in (rows, baseline))
    out = {}
    for name in one.keys() & other.keys():
        both = one[name].index.intersection(other[name].index)
        if not len(both):
            continue
        values = one[name].loc[both].to_numpy(), other[name].loc[both].to_numpy()
        out[name] = change(*values, _statistic(name))
    if not out:
        raise ValueError("the two tables have no fact in common.")
    return interval_table({name: out[name] for name in _ordered(out)})


def _per_fact(rows: pd.DataFrame, wanted: Mapping[str, tuple[str, str]]) -> dict[str, pd.Series]:
    """Metric -> its mean per fact, in the unit of the summary; only those that were measured."""
    cases = {}
    for name, (kind, column) in wanted.items():
        if column in rows:
            chosen = rows.loc[rows["kind"] == kind].dropna(subset=[column])
            if len(chosen):
                # Fluency and consistency come in their final unit.
                scale = 1 if kind == "generation" else 100
                cases[name] = scale * chosen.groupby("fact")[column].mean()
    return cases
