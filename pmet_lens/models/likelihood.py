"""Log-probabilities of answers under teacher forcing, in nats, at least in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.models import memory
from pmet_lens.models.bridge import Hooks
from pmet_lens.models.model import Model
from pmet_lens.models.tokens import Batch

LOGITS, LOGITS_ELSEWHERE = 64_000_000, 512_000_000
"""Numbers in the logits of one pass, on a CPU (256 MB in float32) and on an accelerator. A
vocabulary of 262,144 (Gemma) costs as much as all blocks together, so tokens whose logits are read
are few at a time."""
_PART = 16
"""Of the free memory of an accelerator one such tensor takes at most a 16th: with log-softmax, its
gradient and that of the logits a quarter."""


def readable(
    model: Model, tokens: int | None = None, free: int | None = None, *, copies: int = 1
) -> int:
    """How many of so many tokens (None: of any number) one pass may read the logits of, one at
    least. `free`: bytes of the accelerator (None: ask it); where little is, as much as on a CPU.
    `copies`: how many times as much room as a plain pass each takes (with a gradient: 2)."""
    most = LOGITS if model.device.type == "cpu" else LOGITS_ELSEWHERE
    free = memory.free(model.device) if free is None else free
    if free is not None:
        most = min(LOGITS_ELSEWHERE, max(LOGITS, free // _PART // 4))
    fitting = max(1, most // copies // len(model.embedding))
    return fitting if tokens is None else max(1, min(tokens, fitting))


def rows_at_once(model: Model, batch: Batch, most: int, *, copies: int = 1) -> int:
    """How many rows of `batch` one pass takes: `most`, or what is `readable` of their answers."""
    longest = max(1, int(batch.scored.sum(1).max()))
    return max(1, min(most, readable(model, copies=copies) // longest))


def at_least_float32(value: Tensor) -> Tensor:
    """`value` in float32 where its dtype is narrower."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def log_probs(logits: Float[Tensor, "token vocab"]) -> Float[Tensor, "token vocab"]:
    """log P of every token of the vocabulary."""
    return at_least_float32(logits).log_softmax(-1)


def of_labels(
    log_p: Float[Tensor, "token vocab"], labels: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """log P of one label per row of `log_p`."""
    return log_p.gather(1, labels[:, None])[:, 0]


def row_sums(
    values: Float[Tensor, " token"], row: Int[Tensor, " token"], n_rows: int
) -> Float[Tensor, " row"]:
    """The sum of `values` over the tokens of each row."""
    return values.new_zeros(n_rows).index_add(0, row, values)


def answers(
    model: Model, batch: Batch, hooks: Hooks = (), *, mean: bool = False
) -> Float[Tensor, " row"]:
    """log P of each row's answer, summed over its tokens, or their `mean`.

    Differentiable in what `hooks` bring in.
    """
    return answers_by(
        lambda at: model.forward(batch.ids, batch.mask, hooks=hooks, at=at), batch, mean
    )


def answers_by(
    logits_at: Callable[[Tensor], Tensor], batch: Batch, mean: bool
) -> Float[Tensor, " row"]:
    """The same from whatever pass gives the logits `[n, vocab]` at (row, token) pairs `[n, 2]`."""
    at = batch.scored.nonzero()
    log_p = of_labels(log_probs(logits_at(at)), batch.labels[at[:, 0], at[:, 1]])
    total = row_sums(log_p, at[:, 0], len(batch))
    return total / batch.scored.sum(1) if mean else total
