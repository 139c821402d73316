"""How alike are the state entering and the state leaving MHSA and FFN (the paper's first figure).

The paper compares, over 1,209 known statements, each component's input with its output, as vectors
(cosine) and as vocabulary (Jaccard similarity of the two top-50 token sets), and reads from the
differing profiles that MHSA works as a knowledge extractor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data.facts import Fact
from pmet_lens.evaluation import metrics
from pmet_lens.interp.lens import top_tokens
from pmet_lens.models.activations import Position, probe
from pmet_lens.models.model import Model, ModelError, Stream
from pmet_lens.models.sites import several

Vocabulary = Literal["embedding", "unembedding"]
TOP_K = 50
_COMPONENTS: tuple[tuple[str, Stream, Stream], ...] = (
    ("MHSA", "attn_in", "attn_added"),
    ("FFN", "mlp_in", "mlp_added"),
)
_CHUNK = 256


def component_similarity(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Position | Sequence[Position] = ("last", "last_subject"),
    vocabulary: Vocabulary = "embedding",
    k: int = TOP_K,
) -> pd.DataFrame:
    """Mean similarity of what enters and what leaves each component, per layer.

    Each component's output, as it is added to the residual stream (after a post-norm, where there
    is one), is compared with what *it* reads, after its norm; in parallel blocks the two read the
    same, and this is what the released notebook measures. `vocabulary`: "embedding"
    multiplies the states with the input embedding, without final norm (released); "unembedding"
    takes the model's final norm and unembedding.

    Returns columns layer, component ("MHSA", "FFN"), position, measure ("cosine", −1 to 1;
    "jaccard", 0 to 1), mean, ci_low, ci_high (95 % bootstrap over facts), n.
    """
    if vocabulary not in ("embedding", "unembedding"):
        raise ModelError(f"unknown vocabulary {vocabulary!r}; choose embedding or unembedding")
    positions = several(positions)
    streams: list[Stream] = [s for _, entering, leaving in _COMPONENTS for s in (entering, leaving)]
    activations = probe(model, facts, streams, layers, positions)
    rows = []
    for component, entering, leaving in _COMPONENTS:
        for position in positions:
            before, after = activations[entering, position], activations[leaving, position]
            for n, layer in enumerate(activations.layers):
                pair = before[:, n].to(model.device), after[:, n].to(model.device)
                measured = {
                    "cosine": torch.cosine_similarity(*(x.float() for x in pair), dim=-1),
                    "jaccard": jaccard(*(_top(model, x, vocabulary, k) for x in pair)),
                }
                for measure, values in measured.items():
                    mean = metrics.interval(values.double().cpu().numpy())
                    rows.append((layer, component, position, measure, *mean))
    names = ["layer", "component", "position", "measure", *metrics.INTERVAL]
    return pd.DataFrame(rows, columns=names)


def jaccard(a: Int[Tensor, "row k"], b: Int[Tensor, "row k"]) -> Float[Tensor, " row"]:
    """Jaccard similarity of two sets of `k` different tokens per row: `|a ∩ b| / |a ∪ b|`."""
    shared = (a[:, :, None] == b[:, None, :]).any(-1).sum(-1).double()
    return shared / (a.shape[1] + b.shape[1] - shared)


def _top(
    model: Model, states: Float[Tensor, "row d_model"], vocabulary: Vocabulary, k: int
) -> Int[Tensor, "row k"]:
    if vocabulary == "unembedding":
        return top_tokens(model, states, k)
    embedding = model.embedding
    k = min(k, len(embedding))
    chunks = states.to(embedding).split(_CHUNK)
    return torch.cat([(chunk @ embedding.T).topk(k).indices for chunk in chunks])
