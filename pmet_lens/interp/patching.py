"""Activation patching between facts at the answer position: whom does the answer follow?

A *base* prompt is run with the output of one component, at one layer or at all of them, replaced at
its last token by that of a *source* prompt, the donor. Donors share the relation and not the
subject, or the subject and not the relation. If the component only represented *what* is asked,
patching it between subjects would change nothing; if it carried the answer, the answer would follow
the donor.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.data.progress import line
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.interp import passes
from pmet_lens.interp.lens import first_tokens
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.activations import probe
from pmet_lens.models.bridge import Hook, Past, picked
from pmet_lens.models.model import Model, ModelError, Stream
from pmet_lens.models.sites import several

KINDS = ("same relation, other subject", "same subject, other relation")
OUTCOMES = ("own", "donor", "other")
PAIRS_PER_PASS = 128


def patch(
    model: Model,
    facts: Fact | Sequence[Fact],
    streams: Stream | Sequence[Stream] = ("attn_out", "mlp_out"),
    layers: int | Sequence[int] | None = None,
    *,
    n_pairs: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the answer follows the donor, per stream, kind of pair and layer.

    It makes no difference whether a component's output is replaced before a post-norm ("attn_out",
    "mlp_out") or after it ("attn_added", "mlp_added"): the donor's norm comes with it.

    Only facts answered right take part, and only pairs whose answers begin with different tokens;
    the argmax at the last token is compared with both ("own": the base prompt's answer stays;
    "donor": it follows the donor's subject or relation; "other": neither).

    Returns columns kind (`KINDS`), stream, layer (missing: patched at all `layers` at once),
    outcome (`OUTCOMES`), share (0 to 1), ci_low, ci_high (95 % bootstrap over pairs), n (pairs).

    Facts without a relation or a true answer, and a kind of which there is no pair (say, every
    subject has one fact), are left out, with a warning. Raises `FactError` where nothing is left.
    """
    facts, streams = _usable(passes.some(facts)), several(streams)
    layers = list(range(model.n_layers)) if layers is None else several(layers)
    patched = [[n] for n in layers] + ([layers] if len(layers) > 1 else [])
    wanted = first_tokens(model, facts)
    right = _argmax(model, facts) == wanted
    known = [i for i in range(len(facts)) if bool(right[i])]
    source = probe(model, facts, streams, layers, ("last",))
    rows, missing = [], []
    for kind in KINDS:
        pairs = _pairs(facts, known, wanted, kind, n_pairs, seed)
        if not pairs:
            missing.append(kind)
            continue
        base, donors = [i for i, _ in pairs], torch.tensor([j for _, j in pairs])
        prompts = _Bases(model, [facts[i] for i in base], min(layers))
        cells: list[tuple[Stream, list[int]]] = [
            (stream, chosen) for stream in streams for chosen in patched
        ]
        with line(f"patching, {kind}", "pass") as tell:
            for done, (stream, chosen) in enumerate(cells, start=1):
                values = source[stream, "last"][donors]
                answer = prompts.argmax(stream, {n: values[:, layers.index(n)] for n in chosen})
                stays, follows = answer == wanted[base], answer == wanted[donors]
                layer = chosen[0] if len(chosen) == 1 else pd.NA
                hits = (stays, follows, ~(stays | follows))
                for outcome, hit in zip(OUTCOMES, hits, strict=True):
                    share = metrics.interval(hit.double().cpu().numpy())
                    rows.append((kind, stream, layer, outcome, *share))
                tell(done, len(cells))
    if not rows:
        raise FactError(
            "There are no two facts of the same relation or the same subject that the model "
            "answers, differently; pass more facts."
        )
    for kind in missing:
        warnings.warn(
            f"There are no two facts with the {kind} that the model answers, differently: that "
            "kind of pair is left out.",
            stacklevel=2,
        )
    names = ["kind", "stream", "layer", "outcome", "share", *metrics.INTERVAL[1:]]
    return pd.DataFrame(rows, columns=names).astype({"layer": "Int64"})


transfer = patch
"""The name that `patch` had first."""


def _pairs(
    facts: Sequence[Fact],
    known: Sequence[int],
    wanted: Int[Tensor, " fact"],
    kind: str,
    n: int,
    seed: int,
) -> list[tuple[int, int]]:
    """Up to `n` (base, donor) pairs, each base at most once; deterministic in `seed`."""
    shared, differing = ("relation", "subject") if kind == KINDS[0] else ("subject", "relation")
    groups: dict[str, list[int]] = {}
    for i in known:
        groups.setdefault(getattr(facts[i], shared), []).append(i)
    rng, pairs = random.Random(f"{seed} {kind}"), []
    for i in rng.sample(known, len(known)):
        donors = [
            j
            for j in groups[getattr(facts[i], shared)]
            if getattr(facts[j], differing) != getattr(facts[i], differing)
            and wanted[j] != wanted[i]
        ]
        if donors and len(pairs) < n:
            pairs.append((i, rng.choice(donors)))
    return pairs


def _usable(facts: Sequence[Fact]) -> list[Fact]:
    """The facts with a relation and a true answer."""
    usable = [f for f in facts if f.relation is not None and f.target_true is not None]
    if not usable:
        raise FactError("Patching between facts needs facts with a relation and a target_true.")
    if left_out := len(facts) - len(usable):
        warnings.warn(
            f"{left_out} of {len(facts)} facts have no relation or no target_true and are left "
            "out of the patching.",
            stacklevel=3,
        )
    return usable


def _argmax(model: Model, facts: Sequence[Fact]) -> Int[Tensor, " fact"]:
    """The argmax at the last prompt token."""
    best = []
    for chosen in _passes(model, facts):
        batch = tokens.encode(model, [tokens.Prompt(f.prompt, f.subject) for f in chosen])
        best.append(model.logits_at(batch.ids, batch.mask, scoring.last_places(batch)).argmax(-1))
    return torch.cat(best)


def _passes(model: Model, facts: Sequence[Fact]) -> list[Sequence[Fact]]:
    size = likelihood.readable(model, PAIRS_PER_PASS)
    return [facts[n : n + size] for n in range(0, len(facts), size)]


class _Bases:
    """Base prompts, run once up to their last token. Nothing before it can change, and nothing
    below a layer that is patched, so a pass runs this token alone and from there on."""

    def __init__(self, model: Model, facts: Sequence[Fact], lowest: int) -> None:
        self.model, self._lowest = model, lowest
        self._parts = [self._part(chosen) for chosen in _passes(model, facts)]

    def _part(self, facts: Sequence[Fact]) -> tuple[tokens.Batch, dict[int, Tensor], Past | None]:
        """The prompts, what enters each layer at the last token (the lowest: at every token), and
        the keys and values before it; None: whole prompts have to run."""
        model = self.model
        batch = tokens.encode(model, [tokens.Prompt(f.prompt, f.subject) for f in facts])
        try:
            tail = model.from_layer(self._lowest)
        except ModelError:  # a family whose blocks cannot run alone
            return batch, {}, None
        if not tail.resumes(batch.last, batch.mask):
            return batch, {}, None
        at, entering, whole = scoring.last_places(batch), dict[int, Tensor](), list[Tensor]()

        def at_last(value: Tensor) -> Tensor:
            return picked(value, at)[:, None].to(model.device)

        layers = range(self._lowest, model.n_layers)
        hooks: list[tuple[str, Hook]] = [
            (model.stream_hook(n, "resid_pre"), passes.keep(entering, n, at_last)) for n in layers
        ]
        hooks.append((hooks[0][0], lambda value: whole.append(value.to(model.device))))
        with torch.no_grad():
            model.forward(batch.ids, batch.mask, hooks=hooks, at=at[:1])
        return batch, entering, tail.past(whole[0], batch.last)

    def argmax(
        self, stream: Stream, values: Mapping[int, Float[Tensor, "fact d_model"]]
    ) -> Int[Tensor, " fact"]:
        """The argmax at the last token, with `values` (by layer) written into the stream there."""
        best, start = [], 0
        for batch, entering, past in self._parts:
            chosen = {n: value[start : start + len(batch)] for n, value in values.items()}
            with torch.no_grad():
                best.append(self._logits(batch, entering, past, stream, chosen).argmax(-1))
            start += len(batch)
        return torch.cat(best)

    def _logits(
        self,
        batch: tokens.Batch,
        entering: Mapping[int, Tensor],
        past: Past | None,
        stream: Stream,
        values: Mapping[int, Tensor],
    ) -> Float[Tensor, "fact vocab"]:
        at = scoring.last_places(batch)
        if past is not None:  # the last token is the only one
            at = torch.stack([at[:, 0], torch.zeros_like(at[:, 1])], dim=1)
        hooks = [(self.model.stream_hook(n, stream), _write(v, at)) for n, v in values.items()]
        if past is None:
            return self.model.forward(batch.ids, batch.mask, hooks=hooks, at=at)
        first = min(values)
        tail = self.model.from_layer(self._lowest).later(first)
        before = past.of(first - self._lowest)
        mask = torch.ones_like(at[:, :1])
        return tail.forward(entering[first], mask, hooks=hooks, at=at, past=before)


def _write(values: Float[Tensor, "row d_model"], at: Int[Tensor, "row 2"]) -> Hook:
    def hook(value: Tensor) -> Tensor:
        return value.index_put(tuple(at.T.to(value.device)), values.to(value))

    return hook
