"""Metrics as pure functions on numbers and strings; range and direction in every docstring."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

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
