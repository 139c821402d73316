"""Targets: what each component of the last critical layer should have produced.

For every fact one delta per optimised stream is added at the edited token (the last one of the
subject, unless the method says otherwise), and all deltas of a fact are optimised *together* (PMET,
section "Optimising TC hidden states"). Facts never interact: a batch is only a way to use the
hardware, and a fact's result does not depend on it. The loss is `objective.loss_terms`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import SGD, Adam

from pmet_lens.data import markup
from pmet_lens.data.facts import Fact, FactError
from pmet_lens.editing import objective
from pmet_lens.editing.method import Hparams, Method, SettingsError, optimised
from pmet_lens.models import tokens
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, Stream

OnStep = Callable[[int, Mapping[str, Float[Tensor, " fact"]]], object]
_SHOWN = 10  # facts that a notebook shows


@dataclass(frozen=True)
class Targets:
    """The vectors the components should have produced, and how they were optimised."""

    values: Mapping[Stream, Float[Tensor, "fact d_model"]]
    """Per stream the clean value plus the delta."""
    clean: Mapping[Stream, Float[Tensor, "fact d_model"]]
    """Per stream the value before the edit, on the plain prompt at the edited token."""
    layer: int
    """The layer of the streams: the last critical one."""
    history: pd.DataFrame = field(repr=False)
    """One row per fact and step: fact, step; nll, kl, decay, loss (nats); said (all target tokens
    are the argmax in all prompts); stopped ("" or "goal" or "steps"); norm_STREAM (‖δ‖ relative to
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
        return markup.table(rows, head, f"{title}, at {self.position}; how each ended{more}")

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, facts: int | slice | Sequence[int]) -> Targets:
        """The targets of some of the facts (or of one), in this order, so that one optimisation
        serves many edits."""
        facts = [facts] if isinstance(facts, int) else facts
        chosen = list(range(len(self))[facts]) if isinstance(facts, slice) else list(facts)
        rows = self.history[self.history["fact"].isin(chosen)]
        rows = rows.assign(fact=list(map({f: n for n, f in enumerate(chosen)}.get, rows["fact"])))
        rows = rows.sort_values(by=["fact", "step"], kind="stable", ignore_index=True)
        values = {s: v[chosen] for s, v in self.values.items()}
        clean = {s: v[chosen] for s, v in self.clean.items()}
        return replace(self, values=values, clean=clean, history=rows)


def joined(parts: Sequence[Targets]) -> Targets:
    """The targets of several lists of facts, one after the other, as those of one list."""
    first, history, start = parts[0], [], 0
    for part in parts:
        history.append(part.history.assign(fact=part.history["fact"] + start))
        start += len(part)
    values = {s: torch.cat([part.values[s] for part in parts]) for s in first.values}
    clean = {s: torch.cat([part.clean[s] for part in parts]) for s in first.clean}
    whole = pd.concat(history, ignore_index=True)
    return replace(first, values=values, clean=clean, history=whole)


@torch.inference_mode(False)
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
        batch_tokens: tokens that one step runs, padding included (one fact at least; fewer where
            their logits would be too many); None: 1,024 on a CPU, elsewhere 16,384 or what keeps
            half of the free memory free.
        fast: run only what depends on the deltas; else, with the same result, the whole model.
    """
    if not facts:
        raise FactError("There are no facts to optimise; pass at least one Fact.")
    hparams = hparams.settled(method, len(facts))
    hparams.check(model.n_layers)
    layer = hparams.layers[-1]
    tail = objective.tail_of(model, method, layer) if fast else None
    rows, per_fact = objective.prompts(model, facts, contexts)
    limit = objective.budget(model, layer) if batch_tokens is None else batch_tokens
    at, whole = method.position, tail is None or not tail.has_past
    chunks = objective.batches(model, rows, per_fact, at, whole=whole, budget=limit)

    def targets_of(chunk: Sequence[int]) -> Targets:
        chosen = rows[objective.rows_of(chunk, per_fact).to(model.device)]
        batch = objective.Objective(model, chosen, per_fact, method, hparams, tail)
        return _descend(batch, hparams, on_step)

    parts = [part for chunk in chunks for part in halving(chunk, targets_of, "facts")]
    order = [fact for chunk in chunks for fact in chunk]
    return joined(parts)[torch.tensor(order).argsort().tolist()]


@torch.enable_grad()  # also for those who work with gradients switched off
def _descend(batch: objective.Objective, hp: Hparams, on_step: OnStep | None) -> Targets:
    """Steps on the deltas until every fact has stopped. The order of the tests inside one iteration
    decides which deltas are returned; it is the released one."""
    deltas: dict[Stream, Tensor] = {
        s: torch.zeros_like(v, requires_grad=True) for s, v in batch.clean.items()
    }
    falling, moved = hp.step_rule == "falling", list(deltas.values())
    optimiser = SGD(moved, 1.0, 0.5, 0.5) if falling else Adam(moved, hp.lr)
    active = torch.ones(batch.n, dtype=torch.bool, device=batch.model.device)
    weight = batch.norms[batch.streams[0]].new_full((batch.n,), hp.nll_weight)
    final: dict[Stream, Tensor] = {s: torch.zeros_like(v) for s, v in batch.clean.items()}
    steps: list[dict[str, Any]] = []
    newest = weight.new_full((batch.n, n_prompts := batch.per_fact - 1), math.nan)
    said = torch.zeros_like(newest, dtype=torch.bool)
    for step in range(hp.n_steps):
        asked = hp.asked(step, n_prompts)
        if some := len(asked) < n_prompts:
            batch.choose(active, asked)
        read = batch.losses(deltas)
        at = active.nonzero(), torch.tensor(asked, device=active.device)
        newest[at], said[at] = read.each.to(newest), read.said
        chosen: dict[Stream, Tensor] = {s: d[active] for s, d in deltas.items()}
        norms: dict[Stream, Tensor] = {s: v[active] for s, v in batch.norms.items()}
        losses = objective.loss_terms(read.nll, read.kl, chosen, norms, weight[active], hp)
        columns: dict[str, Any] = {k: v.detach() for k, v in losses.items()}
        if some:  # whether a fact is done is for all of its prompts to tell
            mean = newest[active].nanmean(1)
            columns["loss"] = columns["loss"] + weight[active] * (mean - columns["nll"])
            columns["nll"] = mean
        all_said = said[active].all(1)
        done = (columns["loss"] < hp.stop_loss) & ~newest[active].isnan().any(1)
        if hp.easing < 1:
            eased = all_said & ~done
            full = weight.new_full((), hp.nll_weight)
            weight[active] = torch.where(eased, full * hp.easing, full)
            done = done | (eased & (hp.kl_weight * columns["kl"] <= hp.kl_stop))
        done = done & (_attn_left(batch.method, step, hp.n_steps) in (0, math.inf))
        last = step == hp.n_steps - 1
        stopping = torch.zeros_like(active)
        stopping[active] = done | last
        if on_step is not None:
            on_step(step, dict(columns))
        for stream, delta in deltas.items():
            final[stream] = torch.where(stopping[:, None], delta.detach(), final[stream])
        stopped, over = bool(stopping.any()), not bool((left := active & ~stopping).any())
        gradients: tuple[Tensor, ...] = ()
        if not over:
            gradients = torch.autograd.grad(losses["loss"].sum(), list(deltas.values()))
        columns.update(fact=active.nonzero()[:, 0], step=step, said=all_said)
        columns.update(done=done, last=last, **_geometry(deltas, gradients, batch.norms, active))
        steps.append(columns)
        if over:
            break
        active = left
        if stopped and not some:
            batch.choose(active)
        if falling:
            gradients = tuple(normalize(g, dim=-1) for g in gradients)
            optimiser.param_groups[0]["lr"] = 1 - step / hp.n_steps
        for delta, gradient in zip(moved, gradients, strict=True):
            delta.grad = gradient
        before = [delta.detach().clone() for delta in moved]
        optimiser.step()
        if hp.step_rule != "Adam":  # the step in radii; Adam's own is about `lr` per coordinate
            for stream, old in zip(deltas, before, strict=True):
                radius = hp.clamp * batch.norms[stream].to(old)[:, None]
                unit = radius if falling else radius * old.shape[-1] ** -0.5
                deltas[stream].data.sub_(old).mul_(unit).add_(old)
        _project(deltas, batch.norms, hp.clamp, _attn_left(batch.method, step + 1, hp.n_steps))
    values: dict[Stream, Tensor] = {s: batch.clean[s] + final[s] for s in final}
    return Targets(values, batch.clean, batch.layer, _history(steps), batch.position)


def _attn_left(method: Method, step: int, n_steps: int) -> float:
    """The share of its ball that δ^a has at `step` where it fades; infinite where it does not."""
    return max(0.0, 1 - step / max(1, n_steps // 2)) if method.attn_fades else math.inf


def _project(deltas: Mapping[Stream, Tensor], norms: Any, clamp: float, attn: float) -> None:
    """Each delta back into its ball ‖δ‖ ≤ c·‖clean‖, δ^a into the share `attn` of it."""
    with torch.no_grad():
        for stream, delta in deltas.items():
            limit = clamp * norms[stream] * (min(attn, 1.0) if stream == "attn_out" else 1.0)
            length = delta.norm(dim=-1)
            scale = torch.where(length > limit, limit / length, torch.ones_like(length))
            delta.mul_(scale[:, None])


def _geometry(
    deltas: Mapping[Stream, Tensor],
    gradients: Sequence[Tensor],
    norms: Mapping[Stream, Tensor],
    active: Tensor,
) -> dict[str, Tensor]:
    """The columns of `Targets.history` about the deltas of the active facts."""
    columns: dict[str, Tensor] = {
        f"norm_{s}": (d.detach().norm(dim=-1) / norms[s])[active] for s, d in deltas.items()
    }
    if len(deltas) == 2:
        columns["cosine"] = _cosine([d.detach() for d in deltas.values()])[active]
        # After the last step there is no gradient.
        at = _cosine(gradients)[active] if gradients else columns["cosine"] * torch.nan
        columns["gradient_cosine"] = at
    return columns


def _cosine(pair: Sequence[Tensor]) -> Float[Tensor, " fact"]:
    """Cosine of the rows of two tensors; NaN where one of them is zero."""
    a, b = pair
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _history(steps: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`Targets.history` of one batch; the host reads the numbers here, once."""
    frames: list[pd.DataFrame] = []
    for step in steps:
        host = {
            k: (v.double() if v.is_floating_point() else v).cpu().numpy()
            for k, v in step.items()
            if isinstance(v, Tensor)
        }
        reason = np.where(host.pop("done"), "goal", "steps" if step["last"] else "")
        frames.append(pd.DataFrame(host | {"step": step["step"], "stopped": reason.astype(object)}))
    history = pd.concat(frames, ignore_index=True)
    head = ["fact", "step", "nll", "kl", "decay", "loss", "said", "stopped"]
    return history.reindex(columns=[*head, *history.columns.drop(head)])


def check(
    model: Model, targets: Targets, facts: Sequence[Fact], method: Method, hparams: Hparams
) -> None:
    """Raises `SettingsError` for targets that are not those of such an edit."""
    follows: Sequence[Stream] = [method.follows(projection) for projection in method.write]
    needed = {optimised(model, s) for s in (method.delta_at if method.gather else follows)}
    if len(targets) != len(facts) or targets.layer != hparams.layers[-1]:
        raise SettingsError(
            f"These targets are for {len(targets)} facts at layer {targets.layer}; the edit is "
            f"for {len(facts)} facts at layer {hparams.layers[-1]}."
        )
    if targets.position != method.position:
        raise SettingsError(
            f"These targets are for the token {targets.position!r}; the method edits the token "
            f"{method.position!r}."
        )
    if not needed <= set(targets.values):
        raise SettingsError(
            f"The method needs targets for {', '.join(sorted(needed))}; these are for "
            f"{', '.join(targets.values)}."
        )


def warn_already_true(targets: Targets, facts: Sequence[Fact]) -> None:
    """Warn of facts whose new answer the model gave before any step."""
    first = targets.history[targets.history["step"] == 0]
    known = [facts[i].text for i in first.loc[first["said"], "fact"]]
    if known:
        warnings.warn(
            f"The model gives the new answer already for {len(known)} of {len(facts)} facts, so "
            f"there is nothing to edit there; the first is {known[0]!r}.",
            stacklevel=5,  # past `_made` and what leaves inference mode
        )
