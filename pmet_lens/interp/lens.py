"""What a component says in the model's vocabulary: the logit lens, stream by stream.

A vector of the residual stream, or what a component writes into it, is read through the model's
final norm and unembedding, as if the model ended there (TransformerLens's `logit_readout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError, with_answer
from pmet_lens.interp import passes
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.activations import Position, probe
from pmet_lens.models.bridge import head_together, unembedded
from pmet_lens.models.model import Model, ModelError, Stream
from pmet_lens.models.sites import several

Answer = Literal["target_true", "target_new"]
ROWS_PER_CHUNK = 256
VALUES_PER_CHUNK = 32_000_000
"""Logits at a time: 128 MB in float32, whatever the size of the vocabulary."""


def lens(
    model: Model,
    facts: Fact | Sequence[Fact],
    streams: Stream | Sequence[Stream] | None = None,
    layers: int | Sequence[int] | None = None,
    positions: Position | Sequence[Position] = ("last_subject", "last"),
    *,
    k: int = 5,
    answer: Answer = "target_true",
) -> pd.DataFrame:
    """How each stream ranks the answer at each layer and position, and what it says first.

    `streams` None: both component outputs and the residual stream. "attn_out" and "mlp_out" are
    here what the component adds to the residual stream, after a post-norm where there is one, so
    that what is read is a part of the stream the model reads. The answer is the first token of the
    fact's `answer`. One row per fact, stream, position and layer: columns fact, subject,
    relation, stream, position, layer, rank (1: the argmax), probability (0 to 1), top (the `k`
    likeliest tokens, a tuple of strings).

    Facts without that answer are left out, with a warning. Raises `FactError` where none has it,
    `ModelError` as `probe` does.
    """
    shown: list[Stream] = several(all_streams(model) if streams is None else streams)
    positions, chosen = several(positions), with_answer(facts, answer, "lens")
    asked = list(chosen.values())
    activations = probe(model, asked, [added(s) for s in shown], layers, positions)
    wanted = first_tokens(model, asked, answer)
    pairs: list[tuple[Stream, Position]] = [(s, p) for s in shown for p in positions]
    states = torch.stack([activations[added(s), p] for s, p in pairs]).transpose(1, 2)
    every = wanted.expand(*states.shape[:2], len(wanted))
    # One readout for all rows: each goes through the whole vocabulary.
    read = _answers(model, states.flatten(0, 2), every.flatten(), k)
    places = [
        {"fact": i, "subject": fact.subject, "relation": fact.relation}
        | {"stream": stream, "position": position, "layer": layer}
        for stream, position in pairs
        for layer in activations.layers
        for i, fact in chosen.items()
    ]
    return pd.DataFrame(places).assign(**read)


def lens_tokens(
    model: Model,
    fact: Fact | Sequence[Fact],
    streams: Stream | Sequence[Stream] | None = None,
    layers: int | Sequence[int] | None = None,
    *,
    answer: Answer = "target_true",
) -> pd.DataFrame:
    """As `lens` for one fact, at every token of its prompt instead of chosen positions.

    One row per stream, layer and token: columns stream, layer, position (of the token, from 0),
    token (its text), rank (of the answer's first token, 1: the argmax), probability (0 to 1), top
    (the likeliest token's text); of a list of facts also fact (number) and subject. Raises as
    `lens` does.
    """
    if not isinstance(fact, Fact):
        return passes.each(
            fact, lambda one: lens_tokens(model, one, streams, layers, answer=answer)
        )
    streams = all_streams(model) if streams is None else several(streams)
    layers = passes.layers_of(model, layers, "lens_tokens")
    if not streams:
        raise ModelError("lens_tokens needs at least one stream")
    wanted = first_tokens(model, [fact], answer)
    batch, texts = tokens.shown(model, fact)
    points = {(s, n): model.stream_hook(n, added(s)) for s in streams for n in layers}
    values = passes.capture(model, batch, points, lambda v: v[0].to(model.device))
    states = torch.cat(list(values.values()))
    ranked = _answers(model, states, wanted.expand(len(states)), 1)
    places = [
        {"stream": stream, "layer": layer, "position": position, "token": token}
        for stream, layer in values
        for position, token in enumerate(texts)
    ]
    return pd.DataFrame(places).assign(**{**ranked, "top": [token for (token,) in ranked["top"]]})


def added(stream: Stream) -> Stream:
    """Of a component's output what it adds to the residual stream; any other stream itself."""
    reaching: dict[Stream, Stream] = {"attn_out": "attn_added", "mlp_out": "mlp_added"}
    return reaching.get(stream, stream)


def all_streams(model: Model) -> tuple[Stream, ...]:
    """Both component outputs and every point of the residual stream that the model has."""
    middle: tuple[Stream, ...] = () if model.parallel_blocks else ("resid_mid",)
    return ("attn_out", "mlp_out", "resid_pre", *middle, "resid_post")


def first_tokens(
    model: Model, facts: Sequence[Fact], answer: Answer = "target_true"
) -> Int[Tensor, " fact"]:
    """The first token of each fact's answer, as the model would have to say it after the prompt."""
    for fact in facts:
        if getattr(fact, answer) is None:
            raise FactError(f"{fact.text!r} has no {answer}.")
    prompts = [tokens.Prompt(f.prompt, f.subject, getattr(f, answer), f.blank) for f in facts]
    batch = tokens.encode(model, prompts)
    return batch.labels[torch.arange(len(batch), device=model.device), batch.last]


def logits(model: Model, states: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead vocab"]:
    """`states` through the final norm and the unembedding (soft caps included)."""
    return _readout(model, states).values


def top_tokens(
    model: Model, states: Float[Tensor, "*lead d_model"], k: int
) -> Int[Tensor, "*lead k"]:
    """The `k` tokens that `states` make likeliest through the final norm and the unembedding."""
    top = _readout(model, states, top_k=min(k, len(model.embedding))).top_ids
    assert top is not None
    return top


def _answers(
    model: Model, states: Float[Tensor, "fact d_model"], wanted: Int[Tensor, " fact"], k: int
) -> dict[str, list[Any]]:
    """Columns: rank (from 1) and probability of each wanted token, and the `k` likeliest tokens.

    Equal rows are read once: what leaves a block enters the next one."""
    asked = torch.cat([likelihood.at_least_float32(states), wanted[:, None].to(states.device)], 1)
    distinct, place = asked.unique(dim=0, return_inverse=True)
    states, wanted = distinct[:, :-1].to(states.dtype), distinct[:, -1].long()
    rows = max(1, VALUES_PER_CHUNK // len(model.embedding))
    columns: dict[str, list[Any]] = {"rank": [], "probability": [], "top": []}
    for some, tokens_wanted in zip(states.split(rows), wanted.split(rows), strict=True):
        read = _logits(model, some)
        value = read.gather(1, tokens_wanted[:, None].to(read.device))
        columns["rank"] += ((read > value).sum(1) + 1).tolist()
        columns["probability"] += (value[:, 0] - read.logsumexp(-1)).exp().tolist()
        columns["top"] += read.topk(min(k, read.shape[1])).indices.tolist()
    texts = {token: model.tokenizer.decode([token]) for row in columns["top"] for token in row}
    columns["top"] = [tuple(texts[token] for token in row) for row in columns["top"]]
    return {name: [column[i] for i in place.tolist()] for name, column in columns.items()}


def _logits(model: Model, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """As `logits`, once: TransformerLens's readout computes more than is asked for here, and is
    asked for the first row alone, whether the model has one and whether this is it."""
    checked = _readout(model, states[:1]).values
    read = likelihood.at_least_float32(unembedded(model.bridge, states))
    if not torch.allclose(read[:1], checked.to(read), rtol=1e-2, atol=1e-2):
        return _readout(model, states).values
    return read


def _readout(model: Model, states: Tensor, **options: Any) -> Any:
    from transformer_lens.tools.analysis import logit_readout

    try:
        with head_together(model.bridge):
            rows = min(ROWS_PER_CHUNK, max(1, VALUES_PER_CHUNK // len(model.embedding)))
            return logit_readout(model.bridge, states, chunk_size=rows, **options)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"{model.name!r} has no readout for single vectors: {error}") from error
