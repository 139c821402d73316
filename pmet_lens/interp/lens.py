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

from pmet_lens.data.facts import Fact, FactError
from pmet_lens.interp import passes
from pmet_lens.models import tokens
from pmet_lens.models.activations import Position, probe
from pmet_lens.models.bridge import head_together
from pmet_lens.models.model import Model, ModelError, Stream

Answer = Literal["target_true", "target_new"]
ROWS_PER_CHUNK = 256


def lens(
    model: Model,
    facts: Sequence[Fact],
    streams: Sequence[Stream] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[Position] = ("last_subject", "last"),
    *,
    k: int = 5,
    answer: Answer = "target_true",
) -> pd.DataFrame:
    """How each stream ranks the answer at each layer and position, and what it says first.

    `streams` None: both component outputs and the residual stream. The answer is the first token
    of the fact's `answer`. One row per fact, stream, position and layer: columns fact, subject,
    relation, stream, position, layer, rank (1: the argmax), probability (0 to 1), top (the `k`
    likeliest tokens, a tuple of strings).

    Raises `FactError` for a fact without that answer, `ModelError` as `probe` does.
    """
    streams = all_streams(model) if streams is None else streams
    activations = probe(model, facts, streams, layers, positions)
    wanted = first_tokens(model, facts, answer)
    frames = []
    for (stream, position), value in activations.values.items():
        for n, layer in enumerate(activations.layers):
            columns: dict[str, Any] = {
                "fact": range(len(facts)),
                "subject": [f.subject for f in facts],
                "relation": [f.relation for f in facts],
                "stream": stream,
                "position": position,
                "layer": layer,
            }
            frames.append(pd.DataFrame({**columns, **_answers(model, value[:, n], wanted, k)}))
    return pd.concat(frames, ignore_index=True)


def lens_tokens(
    model: Model,
    fact: Fact,
    streams: Sequence[Stream] | None = None,
    layers: Sequence[int] | None = None,
    *,
    answer: Answer = "target_true",
) -> pd.DataFrame:
    """As `lens` for one fact, at every token of its prompt instead of chosen positions.

    One row per stream, layer and token: columns stream, layer, position (of the token, from 0),
    token (its text), rank (of the answer's first token, 1: the argmax), probability (0 to 1), top
    (the likeliest token's text). Raises as `lens` does.
    """
    streams = all_streams(model) if streams is None else streams
    layers = passes.layers_of(model, layers, "lens_tokens")
    if not streams:
        raise ModelError("lens_tokens needs at least one stream")
    wanted = first_tokens(model, [fact], answer)
    batch, texts = tokens.shown(model, fact)
    points = {(stream, n): model.stream_hook(n, stream) for stream in streams for n in layers}
    frames = []
    for (stream, layer), value in passes.capture(model, batch, points, lambda v: v[0]).items():
        ranked = _answers(model, value, wanted.expand(len(value)), 1)
        columns: dict[str, Any] = {
            "stream": stream,
            "layer": layer,
            "position": range(len(texts)),
            "token": texts,
        }
        top = [token for (token,) in ranked["top"]]
        frames.append(pd.DataFrame({**columns, **ranked, "top": top}))
    return pd.concat(frames, ignore_index=True)


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
    """Columns: rank (from 1) and probability of each wanted token, and the `k` likeliest tokens."""
    read = _readout(model, states, targets=wanted, return_type="probs")
    top = top_tokens(model, states, k).tolist()
    return {
        "rank": (read.target_ranks[:, 0] + 1).tolist(),
        "probability": read.values[:, 0].tolist(),
        "top": [tuple(model.tokenizer.decode([token]) for token in row) for row in top],
    }


def _readout(model: Model, states: Tensor, **options: Any) -> Any:
    from transformer_lens.tools.analysis import logit_readout

    try:
        with head_together(model.bridge):
            return logit_readout(model.bridge, states, chunk_size=ROWS_PER_CHUNK, **options)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"{model.name!r} has no readout for single vectors: {error}") from error
