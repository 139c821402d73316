"""Where the heads look while the answer is predicted, and whether facts of a relation look alike.

"MHSA encodes general knowledge-extraction patterns" says among other things that attention depends
on what is asked (the relation) and not on whom it is asked about. So the weights of the last prompt
token are summed over five *roles* of the tokens it can look at, which makes prompts of different
length comparable, and the patterns of facts are compared within and across relations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.evaluation import metrics
from pmet_lens.models import tokens
from pmet_lens.models.activations import batches
from pmet_lens.models.model import Model, ModelError

ROLES = ("before", "in_subject", "last_subject", "between", "self")
"""Tokens before the subject; the subject's but its last; its last; those behind it; the query's
own. Where the prompt ends with the subject, its last token counts as `last_subject`."""
PAIRS = ("same relation, same phrasing", "same relation, other phrasing", "other relation")


def attention_patterns(
    model: Model,
    facts: Sequence[Fact],
    layers: Sequence[int] | None = None,
    *,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """Attention of the last prompt token, per head: one row per fact, layer and head with columns
    fact, subject, relation, layer, head, the weight on each of `ROLES` (0 to 1, together 1) and
    entropy (nats, from 0: one token has all the weight).

    Raises `FactError` for an empty list, `ModelError` for an architecture that hides its weights.
    """
    if not facts:
        raise FactError("There are no facts to look at; pass at least one Fact.")
    layers = range(model.n_layers) if layers is None else layers
    if not layers:
        raise ModelError("attention_patterns needs at least one layer")
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in facts]
    frames = []
    for chosen, batch in batches(model, prompts, batch_tokens):
        found: dict[int, Tensor] = {}
        hooks = [(model.pattern_hook(n), _keep(found, n, batch)) for n in layers]
        with torch.no_grad():
            model.forward(batch.ids, batch.mask, hooks=hooks, stop_at_layer=1 + max(layers))
        roles = _roles(batch)
        for layer in layers:
            _check_shown(model, layer, found)
            frames.append(_table(found[layer].double(), roles.double(), chosen, layer))
    frame = pd.concat(frames, ignore_index=True).sort_values(by=["fact", "layer", "head"])
    frame.insert(1, "subject", [facts[i].subject for i in frame["fact"]])
    frame.insert(2, "relation", [facts[i].relation for i in frame["fact"]])
    return frame.reset_index(drop=True)


def subject_attention(
    model: Model, fact: Fact, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """How much every token of one prompt looks at the subject, per head.

    One row per layer, head and token: columns layer, head, position (of the looking token, from 0),
    token (its text), weight (its attention on all subject tokens together, 0 to 1; 0 in front of
    the subject). Raises `ModelError` as `attention_patterns` does.
    """
    layers = range(model.n_layers) if layers is None else layers
    if not layers:
        raise ModelError("subject_attention needs at least one layer")
    batch, texts = tokens.shown(model, fact)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def hook(value: Tensor) -> None:
            found[layer] = value[0]  # [head, query, key]

        return hook

    hooks = [(model.pattern_hook(n), keep(n)) for n in layers]
    with torch.no_grad():
        model.forward(batch.ids, batch.mask, hooks=hooks, stop_at_layer=1 + max(layers))
    first, stop = int(batch.first[0]), int(batch.subject[0]) + 1
    frames = []
    for layer in layers:
        _check_shown(model, layer, found)
        weight = found[layer][..., first:stop].double().sum(-1).cpu().numpy()
        heads, n = weight.shape
        columns: dict[str, Any] = {
            "layer": layer,
            "head": np.repeat(np.arange(heads), n),
            "position": np.tile(np.arange(n), heads),
            "token": texts * heads,
            "weight": weight.ravel(),
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _check_shown(model: Model, layer: int, found: Mapping[int, Tensor]) -> None:
    if layer not in found:
        raise ModelError(
            f"{model.name!r} does not show its attention weights; load the Hugging Face "
            'model with attn_implementation="eager"'
        )


def pattern_similarity(patterns: pd.DataFrame, facts: Sequence[Fact]) -> pd.DataFrame:
    """How alike the attention of two facts is, per layer and kind of pair (`PAIRS`).

    The similarity of two facts is the overlap of their weights over `ROLES` (1 − total variation
    distance; 0: they look elsewhere, 1: the same), averaged over heads. Only pairs with different
    subjects count. "Same phrasing" is the same prompt template; without the middle kind of pair
    one would take words for knowledge.

    `patterns`: of `attention_patterns` for these `facts`. Columns layer, pair, mean, ci_low,
    ci_high (95 % bootstrap over facts), n (facts that have such a partner). Raises `FactError` for
    a fact without a relation.
    """
    for fact in facts:
        if fact.relation is None:
            raise FactError(f"{fact.text!r} has no relation; comparing relations needs one.")
    relation = np.array([f.relation for f in facts])
    prompt, subject = np.array([f.prompt for f in facts]), np.array([f.subject for f in facts])
    alike = relation[:, None] == relation
    same_words = prompt[:, None] == prompt
    others = subject[:, None] != subject
    kinds = (alike & same_words & others, alike & ~same_words & others, ~alike & others)
    rows = []
    for layer, own in patterns.groupby("layer"):
        weights = own.sort_values(["fact", "head"])[list(ROLES)].to_numpy()
        overlap = _overlap(weights.reshape(len(facts), -1, len(ROLES)))
        for pair, chosen in zip(PAIRS, kinds, strict=True):
            count = chosen.sum(1)
            has = count > 0
            if has.any():
                per_fact = (overlap * chosen).sum(1)[has] / count[has]
                interval = metrics.bootstrap(per_fact)
                rows.append((layer, pair, per_fact.mean(), *interval, len(per_fact)))
    return pd.DataFrame(rows, columns=["layer", "pair", "mean", "ci_low", "ci_high", "n"])


def _overlap(weights: metrics.Numbers) -> metrics.Numbers:
    """`[fact, head, role]` → `[fact, fact]`: 1 − total variation distance, mean over heads."""
    return np.stack([np.minimum(one, weights).sum(-1).mean(-1) for one in weights])


def _keep(found: dict[int, Tensor], layer: int, batch: tokens.Batch) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        rows = torch.arange(len(batch), device=value.device)
        found[layer] = value[rows, :, batch.last.to(value.device)]  # [fact, head, key]

    return hook


def _roles(batch: tokens.Batch) -> Float[Tensor, "fact role token"]:
    """1 where a token has a role; every token up to the last of the prompt has exactly one."""
    first, subject, last = (x[:, None] for x in (batch.first, batch.subject, batch.last))
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    roles = [
        at < first,
        (at >= first) & (at < subject),
        at == subject,
        (at > subject) & (at < last),
        (at == last) & (last > subject),
    ]
    return torch.stack(roles, dim=1).float()


def _table(weights: Tensor, roles: Tensor, facts: Tensor, layer: int) -> pd.DataFrame:
    by_role = torch.einsum("fht,frt->fhr", weights, roles.to(weights.device)).cpu()
    entropy = torch.special.entr(weights).sum(-1).cpu()
    n, heads, _ = by_role.shape
    table = pd.DataFrame(by_role.flatten(0, 1).numpy(), columns=pd.Index(ROLES))
    table.insert(0, "fact", np.repeat(facts.numpy(), heads))
    table.insert(1, "layer", layer)
    table.insert(2, "head", np.tile(np.arange(heads), n))
    return table.assign(entropy=entropy.flatten().numpy())
