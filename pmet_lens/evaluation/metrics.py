"""Metrics as pure functions on numbers, strings, tables; range and direction in every docstring."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from pmet_lens.evaluation.summaries import Summary

Numbers = npt.NDArray[np.float64]


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


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy of the distribution of n-grams, in bits, from 0 (one n-gram again and again) to
    log2 of their number; higher is more varied. 0 for texts with fewer than n tokens."""
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def fluency(texts: Sequence[str]) -> float:
    """Generation entropy GE: mean over texts of the mean of (2/3)·H₂ and (4/3)·H₃, in bits, ×100.

    From 0; higher is more varied, repetition lowers it (ROME, appendix; MEMIT, appendix B).
    Words and punctuation marks are the tokens.
    """
    values = []
    for text in texts:
        tokens = re.findall(r"\w+|[^\w\s]", text)
        values.append((2 / 3 * ngram_entropy(tokens, 2) + 4 / 3 * ngram_entropy(tokens, 3)) / 2)
    return 100 * float(np.mean(values))


def consistency(texts: Sequence[str], references: Sequence[str]) -> float:
    """Consistency RS: cosine ×100 between the TF-IDF vectors of the generated texts, joined into
    one, and of the reference texts, joined into one; from 0 (no word in common) to 100, higher is
    better.

    The definition is that of ROME (arXiv 2202.05262, section 3.4) and MEMIT. Words are those of
    scikit-learn's `TfidfVectorizer` (lower case, two letters or more), whose document frequencies
    are taken from these two documents, where the published numbers take them from a download of
    Wikipedia texts: compare values of one run with each other, not with published ones.

    Raises ValueError for an empty list and for one string in place of a list.
    """
    # Here because scikit-learn takes seconds to import.
    from sklearn.feature_extraction.text import TfidfVectorizer

    for given in (texts, references):
        if isinstance(given, str) or not len(given):
            raise ValueError("consistency needs two lists, each of at least one text.")
    reader = TfidfVectorizer()
    split, documents = reader.build_analyzer(), [" ".join(texts), " ".join(references)]
    if not all(map(split, documents)):
        return 0.0
    one, other = reader.fit_transform(documents).toarray()
    return 100 * float(one @ other)  # rows have length 1


def bootstrap(
    per_case: Numbers, statistic: str = "mean", n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a statistic over cases, resampled with replacement.

    `per_case` is `[case]` for "mean", `[case, part]` for "harmonic" (harmonic mean of the column
    means). NaN marks a part a case does not have; resamples in which no case has some part are
    left out. Deterministic in `seed`.
    """
    values = [
        _statistics(per_case[chosen], statistic)
        for chosen in _resamples(len(per_case), n_resamples, seed)
    ]
    found = np.concatenate(values)
    low, high = np.percentile(found[~np.isnan(found)], [2.5, 97.5])
    return float(low), float(high)


def _resamples(n: int, n_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of resamples of `n` cases, `[resample, case]`, a bounded number at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // max(1, n))
    for start in range(0, n_resamples, rows):
        yield rng.integers(0, n, (min(rows, n_resamples - start), n))


def _statistics(chosen: Numbers, statistic: str) -> Numbers:
    """The statistic of each resample, `[resample, case]` or `[resample, case, part]`; NaN where no
    case has some part."""
    there = ~np.isnan(chosen)
    count = there.sum(axis=1)
    total = np.where(there, chosen, 0.0).sum(axis=1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    if statistic == "mean":
        return means
    lowest = means.min(axis=1, keepdims=True)
    positive = np.where(lowest > 0, means, 1.0)
    harmonic = means.shape[1] / (1 / positive).sum(axis=1)
    return np.where(np.isnan(lowest[:, 0]), np.nan, np.where(lowest[:, 0] > 0, harmonic, 0.0))


def bootstrap_ratio(
    top: Numbers, bottom: Numbers, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of mean(top) / mean(bottom) over cases, resampled together; NaN
    where bottom is 0 throughout."""
    if not np.any(bottom):
        return math.nan, math.nan
    ratios = [
        top[chosen].mean(1) / bottom[chosen].mean(1)
        for chosen in _resamples(len(top), n_resamples, seed)
    ]
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def means(frame: pd.DataFrame, by: Sequence[str], value: str, case: str = "fact") -> pd.DataFrame:
    """Mean of column `value` per group of `by`, first within each `case`, then over cases: columns
    `by`, mean, ci_low, ci_high (95 % bootstrap over cases) and n (cases)."""
    rows = []
    keys = [*by, case]
    per_case = frame.groupby(keys, sort=False, dropna=False, as_index=False).agg({value: "mean"})
    for key, own in per_case.groupby(list(by), sort=False, dropna=False):
        values = own[value].dropna().to_numpy(dtype=np.float64)
        if len(values):
            mean, interval = float(values.mean()), bootstrap(values)
            rows.append((*key, mean, *interval, len(values)))  # type: ignore[misc]
    return pd.DataFrame(rows, columns=[*by, "mean", "ci_low", "ci_high", "n"])


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "ES": ("rewrite", "success"),
    "PS": ("paraphrase", "success"),
    "NS": ("neighbour", "success"),
    "EA": ("rewrite", "correct"),
    "PA": ("paraphrase", "correct"),
    "NA": ("neighbour", "correct"),
    "EM": ("rewrite", "margin"),
    "PM": ("paraphrase", "margin"),
    "NM": ("neighbour", "margin"),
    "GE": ("generation", "fluency"),
    "RS": ("generation", "consistency"),
}
_ZSRE: Mapping[str, tuple[str, str]] = {
    "efficacy": ("rewrite", "token_accuracy"),
    "paraphrase": ("paraphrase", "token_accuracy"),
    "specificity": ("neighbour", "token_accuracy"),
}
_SCORES: Mapping[str, tuple[str, ...]] = {"S": ("ES", "PS", "NS"), "score": tuple(_ZSRE)}
_ORDER = ("S", *_COLUMNS, "score", *_ZSRE)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """The table of `evaluate` in one row per metric (index), columns mean, ci_low, ci_high (95 %
    bootstrap over facts), n (facts). Averaged per fact first, then over facts.

    In per cent, higher is better: ES, PS, NS (success on rewrite, paraphrase and neighbour
    prompts), S (their harmonic mean), EA, PA, NA (accuracies), EM, PM, NM (mean probability
    margins, −100 to 100). GE (fluency) in bits × 100. RS (consistency), 0 to 100.

    Of zsRE facts (`benchmark` "zsre"), and of no others, also efficacy, paraphrase and specificity:
    the share of the answer's tokens that are the arg-max under teacher forcing on the question, on
    its rephrasing and on the "nq question", 0 to 100, and score, their harmonic mean (MEMIT, arXiv
    2210.07229, section 5.1). EA, PA and NA of the same prompts ask for *every* token.
    """
    cases = _cases(rows)
    order = [k for k in _ORDER if k in cases]
    return Summary(
        [_interval(cases[k].to_numpy(), "harmonic" if k in _SCORES else "mean") for k in order],
        index=pd.Index(order, name="metric"),
        columns=pd.Index(["mean", "ci_low", "ci_high", "n"]),
    )


def _cases(rows: pd.DataFrame) -> dict[str, Any]:
    """Metric -> its value per fact; of a score those of its parts, side by side."""
    cases: dict[str, Any] = dict(_per_fact(rows, _COLUMNS))
    if "benchmark" in rows:
        cases |= _per_fact(rows.loc[rows["benchmark"] == "zsre"], _ZSRE)
    for name, parts in _SCORES.items():
        if set(parts) <= set(cases):
            cases[name] = pd.concat([cases[part] for part in parts], axis=1)
    return cases


def paired(rows: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """What changes from `baseline` to `rows`, two tables of `evaluate` of the same facts.

    One row per metric of `summarise` (index), columns mean (the difference, rows − baseline, in the
    metric's unit), ci_low, ci_high (95 % bootstrap over facts, resampled together in both tables)
    and n (facts in both). A difference whose interval leaves out 0 is not of the choice of facts.

    Raises ValueError for tables without a fact in common.
    """
    one, other = (_cases(table) for table in (rows, baseline))
    out = {}
    for name in one.keys() & other.keys():
        both = one[name].index.intersection(other[name].index)
        if not len(both):
            continue
        a, b = one[name].loc[both].to_numpy(), other[name].loc[both].to_numpy()
        statistic = "harmonic" if name in _SCORES else "mean"
        draws = [
            _statistics(a[chosen], statistic) - _statistics(b[chosen], statistic)
            for chosen in _resamples(len(both), 2000, 0)
        ]
        found = np.concatenate(draws)
        low, high = np.percentile(found[~np.isnan(found)], [2.5, 97.5])
        mean = float(_statistics(a[None], statistic)[0] - _statistics(b[None], statistic)[0])
        out[name] = (mean, float(low), float(high), len(both))
    if not out:
        raise ValueError("the two tables have no fact in common.")
    columns = ["mean", "ci_low", "ci_high", "n"]
    table = pd.DataFrame.from_dict(out, orient="index", columns=columns).rename_axis("metric")
    return table.reindex([k for k in _ORDER if k in out]).astype({"n": int})


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


def _interval(per_case: Numbers, statistic: str) -> tuple[float, float, float, int]:
    means = np.nanmean(per_case, axis=0)
    mean = float(means) if statistic == "mean" else harmonic_mean(list(means))
    return (mean, *bootstrap(per_case, statistic), len(per_case))
