"""The causal trace: where a fact is recalled.

The subject's tokens are corrupted with noise, so that the answer is lost; then one component's
clean value is put back at one place, and the trace reports how much of the loss comes back (ROME,
arXiv 2202.05262, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.evaluation import metrics
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.model import Model, Stream

OnCell = Callable[[int, int], object]
PLACES = ("first subject token", "middle subject tokens", "last subject token", "between", "last")


@dataclass(frozen=True)
class _Rows:
    """The prompts of all facts, repeated once per noise sample."""

    batch: tokens.Batch
    noise: Float[Tensor, "row token d_model"]


def causal_trace(
    model: Model,
    facts: Sequence[Fact],
    *,
    stream: Stream = "resid_post",
    layers: Sequence[int] | None = None,
    window: int = 1,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    batch_size: int = 50,
    on_cell: OnCell | None = None,
) -> pd.DataFrame:
    """Share of the lost answer probability that comes back when `stream` is restored.

    Every fact needs `target_true`. Noise of `noise` standard deviations of the token embeddings is
    added to the input of layer 0 at every subject token (ROME: 3), `samples` times per fact.
    `window`: how many layers around each of `layers` are restored together (fewer at the ends);
    ROME restores `attn_out` and `mlp_out` in windows of 10, because one layer alone does little.
    `batch_size`: facts per pass; the result does not depend on it. `on_cell(done, all)` counts
    facts.

    Returns a frame with one row per layer and place (`PLACES`; "between" are the tokens between
    subject and last prompt token, "last" the last prompt token): columns layer, place, stream,
    window, noise, samples (as asked for), recovered (0: nothing, 1: all; over facts mean(restored −
    corrupted) / mean(clean − corrupted) of the answer's probability), ci_low, ci_high (95 %
    bootstrap over facts), n (facts that have such a token), p_clean, p_corrupted (means over them).
    """
    facts = [f for f in facts if f.target_true is not None]
    if not facts:
        raise FactError("causal_trace needs facts with target_true; there are none.")
    around = _windows(model, layers, window, samples)
    cells: dict[tuple[int, str], list[tuple[Tensor, ...]]] = {}
    for start in range(0, len(facts), batch_size):
        own = range(start, min(start + batch_size, len(facts)))
        rows = _corrupted(model, {i: facts[i] for i in own}, samples, noise, seed)
        for (layer, place), parts in _restorations(model, rows, stream, around).items():
            cells.setdefault((layer, place), []).append(parts)
        if on_cell is not None:
            on_cell(own.stop, len(facts))
    table = []
    for layer in around:
        for place in PLACES:
            parts = [torch.cat(p) for p in zip(*cells[layer, place], strict=True)]
            has = parts[-1].view(-1, samples)[:, 0].bool()
            if has.any():
                how = {"window": window, "noise": noise, "samples": samples}
                share = _share(*(p.view(-1, samples).mean(1)[has] for p in parts[:-1]))
                table.append({"layer": layer, "place": place, "stream": stream, **how, **share})
    return pd.DataFrame(table)


def trace_tokens(
    model: Model,
    fact: Fact,
    *,
    stream: Stream = "resid_post",
    layers: Sequence[int] | None = None,
    window: int = 1,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    on_cell: OnCell | None = None,
) -> pd.DataFrame:
    """The causal trace of one fact, token by token (ROME, figure 1); arguments, errors and noise
    as `causal_trace`, `on_cell(done, all)` counts cells.

    One row per layer and token of the prompt: columns layer, position (of the token, from 0),
    token (its text), stream, window, recovered (share of the lost probability of `target_true`,
    0: nothing, 1: all; NaN where nothing was lost), p_clean, p_corrupted (means over the samples).
    """
    if fact.target_true is None:
        raise FactError(f"{fact.text!r} has no target_true to trace.")
    around = _windows(model, layers, window, samples)
    texts = tokens.shown(model, fact)[1]
    rows = _corrupted(model, {0: fact}, samples, noise, seed)
    inside = sorted({n for w in around.values() for n in w})
    clean, kept = _clean_run(model, rows, stream, inside)
    corrupted = _probability(model, rows, [])
    lost = float((clean - corrupted).mean())
    place = torch.arange(rows.batch.ids.shape[1], device=rows.batch.ids.device)
    table: list[dict[str, object]] = []
    for layer, own in around.items():
        for position, token in enumerate(texts):
            chosen = (place == position).expand(samples, -1)
            hooks = [(model.stream_hook(n, stream), _restore(kept[n], chosen)) for n in own]
            gained = float((_probability(model, rows, hooks) - corrupted).mean())
            cell = {"layer": layer, "position": position, "token": token, "stream": stream}
            cell.update(window=window, recovered=gained / lost if lost else math.nan)
            cell.update(p_clean=float(clean.mean()), p_corrupted=float(corrupted.mean()))
            table.append(cell)
            if on_cell is not None:
                on_cell(len(table), len(around) * len(texts))
    return pd.DataFrame(table)


def _restorations(
    model: Model, rows: _Rows, stream: Stream, around: Mapping[int, range]
) -> dict[tuple[int, str], tuple[Tensor, ...]]:
    """Per layer and place the answer's probability clean, corrupted and restored, and whether the
    row has such a token, all `[row]`."""
    clean, kept = _clean_run(model, rows, stream, sorted({n for w in around.values() for n in w}))
    corrupted = _probability(model, rows, [])
    out: dict[tuple[int, str], tuple[Tensor, ...]] = {}
    for layer, window in around.items():
        for place in PLACES:
            chosen = _place(rows, place)
            restored = corrupted
            if bool(chosen.any()):
                hooks = [(model.stream_hook(n, stream), _restore(kept[n], chosen)) for n in window]
                restored = _probability(model, rows, hooks)
            out[layer, place] = (clean, corrupted, restored, chosen.any(1))
    return out


def _windows(
    model: Model, layers: Sequence[int] | None, window: int, samples: int
) -> dict[int, range]:
    """For each of `layers` (None: all) those that are restored together."""
    if window < 1 or samples < 1:
        raise FactError("window and samples must be at least 1.")
    layers = range(model.n_layers) if layers is None else layers
    return {n: _window(model.check_layer(n), window, model.n_layers) for n in layers}


def _window(layer: int, width: int, n_layers: int) -> range:
    """`width` layers around `layer` (one more before than behind where it is even)."""
    first = layer - width // 2
    return range(max(0, first), min(n_layers, first + width))


def _corrupted(
    model: Model, facts: Mapping[int, Fact], samples: int, noise: float, seed: int
) -> _Rows:
    """The prompts of numbered facts. A fact's noise depends on its number and the seed alone."""
    prompts = [
        tokens.Prompt(f.prompt, f.subject, f.target_true)
        for f in facts.values()
        for _ in range(samples)
    ]
    batch = tokens.encode(model, prompts)
    spread = noise * float(model.embedding.float().std())
    drawn = torch.zeros(*batch.ids.shape, model.d_model)
    for k, number in enumerate(facts):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        row = k * samples
        start, stop = int(batch.first[row]), int(batch.subject[row]) + 1
        size = (samples, stop - start, model.d_model)
        drawn[row : row + samples, start:stop] = spread * torch.randn(size, generator=generator)
    return _Rows(batch, drawn.to(batch.ids.device))


def _clean_run(
    model: Model, rows: _Rows, stream: Stream, layers: Sequence[int]
) -> tuple[Float[Tensor, " row"], dict[int, Tensor]]:
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def hook(value: Tensor) -> None:
            kept[layer] = value

        return hook

    hooks = [(model.stream_hook(layer, stream), keep(layer)) for layer in layers]
    silent = _Rows(rows.batch, torch.zeros_like(rows.noise))
    return _probability(model, silent, hooks), kept


def _probability(
    model: Model, rows: _Rows, hooks: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]]
) -> Float[Tensor, " row"]:
    """Geometric mean of the answer tokens' probabilities, per row."""
    corrupt = (model.stream_hook(0, "resid_pre"), lambda value: value + rows.noise.to(value))
    with torch.no_grad():
        return likelihood.answers(model, rows.batch, [corrupt, *hooks], mean=True).exp()


def _place(rows: _Rows, name: str) -> Bool[Tensor, "row token"]:
    position = torch.arange(rows.batch.ids.shape[1], device=rows.batch.ids.device)
    first, subject, last = (
        x[:, None] for x in (rows.batch.first, rows.batch.subject, rows.batch.last)
    )
    where = {
        "first subject token": (position == first) & (first < subject),
        "middle subject tokens": (position > first) & (position < subject),
        "last subject token": position == subject,
        "between": (position > subject) & (position < last),
        "last": (position == last) & (last > subject),
    }
    return where[name]


def _restore(
    clean: Float[Tensor, "row token d_model"], chosen: Bool[Tensor, "row token"]
) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.where(chosen[..., None].to(value.device), clean, value)


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
