"""Metrics of generated text: fluency and consistency."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


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
