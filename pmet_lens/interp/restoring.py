"""The passes of a causal trace: clean, corrupted, and restored from the first block and token that
a restored value reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.interp import passes
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.bridge import Hook, Hooks, Past
from pmet_lens.models.model import Model, ModelError, Stream
from pmet_lens.models.tail import Tail

_TOKENS = 256
"""Of the vocabulary, from which a scale of the embedding is told."""
_SAME = 0.02
"""A scale this near to 1 is rounding (bfloat16) and left out."""
PLACES = ("first subject token", "middle subject tokens", "last subject token", "between", "last")


def _start(model: Model, stream: Stream, window: range) -> int:
    """The first block that sees a change when the stream is restored in these layers."""
    return min(window[0] + (stream == "resid_post"), model.n_layers - 1)


@dataclass(frozen=True)
class Runs:
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
    entering: Mapping[int, Float[Tensor, "row token d_model"]]
    """Layer -> the residual stream that enters it in the corrupted run."""
    tail: Tail | None
    """The blocks from the first of these on; None for a family whose blocks cannot run alone."""
    pasts: dict[tuple[int, ...], Past] = field(default_factory=dict)
    """Numbers of rows and first tokens -> the corrupted keys and values before these."""

    def restored(self, layer: int, chosen: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
        """Probability of the answer with the noise, and clean values around `layer` at `chosen`.

        Only the rows that have such a token run, and only the blocks and tokens from the first
        restored one on: nothing before them changes."""
        rows = chosen.any(1).nonzero()[:, 0]
        if not len(rows):
            return self.corrupted
        probability = self.corrupted.clone()
        probability[rows] = self._run(layer, rows, chosen[rows])
        return probability

    def _run(
        self, layer: int, rows: Int[Tensor, " some"], chosen: Bool[Tensor, "some token"]
    ) -> Float[Tensor, " some"]:
        window, batch = list(self.around[layer]), self.batch[rows]
        width, first = batch.ids.shape[1], _start(self.model, self.stream, self.around[layer])
        tail = None if self.tail is None else self.tail.later(first)
        start, past = torch.zeros_like(rows), None
        if tail is not None and tail.resumes(places := chosen.long().argmax(1), batch.mask):
            before = self._past(rows, places)
            start, past = places, before.of(first - before.first)
        batch, column = batch.after(start)

        def taken(value: Tensor) -> Tensor:
            """Of a recorded stream the rows and tokens that run."""
            value = value[rows, :width].to(column.device)
            return value.gather(1, column[..., None].expand(-1, -1, value.shape[-1]))

        chosen = chosen.gather(1, column)[..., None]

        def restore(n: int, value: Tensor) -> Tensor:
            clean = taken(self.values[n])
            return torch.where(chosen.to(value.device), clean.to(value.device), value)

        with torch.no_grad():
            if tail is None:
                hooks = [self._hook(n, restore) for n in window]
                return _probability(self.model, batch, self.noise[rows, :width], hooks)
            residual = taken(self.entering[first])
            if first > window[0]:  # what the first of them gives is what the next one takes
                residual, window = restore(window[0], residual), window[1:]
            hooks = [self._hook(n, restore) for n in window]

            def logits_at(at: Tensor) -> Tensor:
                return tail.forward(residual, batch.mask, hooks=hooks, at=at, past=past)

            return likelihood.answers_by(logits_at, batch, True).exp()

    def _hook(self, layer: int, restore: Callable[[int, Tensor], Tensor]) -> tuple[str, Hook]:
        return self.model.stream_hook(layer, self.stream), lambda value: restore(layer, value)

    def _past(self, rows: Int[Tensor, " some"], start: Int[Tensor, " some"]) -> Past:
        """Keys and values before the tokens `start`, which every layer's pass shares."""
        key = (*rows.tolist(), *start.tolist())
        if key not in self.pasts:
            assert self.tail is not None
            entering = self.entering[self.tail.first][rows].to(start.device)
            self.pasts[key] = self.tail.past(entering, start)
        return self.pasts[key]

    def by_place(
        self, places: Sequence[str]
    ) -> Iterator[tuple[tuple[int, str], Float[Tensor, "3 fact"]]]:
        """Per layer and place the answer's probability clean, corrupted and restored, means over
        the samples, of the facts that have such a token."""
        parts = passes.parts_of(self.batch)
        for layer in self.around:
            for place in places:
                has = parts[place].any(1)
                restored = self.restored(layer, parts[place])
                values = torch.stack([self.clean, self.corrupted, restored])
                per_fact = values.view(3, -1, self.samples).mean(2)
                yield (layer, place), per_fact[:, has[:: self.samples]]


def asked(model: Model, facts: Sequence[Fact]) -> tokens.Batch:
    """The prompts of facts with their true answers."""
    rows = [tokens.Prompt(f.prompt, f.subject, f.target_true, f.blank) for f in facts]
    return tokens.encode(model, rows)


def run_both(
    model: Model,
    facts: Mapping[int, Fact],
    stream: Stream,
    around: Mapping[int, range],
    samples: int,
    noise: float,
    seed: int,
) -> Runs:
    """Both runs of numbered facts. A fact's noise depends on its number and the seed alone."""
    batch = asked(model, [fact for fact in facts.values() for _ in range(samples)])
    spread = noise * _entering_scale(model) * float(model.embedding.float().std())
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
    starts = {_start(model, stream, window) for window in around.values()}
    entering: dict[int, Tensor] = {}
    hooks = [(model.stream_hook(n, "resid_pre"), passes.keep(entering, n)) for n in starts]
    corrupted = _probability(model, batch, drawn, hooks)
    try:
        tail = model.from_layer(min(starts))
    except ModelError:
        tail = None
    return Runs(
        model, batch, drawn, samples, stream, around, clean, corrupted, values, entering, tail
    )


def _entering_scale(model: Model) -> float:
    """How many times as far apart tokens are where layer 0 reads them as in the embedding: 1, or
    what the model scales its embedding by (Gemma: √d_model)."""
    n = len(model.embedding)
    ids = torch.arange(0, n, max(1, n // _TOKENS), device=model.device)[:, None]
    entering: list[Tensor] = []
    hooks = [(model.stream_hook(0, "resid_pre"), entering.append)]
    with torch.no_grad():
        model.forward(ids, torch.ones_like(ids), hooks=hooks, stop_at_layer=1)
    # Each token stands first: what a position adds is the same for all of them.
    states = entering[0][:, 0].double(), model.embedding[ids[:, 0]].double()
    read, raw = (float((x - x.mean(0)).square().mean().sqrt()) for x in states)
    return 1.0 if abs(read / raw - 1) < _SAME else read / raw


def _probability(
    model: Model, batch: tokens.Batch, noise: Float[Tensor, "row token d_model"], hooks: Hooks
) -> Float[Tensor, " row"]:
    """Geometric mean of the answer tokens' probabilities, with `noise` added to the embeddings."""
    corrupt = (model.stream_hook(0, "resid_pre"), lambda value: value + noise.to(value))
    with torch.no_grad():
        return likelihood.answers(model, batch, [corrupt, *hooks], mean=True).exp()
