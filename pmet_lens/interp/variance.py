"""What a component's output depends on: the relation asked for, or the subject asked about.

If MHSA held general extraction patterns, its output would be a function of the relation. Of the
variance of a stream over facts, this module measures the share that other facts with the same
relation (and another subject) predict, and the share that other facts with the same subject (and
another relation) predict. No fact ever predicts itself: a fact's deviation from the mean is
multiplied with the mean deviation of its *partners*, so noise and small groups add nothing on
average, and without any dependence the share is 0 (slightly below it, because the mean is taken
from the same facts).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.evaluation import metrics
from pmet_lens.interp.passes import check_relations, same_pairs
from pmet_lens.models.activations import Activations, Position, probe
from pmet_lens.models.model import Model, Stream

_ORDERS = 32
"""Shuffles at a time."""
FACTORS = ("relation", "relation, other phrasing", "subject")


def variance_split(
    model: Model,
    facts: Fact | Sequence[Fact],
    streams: Stream | Sequence[Stream] = ("attn_out", "mlp_out"),
    position: Position = "last",
    *,
    layers: int | Sequence[int] | None = None,
    n_permutations: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the variance of each stream explained by relation and by subject, per layer.

    Partners of a fact share its relation and not its subject ("relation"), do so in another prompt
    template ("relation, other phrasing": what is asked, not the words), or share its subject and
    not its relation ("subject"). Facts without such a partner do not count for that factor.
    `streams` are read as they are named: "attn_out" and "mlp_out" are what a component writes,
    "attn_added" and "mlp_added" what of it is added to the residual stream (another vector where a
    post-norm stands between).

    Returns columns layer, stream, position, factor, share (1: the partners' mean deviation is that
    of the fact; 0: unrelated; can be negative), ci_low, ci_high (95 % bootstrap over facts), null
    (95 % quantile of the share when labels are shuffled among the facts), p (share of shuffles that
    reach the share), n (facts with a partner).

    Facts without a relation, and those whose relation has no other fact, are left out, with a
    warning that counts them. Raises `FactError` where facts of fewer than two relations are left.
    """
    facts = _usable(listed(facts))
    if not facts:
        raise FactError("The variance split needs at least two relations with two facts each.")
    return split(probe(model, facts, streams, layers, (position,)), n_permutations, seed)


def split(activations: Activations, n_permutations: int = 200, seed: int = 0) -> pd.DataFrame:
    """`variance_split` of activations that are there already."""
    facts = activations.facts
    _check(facts)
    cells = [
        (layer, stream, position, _gram(value[:, n].double().numpy()))
        for (stream, position), value in activations.values.items()
        for n, layer in enumerate(activations.layers)
    ]
    grams = np.stack([gram for *_, gram in cells])
    rng = np.random.default_rng(seed)
    rows = []
    for factor, weights in _partners(facts).items():
        has: np.ndarray = np.asarray(weights.any(axis=1))
        if not has.any():
            continue
        # One order serves all layers and streams: what is slow is to reorder the weights.
        orders = [rng.permutation(len(has)) for _ in range(n_permutations)]
        null = _shares(grams, weights, has, orders)
        for cell, (layer, stream, position, gram) in enumerate(cells):
            top, bottom = (weights * gram).sum(1)[has], np.diag(gram)[has]
            share, interval = top.mean() / bottom.mean(), metrics.bootstrap_ratio(top, bottom)
            shuffled = null[:, cell] if n_permutations else np.empty(0)
            p = (1 + int((shuffled >= share).sum())) / (1 + n_permutations)
            limit = float(np.quantile(shuffled, 0.95)) if n_permutations else np.nan
            key = (layer, stream, position, factor)
            rows.append((*key, share, *interval, limit, p, int(has.sum())))
    names = ["layer", "stream", "position", "factor", "share", "ci_low", "ci_high", "null", "p"]
    return pd.DataFrame(rows, columns=[*names, "n"])


def _gram(x: metrics.Numbers) -> metrics.Numbers:
    centred = x - x.mean(0)
    return centred @ centred.T


def _shares(
    grams: metrics.Numbers, weights: metrics.Numbers, has: np.ndarray, orders: Sequence[np.ndarray]
) -> metrics.Numbers:
    """`[order, cell]`: the share of each gram matrix `[cell, fact, fact]` when the facts swap their
    partners in this order. Many orders are one matrix product, which reads the grams once."""
    flat, diagonal = grams.reshape(len(grams), -1), np.diagonal(grams, axis1=1, axis2=2)
    found = [np.empty((0, len(grams)))]
    for start in range(0, len(orders), _ORDERS):
        some = orders[start : start + _ORDERS]
        swapped = np.stack([weights[o[:, None], o].ravel() for o in some])
        bottom = np.stack([has[o] for o in some]).astype(float) @ diagonal.T
        found.append(swapped @ flat.T / bottom)
    return np.concatenate(found)


def _usable(facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose relation another one has."""
    counts = Counter(fact.relation for fact in facts)
    usable = [f for f in facts if f.relation is not None and counts[f.relation] > 1]
    if left_out := len(facts) - len(usable):
        warnings.warn(
            f"{left_out} of {len(facts)} facts are left out of the variance split: they have no "
            "relation, or no other fact has theirs, so nothing else can predict them.",
            stacklevel=3,
        )
    return usable


def _check(facts: Sequence[Fact]) -> None:
    check_relations(facts, "the variance split")
    counts = Counter(str(fact.relation) for fact in facts)
    single = sorted(r for r, n in counts.items() if n == 1)
    if single:
        raise FactError(
            f"The relation {single[0]!r} has a single fact, so nothing else can predict it; leave "
            "it out or add facts."
        )
    if len(counts) < 2:
        raise FactError("The variance split needs at least two relations with two facts each.")


def _partners(facts: Sequence[Fact]) -> dict[str, metrics.Numbers]:
    """Per factor `[fact, fact]`: row i averages over the partners of fact i; a row of 0 where it
    has none."""
    relation, subject, prompt = same_pairs(facts)
    by_relation = relation & ~subject
    chosen = (by_relation, by_relation & ~prompt, subject & ~relation)
    return {
        factor: partners / np.maximum(partners.sum(1, keepdims=True), 1.0)
        for factor, partners in zip(FACTORS, chosen, strict=True)
    }
