"""Where the heads look while the answer is predicted, and whether facts of a relation look alike.

"MHSA encodes general knowledge-extraction patterns" says among other things that attention depends
on what is asked (the relation) and not on whom it is asked about. So the weights of the last prompt
token are summed over five *roles* of the tokens it can look at, which makes prompts of different
length comparable, and the patterns of facts are compared within and across relations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.evaluation import metrics
from pmet_lens.evaluation.scoring import last_places
from pmet_lens.interp import passes
from pmet_lens.models import tokens
from pmet_lens.models.activations import batches
from pmet_lens.models.model import Model, ModelError

ROLES = ("before", "in_subject", "last_subject", "between", "self")
"""Tokens before the subject; those of the subject but its last; its last; those after it; the
looking token itself. Where the prompt ends with the subject, its last token is `last_subject`."""
PAIRS = ("same relation, same phrasing", "same relation, other phrasing", "other relation")


def attention_patterns(
    model: Model,
    facts: Fact | Sequence[Fact],
    layers: int | Sequence[int] | None = None,
    *,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Attention of the last prompt token, per head: one row per fact, layer and head with columns
    fact, subject, relation, layer, head, the weight on each of `ROLES` (0 to 1, together 1) and
    entropy (nats, from 0: one token has all the weight).

    Raises `FactError` for an empty list, `ModelError` for an architecture that hides its weights.
    """
    facts = passes.some(facts)
    layers = passes.layers_of(model, layers, "attention_patterns")
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in facts]
    frames = []
    for chosen, batch in batches(model, prompts, batch_tokens):
        roles = _roles(batch)
        of_layers = _weights(model, batch, layers, partial(_of_last, batch))
        for layer, weights in of_layers.items():
            frames.append(_table(weights.double(), roles, chosen, layer))
    frame = pd.concat(frames, ignore_index=True).sort_values(by=["fact", "layer", "head"])
    frame.insert(1, "subject", [facts[i].subject for i in frame["fact"]])
    frame.insert(2, "relation", [facts[i].relation for i in frame["fact"]])
    return frame.reset_index(drop=True)


def subject_attention(
    model: Model, fact: Fact | Sequence[Fact], layers: int | Sequence[int] | None = None
) -> pd.DataFrame:
    """How much every token of a prompt looks at the subject, per head.

    One row per layer, head and token: columns layer, head, position (of the looking token, from 0),
    token (its text), weight (its attention on all subject tokens together, 0 to 1; 0 before the
    subject); of a list of facts also fact (number) and subject. Raises `ModelError` as
    `attention_patterns` does.
    """
    if not isinstance(fact, Fact):
        return passes.each(fact, lambda one: subject_attention(model, one, layers))
    layers = passes.layers_of(model, layers, "subject_attention")
    batch, texts = tokens.shown(model, fact)
    first, stop = int(batch.first[0]), int(batch.subject[0]) + 1

    def on_subject(value: Tensor) -> Tensor:
        return value[0, :, :, first:stop].double().sum(-1)  # [head, query]

    frames = []
    for layer, value in _weights(model, batch, layers, on_subject).items():
        heads, n = value.shape
        columns: dict[str, Any] = {
            "layer": layer,
            "head": np.repeat(np.arange(heads), n),
            "position": np.tile(np.arange(n), heads),
            "token": texts * heads,
            "weight": value.cpu().numpy().ravel(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _weights(
    model: Model, batch: tokens.Batch, layers: Sequence[int], pick: Callable[[Tensor], Tensor]
) -> dict[int, Tensor]:
    """What `pick` takes of the attention weights `[fact, head, query, key]` of each layer."""
    weights = passes.capture(model, batch, {n: model.pattern_hook(n) for n in layers}, pick)
    if len(weights) < len(set(layers)):
        raise ModelError(
            f"{model.name!r} does not show its attention weights; load the Hugging Face "
            'model with attn_implementation="eager"'
        )
    return weights


def pattern_similarity(patterns: pd.DataFrame, facts: Fact | Sequence[Fact]) -> pd.DataFrame:
    """How alike the attention of two facts is, per layer and kind of pair (`PAIRS`).

    The similarity of two facts is the overlap of their weights over `ROLES` (1 − total variation
    distance; 0: they look elsewhere, 1: the same), averaged over heads. Only pairs with different
    subjects count. "Same phrasing" is the same prompt template; without the middle kind of pair
    one would take words for knowledge.

    `patterns`: of `attention_patterns` for these `facts`. Columns layer, pair, mean, ci_low,
    ci_high (95 % bootstrap over facts), n (facts that have such a partner). Raises `FactError` for
    a fact without a relation.
    """
    facts = passes.some(facts)
    passes.check_relations(facts, "comparing relations")
    relation, subject, prompt = passes.same_pairs(facts)
    others = ~subject
    kinds = (relation & prompt & others, relation & ~prompt & others, ~relation & others)
    rows = []
    for layer, of_layer in patterns.groupby("layer"):
        weights = of_layer.sort_values(["fact", "head"])[list(ROLES)].to_numpy()
        weights = weights.reshape(len(facts), -1, len(ROLES))
        # 1 − total variation distance, mean over heads: [fact, fact].
        overlap = np.stack([np.minimum(one, weights).sum(-1).mean(-1) for one in weights])
        for pair, chosen in zip(PAIRS, kinds, strict=True):
            count = chosen.sum(1)
            has = count > 0
            if has.any():
                per_fact = (overlap * chosen).sum(1)[has] / count[has]
                rows.append((layer, pair, *metrics.interval(per_fact)))
    return pd.DataFrame(rows, columns=["layer", "pair", *metrics.INTERVAL])


def _of_last(batch: tokens.Batch, weights: Tensor) -> Float[Tensor, "fact head key"]:
    row, last = last_places(batch).T.to(weights.device)
    return weights[row, :, last]


def _roles(batch: tokens.Batch) -> Float[Tensor, "fact role token"]:
    """1 where a token has a role; every token up to the last of the prompt has exactly one."""
    before, first, middle, *others = passes.parts_of(batch).values()
    return torch.stack([before, first | middle, *others], dim=1).double()


def _table(weights: Tensor, roles: Tensor, facts: Tensor, layer: int) -> pd.DataFrame:
    by_role = torch.einsum("fht,frt->fhr", weights, roles.to(weights.device)).cpu()
    entropy = torch.special.entr(weights).sum(-1).cpu()
    n, heads, _ = by_role.shape
    table = pd.DataFrame(by_role.flatten(0, 1).numpy(), columns=pd.Index(ROLES))
    table.insert(0, "fact", np.repeat(facts.numpy(), heads))
    table.insert(1, "layer", layer)
    table.insert(2, "head", np.tile(np.arange(heads), n))
    return table.assign(entropy=entropy.flatten().numpy())
