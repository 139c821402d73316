"""The loss that the deltas of a fact are optimised by, and how a step computes it.

`loss_terms` is the formula. Nothing below the last critical layer L depends on the deltas, and
above it only the tokens from the edited one on do. So an `Objective` records once the residual
stream at L, and the keys and values of the earlier tokens above L; a step runs the *tail* of the
model on the *suffix* of every prompt, and the unembedding only where a loss is read. The layer L
itself runs for the edited token alone, or, where the streams enter its output as they are (parallel
blocks, or a delta on `mlp_out` alone), not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import STREAM_OF, Hparams, Method, streams_of
from pmet_lens.models import activations, likelihood, memory, tokens
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model, ModelError, Site, Stream
from pmet_lens.models.tail import Tail
from pmet_lens.models.tokens import Position

TOKENS_ON_CPU, TOKENS_ELSEWHERE = 1024, 16384
"""Tokens of a step, padding included: what fits a CPU's cache, what fills an accelerator."""
PADDING_ON_CPU = 64
"""Tokens of padding in a step of a large model, beyond which a step of its own costs less."""
FEW_TOKENS = 256
"""Up to so many, running layer L for the edited token alone costs more than it saves."""
FEW_PARAMETERS = 10_000_000
"""In a smaller model rows and padding cost next to nothing, and all of them run."""


def loss_terms(
    nll: Float[Tensor, " fact"],
    kl: Float[Tensor, " fact"],
    deltas: Mapping[Stream, Float[Tensor, "fact d_model"]],
    norms: Mapping[Stream, Float[Tensor, " fact"]],
    nll_weight: Float[Tensor, " fact"],
    hparams: Hparams,
) -> dict[str, Float[Tensor, " fact"]]:
    """loss = φ·NLL + μ·KL + ω·Σ_streams ‖δ‖ / ‖clean‖², per fact (released `compute_z.py`; the norm
    above the bar is not squared, as released)."""
    decay = sum(
        (deltas[s].norm(dim=-1) / norms[s] ** 2 for s in deltas), start=torch.zeros_like(nll)
    )
    loss = nll_weight * nll + hparams.kl_weight * kl + hparams.weight_decay * decay
    return {"nll": nll, "kl": kl, "decay": decay, "loss": loss}


@dataclass(frozen=True)
class Losses:
    """What a step reads, per active fact."""

    nll: Float[Tensor, " fact"]
    """−log P per target token, mean over the tokens of a prompt, then over prompts run; nats."""
    kl: Float[Tensor, " fact"]
    """Of the changed from the clean distribution after "{} is a", nats."""
    each: Float[Tensor, "fact prompt"]
    """The nll of every prompt that was run; no gradients."""
    said: Bool[Tensor, "fact prompt"]
    """Whether every target token of the prompt is the argmax."""


def prompts(
    model: Model, facts: Sequence[Fact], contexts: Sequence[str]
) -> tuple[tokens.Batch, int]:
    """The rows of all facts, each fact's side by side (plain prompt, prefixed ones, KL prompt), and
    how many each has."""
    rows: list[tokens.Prompt] = []
    for fact in facts:
        rows += tokens.prompts_of(fact, contexts, fact.target_new)
        rows.append(tokens.Prompt(tokens.KL_PROMPT, fact.subject))
    return tokens.encode(model, rows), len(rows) // len(facts)


def rows_of(facts: Sequence[int], per_fact: int) -> Int[Tensor, " row"]:
    """The numbers of the rows of these facts, where each fact has `per_fact` of them."""
    return (torch.tensor(facts)[:, None] * per_fact + torch.arange(per_fact)).flatten()


def batches(
    model: Model, rows: tokens.Batch, per_fact: int, position: Position, *, whole: bool, budget: int
) -> list[list[int]]:
    """The numbers of the facts that share a batch: as many of similar length as `budget` tokens
    allow, padding included, and as the logits that a step reads (`read_by`) do. `whole`: count
    whole prompts, else what a step runs."""
    lengths = rows.mask.sum(1)
    run = lengths if whole else lengths - rows.at(position)
    longest = run.view(-1, per_fact).amax(1).tolist()
    total = lengths.view(-1, per_fact).amax(1).tolist()
    reads, most = read_by(rows, per_fact).tolist(), likelihood.readable(model, copies=2)
    pad = PADDING_ON_CPU // per_fact if large(model) and model.device.type == "cpu" else None
    at_once = budget // per_fact
    return tokens.chunks(longest, at_once, total, reads=reads, readable=most, padding=pad)


def read_by(rows: tokens.Batch, per_fact: int) -> Int[Tensor, " fact"]:
    """At how many tokens a step reads the logits of each fact: those of its targets, and one of its
    KL prompt."""
    return rows.scored.sum(1).view(-1, per_fact).sum(1) + 1


def told_by_plain(
    model: Model, rows: tokens.Batch, per_fact: int, position: Position
) -> Bool[Tensor, " fact"]:
    """Whether the KL prompt has the tokens of the plain one up to `position`, which nothing later
    changes: then the plain row tells the divergence, too, and the other one rests. Not where a
    target is read there as well: a token read twice would have twice its gradient."""
    kept = (rows.ids, rows.at(position), rows.scored)
    ids, place, scored = (v.view(len(v) // per_fact, per_fact, -1) for v in kept)
    later = torch.arange(ids.shape[2], device=ids.device) > place[:, 0]
    same = ((ids[:, 0] == ids[:, -1]) | later).all(1) & (place[:, 0] == place[:, -1])[:, 0]
    return same & ~scored[:, 0].gather(1, place[:, 0])[:, 0] & large(model)


def large(model: Model) -> bool:
    """Whether a step waits for products, not for Python: `FEW_PARAMETERS` or more."""
    return sum(p.numel() for p in model.hf.parameters()) >= FEW_PARAMETERS


def budget(model: Model, layer: int, free: int | None = None) -> int:
    """Tokens of a step with deltas at `layer`, by default: what suits the device, and no more
    than keeps half of its `free` memory (bytes; None: ask the device)."""
    free = memory.free(model.device) if free is None else free
    if free is None:
        return TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS_ELSEWHERE
    fitting = free // 2 // (values_per_token(model, layer) * model.dtype.itemsize)
    return max(FEW_TOKENS, min(TOKENS_ELSEWHERE, fitting))


def values_per_token(model: Model, layer: int) -> int:
    """Numbers kept per token of a step for the backward pass from `layer` on; a generous guess."""
    d_in = model.d_in(Site(layer, "mlp"))
    return (10 * model.d_model + 4 * d_in) * (model.n_layers - layer)


def tail_of(model: Model, method: Method, layer: int) -> Tail | None:
    """The part of the model that a step runs; None for a family whose blocks cannot run alone."""
    unchanged = all(model.enters_output(stream) for stream in streams_of(model, method))
    try:
        return model.from_layer(layer + 1 if unchanged else layer)
    except ModelError:
        return None


class Objective:
    """The facts of one batch. `losses` runs the facts last given to `choose` (at first all)."""

    def __init__(
        self,
        model: Model,
        rows: tokens.Batch,
        per_fact: int,
        method: Method,
        hparams: Hparams,
        tail: Tail | None,
    ) -> None:
        self.model, self.method, self.streams = model, method, streams_of(model, method)
        self.position: Position = method.position
        self.layer, self.tail, self.per_fact = hparams.layers[-1], tail, per_fact
        self.n = len(rows) // per_fact
        residual, output, clean = self._record(rows)
        plain = torch.arange(self.n, device=model.device) * per_fact
        self.clean: dict[Stream, Tensor] = {s: clean[s][plain] for s in self.streams}
        of_layer = hparams.reference_norm == "resid_post"
        self.norms: dict[Stream, Tensor] = {
            s: clean["resid_post" if of_layer else s][plain].norm(dim=-1) for s in self.streams
        }
        if of_layer:
            self.norms = {s: self._as_written(s, norm) for s, norm in self.norms.items()}
        past = None
        start = rows.at(self.position)
        self._told_by_plain = told_by_plain(model, rows, per_fact, self.position)
        self._above: Tail | None = None
        if tail is not None and tail.resumes(start, rows.mask):
            past = tail.past(residual, start)
            rows, column = rows.after(start)
            column = column[..., None].expand(-1, -1, model.d_model)
            edited = residual.gather(1, column[:, :1])
            if tail.first == self.layer and (above := model.from_layer(tail.first + 1)).has_past:
                self._above, self._edited, self._output = above, edited, output.gather(1, column)
            residual = residual.gather(1, column)
        self._all = (rows, residual, past)
        self._kl_before: Tensor | None = None
        self.choose(torch.ones(self.n, dtype=torch.bool, device=model.device))

    def choose(self, active: Bool[Tensor, " fact"], asked: Sequence[int] | None = None) -> None:
        """Only these facts from now on, and of each the KL prompt and only these of the others (0:
        the plain one; None: all): the remaining rows leave the batch."""
        rows, residual, past = self._all
        asked = range(self.per_fact - 1) if asked is None else asked
        self._active, self._asked = active, len(asked)
        run = torch.zeros(self.n, self.per_fact, dtype=torch.bool, device=active.device)
        run[:, list(asked)] = True
        run[:, -1] = ~self._told_by_plain if 0 in asked else True
        chosen = (run & active[:, None]).flatten().nonzero()[:, 0]
        self._chosen, self._rows, self._fact_of_row = chosen, rows[chosen], chosen // self.per_fact
        self._residual = residual[chosen, : self._rows.ids.shape[1]]
        self._past = None if past is None else past[chosen]
        scored = self._rows.scored.nonzero()
        self._labels = self._rows.labels[scored[:, 0], scored[:, 1]]
        # Rows with targets stand in the order of facts and prompts.
        self._prompt_of_label = scored[:, 0].unique_consecutive(return_inverse=True)[1]
        self._fact_of_label = self._prompt_of_label // self._asked
        # Mean over the target tokens of a prompt, then over the fact's prompts.
        self._per_prompt = torch.bincount(self._prompt_of_label)
        self._share = 1.0 / (self._per_prompt[self._prompt_of_label].double() * self._asked)
        of_kl = active.nonzero()[:, 0] * self.per_fact + (self.per_fact - 1) * run[active, -1]
        row = torch.searchsorted(chosen, of_kl)
        self._place = self._rows.at(self.position)
        self._at = torch.cat([scored, torch.stack([row, self._place[row]], dim=1)])

    def _as_written(self, stream: Stream, norm: Float[Tensor, " fact"]) -> Float[Tensor, " fact"]:
        """A length in the residual stream as one of what the projection writes before its norm."""
        sites = [Site(self.layer, p) for p, written in STREAM_OF.items() if written == stream]
        road = activations.road(self.model, sites[0]) if sites else None
        if road is None:
            return norm
        clean = self.clean[stream]
        return norm * (clean.norm(dim=-1) / road.reached(clean).norm(dim=-1)).to(norm)

    def losses(self, deltas: Mapping[Stream, Float[Tensor, "fact d_model"]]) -> Losses:
        """Of the chosen facts, with the deltas (one per fact of the batch) added; the first time of
        all, with deltas of 0."""
        logp, kl_now = self._log_probs(deltas)
        n, of_prompt = len(kl_now), self._prompt_of_label
        picked = likelihood.of_labels(logp, self._labels)
        nll = likelihood.row_sums(-picked * self._share.to(logp), self._fact_of_label, n)
        missed = (logp.detach().argmax(-1) != self._labels).to(logp.dtype)
        said = likelihood.row_sums(missed, of_prompt, n * self._asked) == 0
        each = likelihood.row_sums(-picked.detach(), of_prompt, n * self._asked) / self._per_prompt
        if self._kl_before is None:
            self._kl_before = kl_now.detach()
        # As released: the divergence *of* the changed model *from* the clean one.
        before = self._kl_before[self._active]
        kl = (kl_now.exp() * (kl_now - before)).sum(-1)
        return Losses(nll, kl, each.view(n, -1), said.view(n, -1))

    def _log_probs(self, deltas: Mapping[Stream, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities where a loss is read: at the targets `[label, vocab]` and on the KL
        prompts `[fact, vocab]`."""
        rows, tail = self._rows, self.tail
        if tail is not None and tail.first > self.layer:
            whole = torch.stack([deltas[s] for s in self.streams]).sum(0)[self._fact_of_row]
            entry = self.model.stream_hook(tail.first, "resid_pre")
            hooks = [(entry, activations.add_at(whole, self._place))]
        else:
            names = [self.model.stream_hook(self.layer, s) for s in self.streams]
            added = [deltas[s][self._fact_of_row] for s in self.streams]
            adds = [activations.add_at(each, self._place) for each in added]
            hooks = list(zip(names, adds, strict=True))
        if tail is None:
            logits = self.model.forward(rows.ids, rows.mask, hooks=hooks, at=self._at)
        elif self._above is not None and self._past is not None and rows.ids.numel() > FEW_TOKENS:
            below, above = self._past.of(0, 1), self._past.of(1)
            first, stop = rows.mask[:, :1], self.layer + 1
            edited = self._edited[self._chosen]
            output = tail.forward(edited, first, hooks=hooks, past=below, stop_at_layer=stop)
            later = self._output[self._chosen, 1 : rows.ids.shape[1]]
            residual = torch.cat([output, later], dim=1)
            logits = self._above.forward(residual, rows.mask, at=self._at, past=above)
        else:
            logits = tail.forward(
                self._residual, rows.mask, hooks=hooks, at=self._at, past=self._past
            )
        logp = likelihood.log_probs(logits)
        n = len(self._labels)
        return logp[:n], logp[n:]

    def _record(self, rows: tokens.Batch) -> tuple[Tensor, Tensor, dict[Stream, Tensor]]:
        """The residual entering the tail and the output of L at every token, and the clean streams
        at the edited token."""
        seen: dict[Stream, Tensor] = {}
        streams: tuple[Stream, ...] = ("resid_pre", "resid_post", *self.streams)
        hooks: list[tuple[str, Hook]] = [
            (
                self.model.stream_hook(self.layer, s),
                lambda value, s=s: seen.update({s: value.to(self.model.device)}),
            )
            for s in dict.fromkeys(streams)
        ]
        with torch.no_grad():
            self.model.forward(rows.ids, rows.mask, hooks=hooks, stop_at_layer=self.layer + 1)
        number = torch.arange(len(rows), device=self.model.device)
        place = rows.at(self.position)
        clean: dict[Stream, Tensor] = {
            s: likelihood.at_least_float32(v[number, place]) for s, v in seen.items()
        }
        for stream, value in clean.items():
            activations.check_finite(value, f"{stream} of layer {self.layer}")
        above = self.tail is not None and self.tail.first > self.layer
        output = seen["resid_post"]
        return output if above else seen["resid_pre"], output, clean
