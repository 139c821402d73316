"""What an edit would cost, before it runs, by counting.

Products with weight matrices count, 2 operations per parameter and token, in the batches the edit
would make, padding included. The products within attention do not: in large models they are small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import get_args

import torch

from pmet_lens.data.facts import Fact, check_editable, listed
from pmet_lens.editing import keys, objective, solvers
from pmet_lens.editing.edits import Editor
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import resolved, settled
from pmet_lens.models import generation, likelihood, tokens
from pmet_lens.models.model import Model, Projection, Site


@dataclass(frozen=True)
class Estimate:
    """Operations (floating-point; a multiplication and an addition are two) and memory (bytes)."""

    facts: int
    """How many facts the numbers are for."""
    step: float
    """Operations of one optimisation step of all facts, forward and backward."""
    whole_step: float
    """The same done plainly, fact by fact: the whole model on whole prompts, logits everywhere."""
    record: float
    """Operations before the first step: what no step changes is run once and kept."""
    targets: float
    """Operations of the optimisation, `record` and all steps; a bound, as facts stop early."""
    keys: float
    """Operations of reading keys and values at every site that is written."""
    solve: float
    """Operations of the solves; factors and eigenvectors of second moments are taken as kept."""
    weights: int
    """Bytes of the model's parameters."""
    activations: int
    """Bytes that the largest batch of a step keeps for its backward pass; a generous guess."""
    moment: int
    """Bytes of the largest site's second moment and its factor, in float64."""
    host: int
    """Bytes of the residual streams that are kept, of the thin factors of all sites, and, where
    those of so many facts are larger than the weights, of all facts at one site."""

    @property
    def total(self) -> float:
        """Operations of the whole edit."""
        return self.targets + self.keys + self.solve

    @property
    def peak(self) -> int:
        """Bytes on the model's device: the weights, and the larger of activations and moment."""
        return self.weights + max(self.activations, self.moment)

    def seconds(self, rate: float) -> float:
        """How long the edit takes at `rate` operations per second (FLOP/s)."""
        return self.total / rate

    def __str__(self) -> str:
        ratio = f"   (the plain one: {self.whole_step / self.step:.1f} times that)"
        more = {"step": ratio, "targets": "   (at most)", "activations": "   (about)"}
        counted = ("step", "targets", "keys", "solve", "total")
        kept = ("weights", "activations", "moment", "peak", "host")
        lines = (f"{n:<12}{scaled(getattr(self, n))}{more.get(n, '')}" for n in (*counted, *kept))
        return "\n".join([f"{'facts':<12}{self.facts:>8,}", *lines])


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a model are: all that counting needs beside tokens."""

    blocks: tuple[int, ...]
    """Parameters in the matrices of every block."""
    last_mlp: int
    """Of these, those of the last MLP; 0: it is no separate module."""
    embedding: int
    """Entries of the token embeddings."""
    d_model: int
    d_in: Mapping[Projection, int]
    """Length of the keys of a projection."""
    weights: int
    """Bytes of all parameters."""


def sizes_of(model: Model) -> Sizes:
    """The sizes of a model."""
    blocks, last_mlp = _matrices(model)
    d_in = {p: model.d_in(Site(0, p)) for p in get_args(Projection)}
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    embedding = model.embedding.numel()
    return Sizes(tuple(blocks), last_mlp, embedding, model.d_model, d_in, weights)


def estimate(
    model: Model,
    facts: Fact | Sequence[Fact],
    method: Method | Editor | str = "PMET",
    hparams: Hparams | None = None,
    contexts: Sequence[str] | None = None,
    *,
    n_facts: int | None = None,
    sizes: Sizes | None = None,
) -> Estimate:
    """What `edit` of these facts would cost. Nothing is optimised, and no weight is changed.

    `facts` may be a sample: the numbers are for `n_facts` of the same mean length (None: these).
    `sizes`: of a larger model of the same family and depth, for which `model` stands in.
    Raises `FactError` and `SettingsError` as `edit` does, and the latter for gradient methods.
    """
    facts, method = listed(facts), resolved(method)
    check_editable(facts)
    if not isinstance(method, Method):
        raise SettingsError(f"There is no estimate for {type(method).__name__}, a gradient method.")
    if (n := len(facts) if n_facts is None else n_facts) < 1:
        raise SettingsError(f"n_facts must be at least 1, not {n}.")
    hp = settled(model, method, hparams, n)
    hp.check(model.n_layers)
    contexts = generation.contexts_of(model, contexts)
    sizes = sizes_of(model) if sizes is None else sizes
    count, size = _Count(model, method, hp, sizes), method.at_once or len(facts)
    for start in range(0, len(facts), size):
        count.add(facts[start : start + size], contexts)
    scale, together = n / len(facts), min(n, method.at_once or n)
    # Of a larger edit a batch is as full as tokens and logits allow.
    budget, readable = objective.budget(model, hp.layers[-1]), likelihood.readable(model, copies=2)
    filled = min(budget / count.ran, readable / count.read)
    full = count.values * min(together / len(facts), filled)
    streams = count.kept * together / len(facts) * sizes.d_model * model.dtype.itemsize
    again = max(0.0, 1 - keys.KEPT_BYTES / streams) if streams else 0.0  # what is not kept
    d_in = [sizes.d_in[p] for _ in hp.layers for p in method.write]
    wider = sizes.d_model / model.d_model  # what a token keeps grows with the width
    return Estimate(
        facts=n,
        step=2 * count.step * scale,
        whole_step=2 * count.whole * scale,
        record=2 * count.record * scale,
        targets=2 * (count.record + hp.n_steps * count.step) * scale,
        keys=2 * (count.keys + again * (count.anew - count.keys)) * scale,
        solve=sum(min(solvers.operations(together, d).values()) for d in d_in) * n / together,
        weights=sizes.weights,
        activations=round(max(count.largest, full) * wider * model.dtype.itemsize),
        moment=2 * 8 * max(d_in) ** 2,
        host=round(min(streams, keys.KEPT_BYTES)) + _factors(n, d_in, sizes.d_model),
    )


def _factors(n: int, d_in: Sequence[int], d_model: int) -> int:
    """Bytes, in float64; a site that is solved for has rank d_model at most (`edit_files.thin`)."""
    kept = min(n, d_model) * sum(d + d_model for d in d_in)
    return 8 * (kept + (n * (max(d_in) + d_model) if n > d_model else 0))


class _Count:
    """Sums over facts: parameters × tokens (half the operations), tokens, and kept values."""

    def __init__(self, model: Model, method: Method, hp: Hparams, sizes: Sizes) -> None:
        self.model, self.method, self.hp, self.layer = model, method, hp, hp.layers[-1]
        self.tail = objective.tail_of(model, method, self.layer)
        self.first = 0 if self.tail is None else self.tail.first
        self.blocks, self.last_mlp, self.embedding = sizes.blocks, sizes.last_mlp, sizes.embedding
        self.above = self.blocks[max(self.first, self.layer) :]  # with a gradient
        self.step = self.whole = self.record = self.keys = self.anew = 0
        self.ran = self.read = self.values = self.largest = self.kept = 0

    def add(self, facts: Sequence[Fact], contexts: Sequence[str]) -> None:
        """Facts edited together: the batches of `targets.optimise`, then `keys.Reader`."""
        rows, per_fact = objective.prompts(self.model, facts, contexts)
        whole, at = self.tail is None or not self.tail.has_past, self.method.position
        budget = objective.budget(self.model, self.layer)
        chunks = objective.batches(self.model, rows, per_fact, at, whole=whole, budget=budget)
        self.read += int(objective.read_by(rows, per_fact).sum())
        for chunk in chunks:
            numbers = objective.rows_of(chunk, per_fact)
            self._batch(rows[numbers.to(self.model.device)], len(chunk))
        both = sum(self.blocks + self.above) + 2 * self.embedding
        self.whole += both * per_fact * int(rows.mask.sum(1).view(-1, per_fact).amax(1).sum())
        self._read(rows.at(at).view(-1, per_fact)[:, :-1] + 1)  # not the KL prompt

    def _batch(self, rows: tokens.Batch, facts: int) -> None:
        """One `objective.Objective` and one of its steps."""
        (n, width), start = rows.ids.shape, rows.at(self.method.position)
        past, alone, last, above = 0, False, self.tail, self.tail
        told = objective.told_by_plain(self.model, rows, n // facts, self.method.position)
        left, lengths = n - int(told.sum()), rows.mask.sum(1)
        if last is not None and last.resumes(start, rows.mask):
            past, lengths = int(start.max()), lengths - start
            above = self.model.from_layer(self.layer + 1)
            alone = self.first == self.layer and above.has_past
        lengths.view(facts, -1)[told, -1] = 0
        width = int(lengths.max())
        if alone := alone and left * width > objective.FEW_TOKENS:
            last = above
        ran, scored = left * width, int(rows.scored.sum()) + facts
        hooked = last is not None and last.first == self.layer
        unwrapped = None if last is None else last.unwrapped
        forward = sum(self.blocks[self.first :]) * ran + self.embedding * scored
        if alone:  # the layer itself, for the edited token
            forward -= self.blocks[self.layer] * (ran - left)
        if unwrapped is not None and (unwrapped.hooks or not hooked):
            forward -= self.last_mlp * (ran - scored)
        self.step += 2 * forward - sum(self.blocks[self.first : self.layer]) * ran
        self.record += sum(self.blocks[: self.layer + 1]) * rows.ids.numel()
        self.record += sum(self.blocks[self.first :]) * n * past
        values = objective.values_per_token(self.model, self.layer) * ran
        values += 4 * self.model.d_model * n * past * len(self.above)
        values += 3 * self.model.embedding.shape[0] * scored
        self.ran, self.values = self.ran + ran, self.values + values
        self.largest = max(self.largest, values)

    def _read(self, lengths: torch.Tensor) -> None:
        """The walk of `keys.Reader` over every fact's rows `[fact, row]`, layer after layer."""
        limit = keys.TOKENS_ON_CPU if lengths.device.type == "cpu" else keys.TOKENS_ELSEWHERE
        every = plain = at = 0
        for chunk in tokens.chunks(lengths.amax(1).tolist(), limit // lengths.shape[1]):
            every += lengths[chunk].numel() * int(lengths[chunk].max())
            plain += len(chunk) * int(lengths[chunk, 0].max())
        for layer in [layer for layer in self.hp.layers for _ in self.method.write]:
            if self.tail is not None:
                self.keys += sum(self.blocks[at:layer]) * every
                at = layer
            self.keys += sum(self.blocks[at : layer + 1]) * every
            self.keys += sum(self.blocks[at : self.layer + 1]) * plain
            self.anew += sum(self.blocks[: layer + 1]) * every
            self.anew += sum(self.blocks[: self.layer + 1]) * plain
        self.kept += every if at > 0 else 0


def _matrices(model: Model) -> tuple[list[int], int]:
    """Parameters in the matrices of every block, and of the last MLP (0: no separate module)."""
    sizes = {name: p.numel() for name, p in model.hf.named_parameters() if p.ndim == 2}
    blocks, mlp = [0] * model.n_layers, 0
    for layer in range(model.n_layers):
        before, number, rest = model.parameter_name(Site(layer, "mlp")).partition(f".{layer}.")
        inside = {name: n for name, n in sizes.items() if name.startswith(before + number)}
        blocks[layer], part = sum(inside.values()), f"{before}{number}{rest.split('.')[0]}."
        mlp = sum(n for name, n in inside.items() if name.startswith(part) and rest.count(".") > 1)
    return blocks, mlp


def scaled(value: float | int) -> str:
    """Operations (a float) or bytes (an int) in the largest unit of which there is at least one."""
    base, unit = (1024, "iB") if isinstance(value, int) else (1000, "FLOP")
    power = min(int(log(max(value, 1), base) + 1e-9), 5)
    return f"{value / base**power:>8.1f} {(' KMGTP'[power] + unit).replace(' i', '').strip()}"
