"""What the components hold: the causal trace (more of the paper's study comes here).

A causal trace asks where a fact is recalled. The subject's tokens are corrupted with noise, so
that the answer is lost; then one component's clean value is put back at one place, and the trace
reports how much of the loss comes back (ROME, arXiv 2202.05262, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pmet_lens import metrics, tokens
from pmet_lens.adapter import Model, Stream
from pmet_lens.facts import Fact, FactError

OnCell = Callable[[int, int], object]
PLACES = ("first subject token", "middle subject tokens", "last subject token", "between", "last")


@dataclass(frozen=True)
class _Rows:
    """The prompts of all facts, repeated once per noise sample."""

    batch: tokens.Batch
    first: Int[Tensor, " row"]
    noise: Float[Tensor, "row token d_model"]


def causal_trace(
    model: Model,
    facts: Sequence[Fact],
    *,
    stream: Stream = "resid_post",
    layers: Sequence[int] | None = None,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    on_cell: OnCell | None = None,
) -> pd.DataFrame:
    """Share of the lost answer probability that comes back when `stream` is restored.

    Every fact needs `target_true`. Noise of `noise` standard deviations of the token embeddings is
    added to the input of layer 0 at every subject token (ROME: 3), `samples` times per fact.

    Returns a frame with one row per layer and place (`PLACES`; "between" are the tokens between
    subject and last prompt token, "last" the last prompt token): columns layer, place, stream,
    recovered (0: nothing, 1: all; over facts mean(restored − corrupted) / mean(clean − corrupted)
    of the answer's probability), ci_low, ci_high (95 % bootstrap over facts), n (facts that have
    such a token), p_clean, p_corrupted (means over those facts).
    """
    facts = [f for f in facts if f.target_true is not None]
    if not facts:
        raise FactError("causal_trace needs facts with target_true; there are none.")
    layers = range(model.n_layers) if layers is None else layers
    rows = _corrupted(model, facts, samples, noise, seed)
    clean, kept = _clean_run(model, rows, stream, layers)
    corrupted = _probability(model, rows, [])
    places = {name: _place(rows, name) for name in PLACES}
    table = []
    for done, layer in enumerate(layers):
        for place, chosen in places.items():
            if not bool(chosen.any()):
                continue
            hook = (model.stream_hook(layer, stream), _restore(kept[layer], chosen))
            restored = _probability(model, rows, [hook])
            has = chosen.any(1).view(-1, samples)[:, 0]
            parts = [p.view(-1, samples).mean(1)[has] for p in (clean, corrupted, restored)]
            table.append({"layer": layer, "place": place, "stream": stream, **_share(*parts)})
        if on_cell is not None:
            on_cell(done + 1, len(layers))
    return pd.DataFrame(table)


def _corrupted(model: Model, facts: Sequence[Fact], samples: int, noise: float, seed: int) -> _Rows:
    prompts = [
        tokens.Prompt(f.prompt, f.subject, f.target_true) for f in facts for _ in range(samples)
    ]
    batch = tokens.encode(model, prompts)
    starts = [tokens.subject_start(model, p) for p in prompts[::samples]]
    first = torch.tensor(starts, device=model.device).repeat_interleave(samples)
    spread = model.embedding.detach().float().std()
    generator = torch.Generator().manual_seed(seed)
    size = (*batch.ids.shape, model.d_model)
    drawn = torch.randn(size, generator=generator).to(batch.ids.device) * spread * noise
    position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    inside = (position >= first[:, None]) & (position <= batch.subject[:, None])
    return _Rows(batch, first, drawn * inside[..., None])


def _clean_run(
    model: Model, rows: _Rows, stream: Stream, layers: Sequence[int]
) -> tuple[Float[Tensor, " row"], dict[int, Tensor]]:
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def hook(value: Tensor) -> None:
            kept[layer] = value

        return hook

    hooks = [(model.stream_hook(layer, stream), keep(layer)) for layer in layers]
    silent = _Rows(rows.batch, rows.first, torch.zeros_like(rows.noise))
    return _probability(model, silent, hooks), kept


def _probability(
    model: Model, rows: _Rows, hooks: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]]
) -> Float[Tensor, " row"]:
    """Geometric mean of the answer tokens' probabilities, per row."""
    corrupt = (model.stream_hook(0, "resid_pre"), lambda value: value + rows.noise.to(value))
    at = rows.batch.scored.nonzero()
    with torch.no_grad():
        logits = model.forward(rows.batch.ids, rows.batch.mask, hooks=[corrupt, *hooks], at=at)
    labels = rows.batch.labels[at[:, 0], at[:, 1]]
    logp = logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    total = torch.zeros(len(rows.batch), device=logp.device).index_add(0, at[:, 0], logp)
    return (total / torch.bincount(at[:, 0], minlength=len(rows.batch))).exp()


def _place(rows: _Rows, name: str) -> Bool[Tensor, "row token"]:
    position = torch.arange(rows.batch.ids.shape[1], device=rows.batch.ids.device)
    first, subject, last = (x[:, None] for x in (rows.first, rows.batch.subject, rows.batch.last))
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
    return lambda value: torch.where(chosen[..., None], clean, value)


def _share(clean: Tensor, corrupted: Tensor, restored: Tensor) -> dict[str, float | int]:
    """Recovered share, a ratio of means over facts, with a bootstrap interval over facts."""
    gained = (restored - corrupted).double().cpu().numpy()
    lost = (clean - corrupted).double().cpu().numpy()
    low, high = metrics.bootstrap_ratio(gained, lost)
    return {
        "recovered": float(gained.mean() / lost.mean()),
        "ci_low": low,
        "ci_high": high,
        "n": len(gained),
        "p_clean": float(clean.mean()),
        "p_corrupted": float(corrupted.mean()),
    }
