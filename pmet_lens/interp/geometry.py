"""What an edit did inside: how far the components moved, and which delta raised the new answer.

PMET optimises `δ^a` and `δ^m` together and throws `δ^a` away. `answer_gain` measures what each of
the two contributed to the new answer and `delta_losses` what each does alone; `arrival` what of
them the written weights bring, layer after layer, and `drift` what these then changed in the
components, on the edited facts, on their paraphrases and on their neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.finetune import rewrites
from pmet_lens.editing.method import Method, SettingsError, optimised
from pmet_lens.editing.targets import Targets
from pmet_lens.evaluation import metrics
from pmet_lens.interp import passes
from pmet_lens.models import activations, likelihood, tokens
from pmet_lens.models.activations import Position, read
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model, Stream
from pmet_lens.models.sites import several

FACTS_PER_PASS = 64


@torch.inference_mode(False)
def answer_gain(
    model: Model, facts: Fact | Sequence[Fact], targets: Targets, *, points: int = 16
) -> pd.DataFrame:
    """What each delta contributed to the log-probability of the new answer, on the plain prompt.

    Integrated gradients (arXiv 1703.01365) along the straight path from the clean streams to the
    targets: contribution = ∫ ∇_s log P(o*) · δ_s over the path, at `points` midpoints. Over the
    streams they add up to the whole change of log P (up to the integration error).

    Returns one row per fact and stream: fact, stream, gain (nats), change (of log P, nats, all
    streams together), share (gain / change), cosine (of δ with the gradient at the clean state: how
    much of it points where the answer rises), norm (‖δ‖), clean_norm (of the stream). For the mean
    of shares over facts divide mean gain by mean change: single changes can be tiny.
    """
    frames = []
    for start, batch, own in _passes(model, facts, targets, copies=2):
        gains = _gains(model, batch, own, points)
        frames.append(gains.assign(fact=gains["fact"] + start))
    frame = pd.concat(frames, ignore_index=True)
    return frame.sort_values(by="fact", kind="stable", ignore_index=True)


def _passes(
    model: Model, facts: Fact | Sequence[Fact], targets: Targets, copies: int = 1
) -> Iterator[tuple[int, tokens.Batch, Targets]]:
    """The first fact's number, the prompts with the new answers, and the targets of each pass."""
    facts = passes.some(facts)
    if len(facts) != len(targets):
        raise FactError(f"{len(facts)} facts do not fit the targets of {len(targets)}.")
    whole = tokens.encode(model, rewrites(facts))
    size = likelihood.rows_at_once(model, whole, FACTS_PER_PASS, copies=copies)
    for start in range(0, len(facts), size):
        chosen = slice(start, start + size)
        yield start, tokens.encode(model, rewrites(facts[chosen])), targets[chosen]


def _gains(model: Model, batch: tokens.Batch, targets: Targets, points: int) -> pd.DataFrame:
    """The table of `answer_gain` for facts of one pass, stream after stream."""
    deltas: dict[Stream, Tensor] = {s: targets.delta(s) for s in targets.values}
    total = {s: torch.zeros(len(batch), dtype=torch.float64) for s in deltas}
    for k in range(points):
        part = (k + 0.5) / points
        slopes = _gradients(model, batch, targets, {s: part * d for s, d in deltas.items()})
        for stream, slope in slopes.items():
            total[stream] += (slope * deltas[stream]).sum(-1).double().cpu() / points
    without, with_deltas = (_log_p(model, batch, targets, d) for d in ({}, deltas))
    change = (with_deltas - without).double().cpu()
    initial = _gradients(model, batch, targets, {s: torch.zeros_like(d) for s, d in deltas.items()})
    frames = []
    for stream, delta in deltas.items():
        columns: dict[str, Any] = {
            "fact": range(len(batch)),
            "stream": stream,
            "gain": total[stream],
            "change": change,
            "share": (total[stream] / change).where(change != 0, torch.nan),
            "cosine": torch.cosine_similarity(initial[stream], delta, dim=-1).double().cpu(),
            "norm": delta.norm(dim=-1).double().cpu(),
            "clean_norm": targets.clean[stream].norm(dim=-1).double().cpu(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


@torch.enable_grad()
def _gradients(
    model: Model, batch: tokens.Batch, targets: Targets, deltas: Mapping[Stream, Tensor]
) -> dict[Stream, Float[Tensor, "fact d_model"]]:
    """∇ log P(answer) with respect to each stream at the edited token, deltas added."""
    leaves: dict[Stream, Tensor] = {s: d.detach().requires_grad_(True) for s, d in deltas.items()}
    log_p = _log_p(model, batch, targets, leaves)
    gradients = torch.autograd.grad(log_p.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def _log_p(
    model: Model,
    batch: tokens.Batch,
    targets: Targets,
    deltas: Mapping[Stream, Tensor],
    kept: dict[Stream, Tensor] | None = None,
) -> Float[Tensor, " fact"]:
    """Log-probability of the whole answer (nats), with the deltas added. `kept`: streams whose
    values at the edited token are put there."""
    layer, place = targets.layer, batch.at(targets.position)
    hooks: list[tuple[str, Hook]] = [
        (model.stream_hook(layer, s), activations.add_at(d, place)) for s, d in deltas.items()
    ]
    if kept is not None:
        row = torch.arange(len(batch), device=place.device)

        def at_place(value: Tensor) -> Tensor:
            return value[row.to(value.device), place.to(value.device)].double().cpu()

        hooks += [(model.stream_hook(layer, s), passes.keep(kept, s, at_place)) for s in kept]
    return likelihood.answers(model, batch, hooks)


@torch.no_grad()
def delta_losses(model: Model, facts: Fact | Sequence[Fact], targets: Targets) -> pd.DataFrame:
    """How well each delta does alone: the loss of the new answer on the plain prompt with nothing
    added, with each stream's delta alone, and with all of them, as they were optimised.

    Columns: fact, added ("nothing", a stream, "all"), nll (of the new answer, nats per token).
    """
    frames = []
    for start, batch, own in _passes(model, facts, targets):
        deltas: dict[Stream, Tensor] = {s: own.delta(s) for s in own.values}
        ways: dict[str, dict[Stream, Tensor]] = {"nothing": {}}
        ways |= {s: {s: d} for s, d in deltas.items()}
        for added, some in (ways | {"all": deltas}).items():
            nll = _nll(batch, _log_p(model, batch, own, some))
            columns: dict[str, Any] = {"fact": range(start, start + len(batch)), "added": added}
            frames.append(pd.DataFrame({**columns, "nll": nll}))
    frame = pd.concat(frames, ignore_index=True)
    return frame.sort_values(by="fact", kind="stable", ignore_index=True)


def _nll(batch: tokens.Batch, log_p: Tensor) -> Any:
    return (-log_p / batch.scored.sum(1)).double().cpu().numpy()


@torch.no_grad()
def arrival(model: Model, edit: Edit) -> pd.DataFrame:
    """What of the deltas arrives when an edit is written, layer after layer: the first of its
    layers alone, the first two, and so on, read at the edited token of the last one.

    One row per fact and number of layers written: fact, written (0: none), layer (the last one
    written; missing for 0), stream (the one that the written projection was asked to change),
    delta (how far that stream moved along its own delta: 0 not at all, 1 as far as asked), output
    (the same of the layer's output along what all deltas together did to it, δ^a among them and
    what attention's share passes on to the MLP), nll (of the new answer on the plain prompt, nats
    per token; `delta_losses` tells it with the deltas themselves).

    `edit`: fresh, with its targets, of all facts at once. Raises `SettingsError` for another.
    """
    method, targets = edit.method, edit.targets
    if not isinstance(method, Method) or targets is None:
        raise SettingsError("arrival needs the targets of an edit: one that was just made at once.")
    stream = optimised(model, method.follows(method.write[-1]))
    layers = sorted({site.layer for site in edit.factors})
    frames = []
    for start, batch, own in _passes(model, edit.facts, targets):
        deltas: dict[Stream, Tensor] = {s: own.delta(s) for s in own.values}
        asked = sum(deltas.values()) if method.gather else deltas[stream]
        clean, pushed = (_kept(model, batch, own, stream, d)[1] for d in ({}, deltas))
        ways: dict[Stream, Tensor] = {stream: torch.as_tensor(asked).double().cpu()}
        ways["resid_post"] = pushed["resid_post"] - clean["resid_post"]
        for written in range(len(layers) + 1):
            some = {s: f for s, f in edit.factors.items() if s.layer in layers[:written]}
            with replace(edit, factors=some).applied(model):
                log_p, now = _kept(model, batch, own, stream, {})
            moved = {s: _along(now[s] - clean[s], way) for s, way in ways.items()}
            columns: dict[str, Any] = {
                "fact": range(start, start + len(batch)),
                "written": written,
                "layer": layers[written - 1] if written else pd.NA,
                "stream": stream,
                "delta": moved[stream],
                "output": moved["resid_post"],
                "nll": _nll(batch, log_p),
            }
            frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True).astype({"layer": "Int64"})
    return frame.sort_values(by="fact", kind="stable", ignore_index=True)


def _kept(
    model: Model,
    batch: tokens.Batch,
    targets: Targets,
    stream: Stream,
    deltas: Mapping[Stream, Tensor],
) -> tuple[Tensor, dict[Stream, Tensor]]:
    """log P of the answers with these deltas, and the values of `stream` and the layer's output."""
    kept: dict[Stream, Tensor] = dict.fromkeys((stream, "resid_post"), torch.empty(0))
    return _log_p(model, batch, targets, deltas, kept), kept


def _along(moved: Tensor, way: Tensor) -> Any:
    """How far each row of `moved` goes along that of `way`, in lengths of the latter."""
    return ((moved * way).sum(-1) / way.square().sum(-1)).numpy()


def drift(
    model: Model,
    facts: Fact | Sequence[Fact],
    edit: Edit,
    streams: Stream | Sequence[Stream] = ("attn_out", "mlp_out"),
) -> pd.DataFrame:
    """How far `edit` moved each stream, per layer and position.

    Kinds of prompt: "rewrite", "paraphrase" (both at "last_subject" and "last") and "neighbour" (at
    "last" only: the records do not say where a neighbour's subject stands). The distance is
    ‖after − before‖ / ‖before‖, first averaged over the prompts of a fact. `streams` are read as
    they are named: behind a post-norm "attn_added" and "mlp_added" are what reaches the residual
    stream.

    Returns columns kind, stream, position, layer, mean, ci_low, ci_high (95 % bootstrap over
    facts), n. The model is left unchanged.
    """
    facts, frames, streams = passes.some(facts), [], several(streams)
    layers = range(model.n_layers)
    for kind, prompts in _prompts(facts).items():
        marked = kind != "neighbour"
        positions: tuple[Position, ...] = ("last_subject", "last") if marked else ("last",)
        asked = [prompt for _, prompt in prompts]
        before = read(model, asked, streams, layers, positions)
        with edit.applied(model):
            after = read(model, asked, streams, layers, positions)
        for (stream, position), old in before.items():
            moved = (after[stream, position] - old).float().norm(dim=-1) / old.float().norm(dim=-1)
            for layer in layers:
                cell = {"kind": kind, "stream": stream, "position": position, "layer": layer}
                per_prompt = {"fact": [i for i, _ in prompts], "distance": moved[:, layer].numpy()}
                frames.append(pd.DataFrame({**cell, **per_prompt}))
    frame = pd.concat(frames, ignore_index=True)
    return metrics.means(frame, ["kind", "stream", "position", "layer"], "distance")


def _prompts(facts: Sequence[Fact]) -> dict[str, list[tuple[int, tokens.Prompt]]]:
    """Per kind the prompts, each with the number of its fact."""
    prompts: dict[str, list[tuple[int, tokens.Prompt]]] = defaultdict(list)
    for i, fact in enumerate(facts):
        prompts["rewrite"].append((i, tokens.Prompt(fact.prompt, fact.subject)))
        for text in fact.paraphrases:
            if fact.subject in text and "{}" not in text:
                template = text.replace(fact.subject, "{}", 1)
                prompts["paraphrase"].append((i, tokens.Prompt(template, fact.subject)))
        for text, _ in fact.neighbours:
            prompts["neighbour"].append((i, tokens.Prompt(text)))
    return prompts
