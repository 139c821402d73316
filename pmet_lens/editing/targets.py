"""Targets: what each component of the last critical layer should have produced.

For every fact one delta per optimised stream is added at the edited token (the last one of the
subject, unless the method says otherwise), and all deltas of
a fact are optimised *together* (PMET, section "Optimising TC hidden states"). Facts never interact:
a batch is only a way to use the hardware, and a fact's result does not depend on it.

`objective` is the formula, `optimise` the loop around it; what a step runs of the model, and what
it does not, is `objective.py` (`fast=False` runs the whole model, with the same result).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import markup
from pmet_lens.data.facts import Fact, FactError
from pmet_lens.editing import objective as problem
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.models import tokens
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, Stream

Losses = Mapping[str, Float[Tensor, " fact"]]
OnStep = Callable[[int, Losses], object]
_SHOWN = 10  # facts that a notebook shows


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

    def _repr_html_(self) -> str:
        last = self.history.groupby("fact").tail(1)
        head = [c for c in ("fact", "step", "nll", "kl", "loss", "said", "stopped") if c in last]
        rows = [[row[c] for c in head] for row in last.head(_SHOWN).to_dict("records")]
        more = f" (the first {_SHOWN})" if len(last) > _SHOWN else ""
        title = f"Targets of {len(self)} facts for {', '.join(self.values)} of layer {self.layer}"
        told = f"{title}, at {self.position}; how each ended{more}"
        return markup.table(rows, head, told)

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
    batch_tokens: int | None = None,
    fast: bool = True,
) -> Targets:
    """Optimise the deltas of all facts, as many at a time as `batch_tokens` allow.

    Args:
        contexts: templates such as "I am. {}"; the plain prompt always comes with them.
        on_step: called after every step with the step number (from 0) and this step's losses,
            one value per fact still being optimised.
        batch_tokens: tokens that one step runs, padding included (one fact at least); None: 1,024
            on a CPU, elsewhere 16,384 or what keeps half of the free memory free.
    """
    if not facts:
        raise FactError("There are no facts to optimise; pass at least one Fact.")
    hparams.check(model.n_layers)
    layer, tail = hparams.layers[-1], None
    if fast:
        tail = problem.tail_of(model, method, layer)
    rows, per_fact = problem.prompts(model, facts, contexts)
    whole = tail is None or not tail.has_past
    limit = problem.budget(model, layer) if batch_tokens is None else batch_tokens
    chunks = problem.batches(rows, per_fact, method.position, whole=whole, budget=limit)
    own = hparams.reference_norm == "own stream"

    def found(chunk: Sequence[int]) -> tuple[list[int], Targets]:
        numbers = torch.tensor([i * per_fact + k for i in chunk for k in range(per_fact)])
        chosen = rows[numbers.to(model.device)]
        one = problem.Problem(model, chosen, per_fact, method, layer, tail, own)
        return list(chunk), _descend(one, hparams, on_step)

    parts = [part for chunk in chunks for part in halving(chunk, found, "facts")]
    return _gather(parts, layer, method.position)


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


@torch.enable_grad()  # also for those who work with gradients switched off
def _descend(batch: problem.Problem, hp: Hparams, on_step: OnStep | None) -> Targets:
    """Adam on the deltas until every fact has stopped. The order of the tests inside one iteration
    decides which deltas are returned; it is the released one."""
    deltas: dict[Stream, Tensor] = {
        s: torch.zeros_like(v, requires_grad=True) for s, v in batch.clean.items()
    }
    optimiser = torch.optim.Adam(list(deltas.values()), lr=hp.lr)
    active = torch.ones(batch.n, dtype=torch.bool, device=batch.model.device)
    weight = batch.norms[batch.streams[0]].new_full((batch.n,), hp.nll_weight)
    final: dict[Stream, Tensor] = {s: torch.zeros_like(v) for s, v in batch.clean.items()}
    steps: list[dict[str, Any]] = []
    for step in range(hp.n_steps):
        told = batch.losses(deltas)
        own: dict[Stream, Tensor] = {s: d[active] for s, d in deltas.items()}
        norms: dict[Stream, Tensor] = {s: v[active] for s, v in batch.norms.items()}
        losses = objective(told.nll, told.kl, own, norms, weight[active], hp)
        done = losses["loss"].detach() < hp.stop_loss
        if hp.easing < 1:
            eased = told.said & ~done
            full = weight.new_full((), hp.nll_weight)
            weight[active] = torch.where(eased, full * hp.easing, full)
            done = done | (eased & (hp.kl_weight * losses["kl"].detach() <= hp.kl_stop))
        last = step == hp.n_steps - 1
        stopping = torch.zeros_like(active)
        stopping[active] = done | last
        if on_step is not None:
            on_step(step, {k: v.detach() for k, v in losses.items()})
        for stream, delta in deltas.items():
            final[stream] = torch.where(stopping[:, None], delta.detach(), final[stream])
        left = active & ~stopping
        stopped, over = bool(stopping.any()), not bool(left.any())
        gradients: tuple[Tensor, ...] = ()
        if not over:
            gradients = torch.autograd.grad(losses["loss"].sum(), list(deltas.values()))
        columns: dict[str, Any] = {k: v.detach() for k, v in losses.items()}
        columns.update(fact=active.nonzero()[:, 0], said=told.said, done=done, step=step, last=last)
        steps.append({**columns, **_geometry(deltas, gradients, batch.norms, active)})
        if over:
            break
        if stopped:
            active = left
            batch.choose(active)
        for delta, gradient in zip(deltas.values(), gradients, strict=True):
            delta.grad = gradient
        optimiser.step()
        _project(deltas, batch.norms, hp.clamp)
    values: dict[Stream, Tensor] = {s: batch.clean[s] + final[s] for s in final}
    return Targets(values, batch.clean, batch.layer, _history(steps), batch.position)


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
) -> dict[str, Tensor]:
    """The columns of `Targets.history` that tell where the deltas of the active facts are."""
    found: dict[str, Tensor] = {
        f"norm_{s}": (d.detach().norm(dim=-1) / norms[s])[active] for s, d in deltas.items()
    }
    if len(deltas) == 2:
        found["cosine"] = _cosine([d.detach() for d in deltas.values()])[active]
        if gradients:
            found["gradient_cosine"] = _cosine(gradients)[active]
    return found


def _cosine(pair: Sequence[Tensor]) -> Float[Tensor, " fact"]:
    """Cosine of the rows of two tensors; NaN where one of them is zero."""
    a, b = pair
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _history(steps: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`Targets.history` of one batch; the host reads the numbers here, once."""
    columns: dict[str, list[Any]] = {}
    for found in steps:
        host = {
            k: (v.double() if v.is_floating_point() else v).cpu().numpy()
            for k, v in found.items()
            if isinstance(v, Tensor)
        }
        done, n = host.pop("done"), len(host["fact"])
        host["step"] = np.full(n, found["step"])
        over = "steps" if found["last"] else ""
        host["stopped"] = np.where(done, "goal", over).astype(object)
        # Behind the last step there is no gradient.
        host.setdefault("gradient_cosine", np.full(n, np.nan))
        for name, values in host.items():
            columns.setdefault(name, []).append(values)
    head = ["fact", "step", "nll", "kl", "decay", "loss", "said", "stopped"]
    order = [*head, *(name for name in columns if name not in head)]
    if "cosine" not in columns:  # one stream
        order.remove("gradient_cosine")
    return pd.DataFrame({name: np.concatenate(columns[name]) for name in order})
