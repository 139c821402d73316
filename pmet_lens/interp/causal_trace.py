"""The causal trace: where a fact is recalled.

The subject's tokens are corrupted with noise, so that the answer is lost; then one component's
clean value is put back at one place, and the trace reports how much of the loss comes back (ROME,
arXiv 2202.05262, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.evaluation import metrics
from pmet_lens.interp import passes
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.bridge import Hook, Hooks
from pmet_lens.models.model import Model, Stream

OnCell = Callable[[int, int], object]
PLACES = ("first subject token", "middle subject tokens", "last subject token", "between", "last")


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
    cells: dict[tuple[int, str], list[Tensor]] = {}
    for start in range(0, len(facts), batch_size):
        stop = min(start + batch_size, len(facts))
        numbered = {i: facts[i] for i in range(start, stop)}
        runs = _run(model, numbered, stream, around, samples, noise, seed)
        for cell, values in runs.by_place():
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
    runs = _run(model, {0: fact}, stream, around, samples, noise, seed)
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
    model: Model, layers: Sequence[int] | None, window: int, samples: int
) -> dict[int, range]:
    """For each of `layers` (None: all) those that are restored together."""
    if window < 1 or samples < 1:
        raise FactError("window and samples must be at least 1.")
    layers = range(model.n_layers) if layers is None else layers
    return {n: _window(model.check_layer(n), window, model.n_layers) for n in layers}


def _window(layer: int, width: int, n_layers: int) -> range:
    """`width` layers around `layer` (one more before than after it where `width` is even)."""
    first = layer - width // 2
    return range(max(0, first), min(n_layers, first + width))


@dataclass(frozen=True)
class _Runs:
    """The prompts of some facts, each in one row per noise sample, run clean and corrupted."""

    model: Model
    batch: tokens.Batch
    noise: Float[Tensor, "row token d_model"]
    samples: int
    stream: Stream
    around: Mapping[int, range]
    """Layer -> those that are restored with it."""
    clean: Float[Tensor, " row"]
    """Probability of the answer without noise."""
    corrupted: Float[Tensor, " row"]
    """Probability of the answer with the noise and nothing restored."""
    values: Mapping[int, Float[Tensor, "row token d_model"]]
    """Layer -> the stream in the clean run, where it may be restored."""

    def restored(self, layer: int, chosen: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
        """Probability of the answer with the noise, and clean values around `layer` at `chosen`."""

        def restore(n: int) -> Hook:
            clean = self.values[n]
            return lambda value: torch.where(chosen[..., None].to(value.device), clean, value)

        hooks = [(self.model.stream_hook(n, self.stream), restore(n)) for n in self.around[layer]]
        return _probability(self.model, self.batch, self.noise, hooks)

    def by_place(self) -> Iterator[tuple[tuple[int, str], Float[Tensor, "3 fact"]]]:
        """Per layer and place the answer's probability clean, corrupted and restored, means over
        the samples, of the facts that have such a token."""
        parts = passes.parts_of(self.batch)
        for layer in self.around:
            for place in PLACES:
                has = parts[place].any(1)
                restored = self.restored(layer, parts[place]) if bool(has.any()) else self.corrupted
                values = torch.stack([self.clean, self.corrupted, restored])
                per_fact = values.view(3, -1, self.samples).mean(2)
                yield (layer, place), per_fact[:, has[:: self.samples]]


def _run(
    model: Model,
    facts: Mapping[int, Fact],
    stream: Stream,
    around: Mapping[int, range],
    samples: int,
    noise: float,
    seed: int,
) -> _Runs:
    """Both runs of numbered facts. A fact's noise depends on its number and the seed alone."""
    prompts = [tokens.Prompt(f.prompt, f.subject, f.target_true, f.blank) for f in facts.values()]
    batch = tokens.encode(model, [prompt for prompt in prompts for _ in range(samples)])
    spread = noise * float(model.embedding.float().std())
    drawn = torch.zeros(*batch.ids.shape, model.d_model)
    for k, number in enumerate(facts):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        row = k * samples
        start, stop = int(batch.first[row]), int(batch.subject[row]) + 1
        size = (samples, stop - start, model.d_model)
        drawn[row : row + samples, start:stop] = spread * torch.randn(size, generator=generator)
    drawn = drawn.to(batch.ids.device)
    values: dict[int, Tensor] = {}
    layers = sorted({n for window in around.values() for n in window})
    hooks = [(model.stream_hook(n, stream), passes.keep(values, n)) for n in layers]
    clean = _probability(model, batch, torch.zeros_like(drawn), hooks)
    corrupted = _probability(model, batch, drawn, ())
    return _Runs(model, batch, drawn, samples, stream, around, clean, corrupted, values)


def _probability(
    model: Model, batch: tokens.Batch, noise: Float[Tensor, "row token d_model"], hooks: Hooks
) -> Float[Tensor, " row"]:
    """Geometric mean of the answer tokens' probabilities, with `noise` added to the embeddings."""
    corrupt = (model.stream_hook(0, "resid_pre"), lambda value: value + noise.to(value))
    with torch.no_grad():
        return likelihood.answers(model, batch, [corrupt, *hooks], mean=True).exp()


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
