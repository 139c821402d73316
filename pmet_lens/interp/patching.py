"""Swap a component's output between two facts at the answer position: whom does the answer follow?

A *recipient* prompt is run with the output of one component, at one layer or at all of them,
replaced at its last token by that of a *donor* prompt. Donors share the relation and not the
subject, or the subject and not the relation. If the component only said *what* is asked, swapping
it between subjects would change nothing; if it carried the answer, the answer would follow the
donor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.evaluation import metrics
from pmet_lens.interp.lens import first_tokens
from pmet_lens.models import tokens
from pmet_lens.models.activations import Activations, probe
from pmet_lens.models.model import Model, Stream

KINDS = ("same relation, other subject", "same subject, other relation")
OUTCOMES = ("own", "donor", "other")
PAIRS_PER_PASS = 128


def transfer(
    model: Model,
    facts: Sequence[Fact],
    streams: Sequence[Stream] = ("attn_out", "mlp_out"),
    layers: Sequence[int] | None = None,
    *,
    n_pairs: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How often the answer follows the donor, per stream, kind of pair and layer.

    Only facts answered right take part, and only pairs whose answers begin with different tokens;
    the arg-max at the last token is compared with both ("own": the recipient's answer stays;
    "donor": it follows the donor's subject or relation; "other": neither).

    Returns columns kind (`KINDS`), stream, layer (missing: swapped at all `layers` at once),
    outcome (`OUTCOMES`), share (0 to 1), ci_low, ci_high (95 % bootstrap over pairs), n (pairs).

    Raises `FactError` for a fact without a relation, and where no pair of a kind exists (say, every
    subject has one fact).
    """
    for fact in facts:
        if fact.relation is None:
            raise FactError(f"{fact.text!r} has no relation; swapping between relations needs one.")
    layers = list(range(model.n_layers) if layers is None else layers)
    swaps = [[n] for n in layers] + ([layers] if len(layers) > 1 else [])
    wanted = first_tokens(model, facts)
    right = _said(model, facts, [], torch.empty(0)) == wanted
    known = [i for i in range(len(facts)) if bool(right[i])]
    rows = []
    found = probe(model, facts, streams, layers, ("last",))
    for kind in KINDS:
        pairs = _pairs(facts, known, wanted, kind, n_pairs, seed)
        recipients, donors = [facts[i] for i, _ in pairs], torch.tensor([j for _, j in pairs])
        answers = {"own": wanted[[i for i, _ in pairs]], "donor": wanted[donors]}
        for stream in streams:
            for chosen in swaps:
                where: list[tuple[int, Stream]] = [(n, stream) for n in chosen]
                said = _said(model, recipients, where, _values(found, where)[donors])
                hits = {k: (said == v).double().cpu() for k, v in answers.items()}
                hits["other"] = 1 - hits["own"] - hits["donor"]
                layer = chosen[0] if len(chosen) == 1 else pd.NA
                for outcome in OUTCOMES:
                    values = hits[outcome].numpy()
                    cell = (kind, stream, layer, outcome, values.mean())
                    rows.append((*cell, *metrics.bootstrap(values), len(values)))
    names = ["kind", "stream", "layer", "outcome", "share", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=names).astype({"layer": "Int64"})


def _values(
    found: Activations, where: Sequence[tuple[int, Stream]]
) -> Float[Tensor, "fact place d_model"]:
    layers = [found[stream, "last"][:, found.layers.index(n)] for n, stream in where]
    return torch.stack(layers, dim=1)


def _pairs(
    facts: Sequence[Fact],
    known: Sequence[int],
    wanted: Int[Tensor, " fact"],
    kind: str,
    n: int,
    seed: int,
) -> list[tuple[int, int]]:
    """Up to `n` (recipient, donor) pairs, each recipient at most once; deterministic in `seed`."""
    by_relation = kind == KINDS[0]

    def shared(fact: Fact) -> str | None:
        return fact.relation if by_relation else fact.subject

    def differing(fact: Fact) -> str | None:
        return fact.subject if by_relation else fact.relation

    groups: dict[str | None, list[int]] = {}
    for i in known:
        groups.setdefault(shared(facts[i]), []).append(i)
    rng, pairs = random.Random(f"{seed} {kind}"), []
    for i in rng.sample(known, len(known)):
        own = [
            j
            for j in groups[shared(facts[i])]
            if differing(facts[j]) != differing(facts[i]) and wanted[j] != wanted[i]
        ]
        if own and len(pairs) < n:
            pairs.append((i, rng.choice(own)))
    if not pairs:
        raise FactError(
            f"There are no two facts with the {kind} that the model answers, differently; pass "
            "more facts."
        )
    return pairs


def _said(
    model: Model,
    facts: Sequence[Fact],
    where: Sequence[tuple[int, Stream]],
    values: Float[Tensor, "fact place d_model"] | Float[Tensor, " none"],
) -> Int[Tensor, " fact"]:
    """The arg-max at the last prompt token, with `values` written at `where` there."""
    out = []
    for start in range(0, len(facts), PAIRS_PER_PASS):
        own = facts[start : start + PAIRS_PER_PASS]
        batch = tokens.encode(model, [tokens.Prompt(f.prompt, f.subject) for f in own])
        hooks = [
            (model.stream_hook(*place), _write(values[start : start + len(own), k], batch.last))
            for k, place in enumerate(where)
        ]
        at = torch.stack([torch.arange(len(own), device=model.device), batch.last], dim=1)
        with torch.no_grad():
            out.append(model.forward(batch.ids, batch.mask, hooks=hooks, at=at).argmax(-1))
    return torch.cat(out)


def _write(values: Tensor, at: Int[Tensor, " row"]) -> Callable[[Tensor], Tensor]:
    def hook(value: Tensor) -> Tensor:
        rows = torch.arange(len(at), device=value.device)
        return value.index_put((rows, at.to(value.device)), values.to(value))

    return hook
