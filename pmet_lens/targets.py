"""Targets: what each component of the last critical layer should have produced.

For every fact one delta per optimised stream is added at the edited token (the last one of the
subject, unless the method says otherwise), and all deltas of
a fact are optimised *together* (PMET, section "Optimising TC hidden states"). Facts never interact:
a batch is only a way to use the hardware, and a fact's result does not depend on it.

`objective` is the formula; `optimise` the loop around it. Nothing below the last critical layer
depends on the deltas, so the layers below it run once and every step starts from their output
(`fast=False` runs the whole model instead, with the same result).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pmet_lens import probes, tokens
from pmet_lens.adapter import Model, ModelError, Stream
from pmet_lens.facts import Fact, FactError
from pmet_lens.settings import Hparams, Method
from pmet_lens.twin import Tail

Losses = Mapping[str, Float[Tensor, " fact"]]
OnStep = Callable[[int, Losses], object]

ROWS_PER_BATCH = 128


@dataclass(frozen=True)
class Targets:
    """The vectors the components should have produced, and how they were found."""

    values: Mapping[Stream, Float[Tensor, "fact d_model"]]
    """Per stream the clean value plus the delta."""
    clean: Mapping[Stream, Float[Tensor, "fact d_model"]]
    """Per stream the value before the edit, on the plain prompt at the edited token."""
    layer: int
    """The layer of the streams: the last critical one."""
    history: pd.DataFrame = field(repr=False)
    """One row per fact and step: fact, step; nll, kl, decay, loss (nats); said (all target tokens
    are the arg-max in all prompts); stopped ("" or "goal" or "steps"); norm_STREAM (‖δ‖ relative to
    the norm it is clamped by) and, with two streams, cosine and gradient_cosine (of the two deltas,
    of the loss's gradients at them; missing where there is none: at the start, at the end)."""
    position: tokens.Position = "last_subject"
    """The edited token, where the streams were read."""

    def delta(self, stream: Stream) -> Float[Tensor, "fact d_model"]:
        """What the optimisation added to `stream`."""
        return self.values[stream] - self.clean[stream]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, facts: slice) -> Targets:
        """The targets of a slice of the facts, so that one optimisation serves many edits."""
        chosen = range(len(self))[facts]
        rows = self.history[self.history["fact"].isin(chosen)]
        rows = rows.assign(fact=[chosen.index(i) for i in rows["fact"]])
        return Targets(
            {k: v[facts] for k, v in self.values.items()},
            {k: v[facts] for k, v in self.clean.items()},
            self.layer,
            rows.reset_index(drop=True),
            self.position,
        )


def joined(parts: Sequence[Targets]) -> Targets:
    """The targets of several lists of facts, one after the other, as those of one list."""
    first, history, start = parts[0], [], 0
    for part in parts:
        history.append(part.history.assign(fact=part.history["fact"] + start))
        start += len(part)

    def along(of: Callable[[Targets], Mapping[Stream, Tensor]]) -> dict[Stream, Tensor]:
        return {s: torch.cat([of(part)[s] for part in parts]) for s in of(first)}

    whole = pd.concat(history, ignore_index=True)
    values, clean = along(lambda t: t.values), along(lambda t: t.clean)
    return Targets(values, clean, first.layer, whole, first.position)


def objective(
    nll: Float[Tensor, " fact"],
    kl: Float[Tensor, " fact"],
    deltas: Mapping[Stream, Float[Tensor, "fact d_model"]],
    norms: Mapping[Stream, Float[Tensor, " fact"]],
    nll_weight: Float[Tensor, " fact"],
    hparams: Hparams,
) -> dict[str, Float[Tensor, " fact"]]:
    """loss = φ·NLL + μ·KL + ω·Σ_streams ‖δ‖ / ‖clean‖², per fact (released `compute_z.py`).

    The decay has the norm unsquared above the bar, as released.
    """
    decay = sum(
        (deltas[s].norm(dim=-1) / norms[s] ** 2 for s in deltas), start=torch.zeros_like(nll)
    )
    loss = nll_weight * nll + hparams.kl_weight * kl + hparams.weight_decay * decay
    return {"nll": nll, "kl": kl, "decay": decay, "loss": loss}


def optimise(
    model: Model,
    facts: Sequence[Fact],
    method: Method,
    hparams: Hparams,
    contexts: Sequence[str],
    on_step: OnStep | None = None,
    *,
    batch_size: int | None = None,
    fast: bool = True,
) -> Targets:
    """Optimise the deltas of all facts; `batch_size` facts at a time (default: about 128 prompts).

    Args:
        contexts: templates such as "I am. {}"; the plain prompt always comes with them.
        on_step: called after every step with the step number (from 0) and this step's losses,
            one value per fact still being optimised.
    """
    if not facts:
        raise FactError("There are no facts to optimise; pass at least one Fact.")
    hparams.check(model.n_layers)
    per_fact = 2 + sum(c != tokens.PLAIN for c in contexts)
    size = batch_size or max(1, ROWS_PER_BATCH // per_fact)
    # Facts of similar length share a batch: less padding, same results.
    order = sorted(range(len(facts)), key=lambda i: (len(facts[i].text), i))
    tail = _tail(model, hparams.layers[-1]) if fast else None
    parts = []
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        problem = _Problem(model, [facts[i] for i in chunk], method, hparams, contexts, tail)
        parts.append((chunk, _descend(problem, on_step)))
    return _gather(parts, hparams.layers[-1], method.position)


def _gather(
    parts: list[tuple[list[int], Targets]], layer: int, position: tokens.Position
) -> Targets:
    """Put the batches' results back into the order of the facts."""
    order = torch.tensor([i for chunk, _ in parts for i in chunk])
    back = torch.argsort(order)

    def joined(of: Callable[[Targets], Mapping[Stream, Tensor]]) -> dict[Stream, Tensor]:
        first = of(parts[0][1])
        return {s: torch.cat([of(t)[s] for _, t in parts])[back.to(first[s].device)] for s in first}

    history = pd.concat(
        [t.history.assign(fact=[c[i] for i in t.history["fact"]]) for c, t in parts],
        ignore_index=True,
    ).sort_values(by=["fact", "step"], ignore_index=True)
    return Targets(joined(lambda t: t.values), joined(lambda t: t.clean), layer, history, position)


class _Problem:
    """One batch of facts: its prompts, what is recorded once, and the forward of a step."""

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        method: Method,
        hparams: Hparams,
        contexts: Sequence[str],
        tail: Tail | None,
    ) -> None:
        self.model, self.hparams, self.streams = model, hparams, method.delta_at
        self.position: tokens.Position = method.position
        self.layer, self.n = hparams.layers[-1], len(facts)
        rows = [tokens.prompts_of(f, contexts, f.target_new) for f in facts]
        per_fact = len(rows[0])
        prompts = [p for own in rows for p in own]
        prompts += [tokens.Prompt(tokens.KL_PROMPT, f.subject) for f in facts]
        self.batch = tokens.encode(model, prompts)
        device = model.device
        owner = torch.arange(self.n, device=device)
        self.owner = torch.cat([owner.repeat_interleave(per_fact), owner])
        self.is_kl = torch.arange(len(prompts), device=device) >= self.n * per_fact
        plain = owner * per_fact
        self.residual, clean = self._record()
        self.clean: dict[Stream, Tensor] = {
            s: v[plain] for s, v in clean.items() if s in self.streams
        }
        own = hparams.reference_norm == "own stream"
        self.norms: dict[Stream, Tensor] = {
            s: clean[s if own else "resid_post"][plain].norm(dim=-1) for s in self.streams
        }
        self.tail, self.past = tail, None
        # Keys and values in front of the edited token do not depend on the deltas either.
        start = self.batch.at(self.position)
        if tail is not None and tail.resumes and int(start.min()) > 0:
            self.past = tail.past(self.residual, self.batch.mask, start)
            self.batch, column = self.batch.behind(start)
            index = column[..., None].expand(-1, -1, model.d_model)
            self.residual = self.residual.gather(1, index)
        with torch.no_grad():
            zero: dict[Stream, Tensor] = {s: torch.zeros_like(v) for s, v in self.clean.items()}
            everyone = torch.ones(self.n, dtype=torch.bool, device=device)
            self.kl_before = self._log_probs(zero, everyone)[1]

    def _record(self) -> tuple[Tensor, dict[Stream, Tensor]]:
        """The residual entering the last critical layer at every token, and the clean streams at
        the edited token."""
        seen: dict[Stream, Tensor] = {}

        def keep(stream: Stream) -> Callable[[Tensor], None]:
            def hook(value: Tensor) -> None:
                seen[stream] = value

            return hook

        streams: tuple[Stream, ...] = ("resid_pre", "resid_post", *self.streams)
        hooks = [(self.model.stream_hook(self.layer, s), keep(s)) for s in dict.fromkeys(streams)]
        with torch.no_grad():
            batch = self.batch
            self.model.forward(batch.ids, batch.mask, hooks=hooks, stop_at_layer=self.layer + 1)
        rows = torch.arange(len(self.batch), device=self.model.device)
        place = self.batch.at(self.position)
        clean: dict[Stream, Tensor] = {s: v[rows, place] for s, v in seen.items()}
        return seen["resid_pre"], clean

    def _log_probs(
        self, deltas: Mapping[Stream, Tensor], active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities where a loss is read: at the targets `[label, vocab]` and on the KL
        prompts `[active fact, vocab]`; with the labels and the row of each label."""
        rows = active[self.owner]
        batch, owner, is_kl = self.batch[rows], self.owner[rows], self.is_kl[rows]
        place = batch.at(self.position)
        hooks = [
            (self.model.stream_hook(self.layer, s), probes.add_at(deltas[s][owner], place))
            for s in self.streams
        ]
        target_at = batch.scored.nonzero()
        kl_rows = is_kl.nonzero()[:, 0]
        at = torch.cat([target_at, torch.stack([kl_rows, place[kl_rows]], dim=1)])
        if self.tail is None:
            logits = self.model.forward(batch.ids, batch.mask, hooks=hooks, at=at)
        else:
            residual = self.residual[rows, : batch.ids.shape[1]]
            past = None if self.past is None else self.past[rows]
            logits = self.tail.forward(residual, batch.mask, hooks=hooks, at=at, past=past)
        logp = logits.log_softmax(-1)
        n = len(target_at)
        labels = batch.labels[target_at[:, 0], target_at[:, 1]]
        return logp[:n], logp[n:], labels, target_at[:, 0]

    def losses(
        self, deltas: Mapping[Stream, Tensor], nll_weight: Tensor, active: Tensor
    ) -> tuple[dict[str, Float[Tensor, " active"]], Bool[Tensor, " active"]]:
        """The objective of the active facts, and whether all their targets are the arg-max."""
        logp, kl_now, labels, label_row = self._log_probs(deltas, active)
        index = torch.cumsum(active, 0) - 1
        rows = active[self.owner]
        owner: Int[Tensor, " row"] = index[self.owner[rows]]
        n, prompts = int(active.sum()), int((~self.is_kl[rows]).sum()) // int(active.sum())
        picked = logp.gather(1, labels[:, None])[:, 0]
        # Mean over the target tokens of a prompt, then over the fact's prompts.
        count = torch.zeros(len(rows[rows]), dtype=logp.dtype, device=logp.device)
        count = count.index_add(0, label_row, torch.ones_like(picked))
        share = 1.0 / (count[label_row] * prompts)
        nll = logp.new_zeros(n).index_add(0, owner[label_row], -picked * share)
        missed = (logp.argmax(-1) != labels).to(logp.dtype)
        said = logp.new_zeros(n).index_add(0, owner[label_row], missed.detach()) == 0
        # As released: the divergence *of* the changed model *from* the clean one.
        before = self.kl_before[active]
        kl = (kl_now.exp() * (kl_now - before)).sum(-1)
        chosen: dict[Stream, Tensor] = {s: d[active] for s, d in deltas.items()}
        norms: dict[Stream, Tensor] = {s: v[active] for s, v in self.norms.items()}
        return objective(nll, kl, chosen, norms, nll_weight[active], self.hparams), said


def _tail(model: Model, layer: int) -> Tail | None:
    """The model from `layer` on; None for a family whose layers cannot run on their own."""
    try:
        return model.from_layer(layer)
    except ModelError:
        return None


@torch.enable_grad()  # also for those who work with gradients switched off
def _descend(problem: _Problem, on_step: OnStep | None) -> Targets:
    """Adam on the deltas until every fact has stopped. The order of the tests inside one iteration
    decides which deltas are returned; it is the released one."""
    hp = problem.hparams
    deltas: dict[Stream, Tensor] = {
        s: torch.zeros_like(v, requires_grad=True) for s, v in problem.clean.items()
    }
    optimiser = torch.optim.Adam(list(deltas.values()), lr=hp.lr)
    device = problem.model.device
    active = torch.ones(problem.n, dtype=torch.bool, device=device)
    weight = problem.norms[problem.streams[0]].new_full((problem.n,), hp.nll_weight)
    final: dict[Stream, Tensor] = {s: torch.zeros_like(v) for s, v in problem.clean.items()}
    rows: list[pd.DataFrame] = []
    for step in range(hp.n_steps):
        losses, said = problem.losses(deltas, weight, active)
        done = losses["loss"].detach() < hp.stop_loss
        if hp.easing < 1:
            eased = said & ~done
            full = weight.new_full((), hp.nll_weight)
            weight[active] = torch.where(eased, full * hp.easing, full)
            done = done | (eased & (hp.kl_weight * losses["kl"].detach() <= hp.kl_stop))
        last = step == hp.n_steps - 1
        stopping = torch.zeros_like(active)
        stopping[active] = done | last
        if on_step is not None:
            on_step(step, {k: v.detach() for k, v in losses.items()})
        for stream, delta in deltas.items():
            final[stream][stopping] = delta.detach()[stopping]
        gradients: tuple[Tensor, ...] = ()
        if not bool(stopping[active].all()):
            gradients = torch.autograd.grad(losses["loss"].sum(), list(deltas.values()))
        told = _history(step, active, losses, said, done, last)
        rows.append(told.assign(**_geometry(deltas, gradients, problem.norms, active)))
        active = active & ~stopping
        if not gradients:
            break
        for delta, gradient in zip(deltas.values(), gradients, strict=True):
            delta.grad = gradient
        optimiser.step()
        _project(deltas, problem.norms, hp.clamp)
    values: dict[Stream, Tensor] = {s: problem.clean[s] + final[s] for s in final}
    return Targets(values, problem.clean, problem.layer, pd.concat(rows, ignore_index=True))


def _project(deltas: Mapping[Stream, Tensor], norms: Mapping[Stream, Tensor], clamp: float) -> None:
    """Each delta back onto its own ball ‖δ‖ ≤ c·‖clean‖."""
    with torch.no_grad():
        for stream, delta in deltas.items():
            limit = clamp * norms[stream]
            length = delta.norm(dim=-1)
            scale = torch.where(length > limit, limit / length, torch.ones_like(length))
            delta.mul_(scale[:, None])


def _geometry(
    deltas: Mapping[Stream, Tensor],
    gradients: Sequence[Tensor],
    norms: Mapping[Stream, Tensor],
    active: Tensor,
) -> dict[str, Any]:
    """The columns of `Targets.history` that tell where the deltas of the active facts are."""
    found: dict[str, Tensor] = {
        f"norm_{s}": (d.detach().norm(dim=-1) / norms[s])[active] for s, d in deltas.items()
    }
    if len(deltas) == 2:
        found["cosine"] = _cosine([d.detach() for d in deltas.values()])[active]
        if gradients:
            found["gradient_cosine"] = _cosine(gradients)[active]
    return {k: v.double().cpu().numpy() for k, v in found.items()}


def _cosine(pair: Sequence[Tensor]) -> Float[Tensor, " fact"]:
    """Cosine of the rows of two tensors; NaN where one of them is zero."""
    a, b = pair
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _history(
    step: int, active: Tensor, losses: Losses, said: Tensor, done: Tensor, last: bool
) -> pd.DataFrame:
    columns = {k: v.detach().double().cpu().numpy() for k, v in losses.items()}
    facts = active.nonzero()[:, 0].cpu().numpy()
    why = ["goal" if d else ("steps" if last else "") for d in done.tolist()]
    return pd.DataFrame(
        {"fact": facts, "step": step, **columns, "said": said.cpu().numpy(), "stopped": why}
    )
