"""The causal trace: where a fact is recalled.

The subject's tokens are corrupted with noise, so that the answer is lost; then one component's
clean value is put back at one place, and the trace reports how much of the loss comes back (ROME,
arXiv 2202.05262, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError, with_answer
from pmet_lens.data.progress import Tell, shown
from pmet_lens.evaluation import metrics
from pmet_lens.interp import passes
from pmet_lens.interp.restoring import PLACES, asked, run_both
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.model import Model, Stream
from pmet_lens.models.sites import several


@shown("causal trace", "fact", "on_cell")
def causal_trace(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    stream: Stream = "resid_post",
    layers: int | Sequence[int] | None = None,
    places: str | Sequence[str] = PLACES,
    window: int = 1,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    batch_size: int = 50,
    on_cell: Tell | None = None,
) -> pd.DataFrame:
    """Share of the lost answer probability that comes back when `stream` is restored.

    Behind a post-norm restoring what a component writes ("mlp_out") and restoring what it adds to
    the residual stream ("mlp_added") are the same.

    Facts without `target_true` are left out, with a warning. Noise of `noise` standard deviations
    of the token embeddings, as they enter layer 0 (Gemma scales them), is added there at every
    subject token (ROME: 3), `samples` times per fact.
    `places`: some of `PLACES`; each takes its passes. `window`: how many layers around each of
    `layers` are restored together (fewer at the ends); ROME restores `attn_out` and `mlp_out` in
    windows of 10, because one layer alone does little. `batch_size`: facts per pass (fewer of
    a large vocabulary); the result does not depend on it. `on_cell(done, all)` counts facts.

    Returns a frame with one row per layer and place (`PLACES`; "between" are the tokens between
    subject and last prompt token, "last" the last prompt token): columns layer, place, stream,
    window, noise, samples (as asked for), recovered (0: nothing, 1: all; over facts mean(restored −
    corrupted) / mean(clean − corrupted) of the answer's probability), ci_low, ci_high (95 %
    bootstrap over facts), n (facts that have such a token), p_clean, p_corrupted (means over them).
    """
    facts = list(with_answer(facts, "target_true", "causal_trace").values())
    places = several(places)
    unknown = [place for place in places if place not in PLACES]
    if unknown or not places:
        raise FactError(f"places must be some of {', '.join(PLACES)}; got {places!r}.")
    around = _windows(model, layers, window, samples)
    cells: dict[tuple[int, str], list[Tensor]] = {}
    size = max(
        1, likelihood.rows_at_once(model, asked(model, facts), batch_size * samples) // samples
    )
    for start in range(0, len(facts), size):
        stop = min(start + size, len(facts))
        numbered = {i: facts[i] for i in range(start, stop)}
        runs = run_both(model, numbered, stream, around, samples, noise, seed)
        for cell, values in runs.by_place(places):
            cells.setdefault(cell, []).append(values)
        del runs  # its activations, before the next batch makes new ones
        if on_cell is not None:
            on_cell(stop, len(facts))
    how = {"stream": stream, "window": window, "noise": noise, "samples": samples}
    table = []
    for (layer, place), parts in cells.items():
        clean, corrupted, restored = torch.cat(parts, dim=1)
        if len(clean):
            share = _share(clean, corrupted, restored)
            table.append({"layer": layer, "place": place, **how, **share})
    return pd.DataFrame(table)


@shown("causal trace", "cell", "on_cell")
def trace_tokens(
    model: Model,
    fact: Fact | Sequence[Fact],
    *,
    stream: Stream = "resid_post",
    layers: int | Sequence[int] | None = None,
    window: int = 1,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    on_cell: Tell | None = None,
) -> pd.DataFrame:
    """The causal trace of one fact, token by token (ROME, figure 1); arguments, errors and noise
    as `causal_trace`, `on_cell(done, all)` counts cells.

    One row per layer and token of the prompt: columns layer, position (of the token, from 0),
    token (its text), stream, window, recovered (share of the lost probability of `target_true`,
    0: nothing, 1: all; NaN where nothing was lost), p_clean, p_corrupted (means over the samples);
    of a list of facts also fact (number) and subject.
    """
    if not isinstance(fact, Fact):
        how: dict[str, Any] = {"stream": stream, "layers": layers, "window": window}
        how |= {"samples": samples, "noise": noise, "seed": seed, "on_cell": on_cell}
        return passes.each(fact, lambda one: trace_tokens(model, one, **how))
    if fact.target_true is None:
        raise FactError(f"{fact.text!r} has no target_true to trace.")
    around = _windows(model, layers, window, samples)
    texts = tokens.shown(model, fact)[1]
    runs = run_both(model, {0: fact}, stream, around, samples, noise, seed)
    p_clean, p_corrupted = float(runs.clean.mean()), float(runs.corrupted.mean())
    lost = float((runs.clean - runs.corrupted).mean())
    place = torch.arange(runs.batch.ids.shape[1], device=runs.batch.ids.device)
    table: list[dict[str, object]] = []
    for layer in around:
        for position, token in enumerate(texts):
            probability = runs.restored(layer, (place == position).expand(samples, -1))
            gained = float((probability - runs.corrupted).mean())
            cell = {"layer": layer, "position": position, "token": token, "stream": stream}
            cell.update(window=window, recovered=gained / lost if lost else math.nan)
            table.append({**cell, "p_clean": p_clean, "p_corrupted": p_corrupted})
            if on_cell is not None:
                on_cell(len(table), len(around) * len(texts))
    return pd.DataFrame(table)


def _windows(
    model: Model, layers: int | Sequence[int] | None, window: int, samples: int
) -> dict[int, range]:
    """For each of `layers` (None: all) those that are restored together."""
    if window < 1 or samples < 1:
        raise FactError("window and samples must be at least 1.")
    layers = range(model.n_layers) if layers is None else several(layers)
    return {n: _window(model.check_layer(n), window, model.n_layers) for n in layers}


def _window(layer: int, width: int, n_layers: int) -> range:
    """`width` layers around `layer` (one more before than after it where `width` is even)."""
    first = layer - width // 2
    return range(max(0, first), min(n_layers, first + width))


def _share(clean: Tensor, corrupted: Tensor, restored: Tensor) -> dict[str, float | int]:
    """Recovered share, a ratio of means over facts, with a bootstrap interval over facts."""
    gained = (restored - corrupted).double().cpu().numpy()
    lost = (clean - corrupted).double().cpu().numpy()
    # Where nothing was lost, no share of it can come back: NaN.
    low, high = metrics.bootstrap_ratio(gained, lost)
    return {
        "recovered": float(gained.mean() / lost.mean()) if lost.mean() else math.nan,
        "ci_low": low,
        "ci_high": high,
        "n": len(gained),
        "p_clean": float(clean.mean()),
        "p_corrupted": float(corrupted.mean()),
    }
