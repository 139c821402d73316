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
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.interp import passes
from pmet_lens.interp.lens import first_tokens
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.activations import probe
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model, Stream
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
    right = _argmax(model, facts, {}) == wanted
    known = [i for i in range(len(facts)) if bool(right[i])]
    source = probe(model, facts, streams, layers, ("last",))
    rows, missing = [], []
    for kind in KINDS:
        pairs = _pairs(facts, known, wanted, kind, n_pairs, seed)
        if not pairs:
            missing.append(kind)
            continue
        base, donors = [i for i, _ in pairs], torch.tensor([j for _, j in pairs])
        for stream in streams:
            values = source[stream, "last"][donors]
            for chosen in patched:
                where = {model.stream_hook(n, stream): values[:, layers.index(n)] for n in chosen}
                answer = _argmax(model, [facts[i] for i in base], where)
                stays, follows = answer == wanted[base], answer == wanted[donors]
                layer = chosen[0] if len(chosen) == 1 else pd.NA
                for outcome, hits in zip(
                    OUTCOMES, (stays, follows, ~(stays | follows)), strict=True
                ):
                    share = metrics.interval(hits.double().cpu().numpy())
                    rows.append((kind, stream, layer, outcome, *share))
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


def _argmax(
    model: Model, facts: Sequence[Fact], values: dict[str, Float[Tensor, "fact d_model"]]
) -> Int[Tensor, " fact"]:
    """The argmax at the last prompt token, with `values` (by hook name) written there."""
    best = []
    size = likelihood.readable(model, PAIRS_PER_PASS)
    for start in range(0, len(facts), size):
        chosen = slice(start, start + size)
        batch = tokens.encode(model, [tokens.Prompt(f.prompt, f.subject) for f in facts[chosen]])
        at = scoring.last_places(batch)
        hooks = [(name, _write(value[chosen], at)) for name, value in values.items()]
        with torch.no_grad():
            best.append(model.forward(batch.ids, batch.mask, hooks=hooks, at=at).argmax(-1))
    return torch.cat(best)


def _write(values: Float[Tensor, "row d_model"], at: Int[Tensor, "row 2"]) -> Hook:
    def hook(value: Tensor) -> Tensor:
        return value.index_put(tuple(at.T.to(value.device)), values.to(value))

    return hook
