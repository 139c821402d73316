"""How a model takes given answers, token by token of the right one (teacher forcing).

Prompts of many facts share a forward pass, sorted by length. Each distinct (prompt, answer) is
scored once, and answers that need the same tokens to be read, as all answers of one token to one
prompt do, share one row of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from pmet_lens.data.progress import Tell, shown
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model

_Key = tuple[str, str | None, bool | None]
_Pairs = Sequence[tuple[int, int]]
_AT_ONCE = 2048  # prompts encoded together


@dataclass(frozen=True)
class Score:
    """How a model takes one answer to one prompt, under teacher forcing."""

    nll: float
    """Mean −log P per target token, nats, ≥ 0; lower is likelier."""
    right: float
    """Share of the target tokens that are the argmax, 0 to 1."""


@shown("scoring answers", "answer", "on_prompts")
def score(
    model: Model,
    prompts: Sequence[tokens.Prompt],
    *,
    batch_tokens: int | None = None,
    on_prompts: Tell | None = None,
) -> list[Score]:
    """Score every prompt's target, each distinct (text, target) once, in passes of `batch_tokens`
    padded tokens (None: 2,048 on a CPU, 32,768 elsewhere; fewer of a large vocabulary).
    `on_prompts(scored so far, all)` counts distinct (text, target)."""
    if batch_tokens is None:
        batch_tokens = 2048 if model.device.type == "cpu" else 32768
    distinct = {_key(p): tokens.Prompt(p.text, None, p.target, p.blank) for p in prompts}
    # The answers to one text stand side by side, and texts of about one length.
    keys = sorted(distinct, key=lambda key: (len(key[0]), key[0], key[1] or "", str(key[2])))
    scores: dict[_Key, Score] = {}
    while len(scores) < len(keys):
        start = stop = len(scores)
        while stop < len(keys) and (stop < start + _AT_ONCE or keys[stop][0] == keys[stop - 1][0]):
            stop += 1
        batch = tokens.encode(model, [distinct[key] for key in keys[start:stop]])
        for pairs in _shared_rows(batch, batch_tokens, likelihood.readable(model)):
            parts = halving(pairs, partial(_score_rows, model, batch), "prompts")
            new = [one for part in parts for one in part]
            scores.update(zip([keys[start + row] for row, _ in pairs], new, strict=True))
            if on_prompts is not None:
                on_prompts(len(scores), len(keys))
    return [scores[_key(p)] for p in prompts]


def _key(prompt: tokens.Prompt) -> _Key:
    """What two prompts with the same score have in common."""
    return prompt.text, prompt.target, prompt.blank


def _shared_rows(batch: tokens.Batch, budget: int, readable: int) -> Iterator[_Pairs]:
    """(row, host) pairs of `batch` to be scored in one pass: a row is read from its host, which
    begins with it, because what follows cannot change it (causal attention)."""
    ids = [row[:n] for row, n in zip(batch.ids.tolist(), batch.mask.sum(1).tolist(), strict=True)]
    readers: dict[int, list[int]] = {}
    host = -1
    # In sorted order a row that begins others stands right before one of them.
    for row in sorted(range(len(ids)), key=ids.__getitem__, reverse=True):
        if host < 0 or ids[host][: len(ids[row])] != ids[row]:
            host = row
        readers.setdefault(host, []).append(row)
    hosts, scored = sorted(readers), batch.scored.cpu()
    lengths = [len(ids[host]) for host in hosts]
    reads = [int(scored[readers[host]].any(0).sum()) for host in hosts]
    for chunk in tokens.chunks(lengths, budget, reads=reads, readable=readable):
        yield [(row, hosts[i]) for i in chunk for row in readers[hosts[i]]]


def _score_rows(model: Model, batch: tokens.Batch, pairs: _Pairs) -> list[Score]:
    """The scores of the rows of (row, host) `pairs`."""
    chosen, host = torch.tensor(pairs, device=batch.ids.device).T
    hosts, host_row = torch.unique(host, return_inverse=True)
    run, labels = batch[hosts], batch.labels[chosen]
    row, place = (labels != -100).nonzero(as_tuple=True)
    at, which = torch.unique(torch.stack([host_row[row], place], 1), dim=0, return_inverse=True)
    logits = model.logits_at(run.ids, run.mask, at)
    wanted = labels[row, place]
    nll = -likelihood.log_probs(logits)[which, wanted].double()
    right = (logits.argmax(-1)[which] == wanted).double()
    n = torch.bincount(row, minlength=len(chosen))
    nll, right = (likelihood.row_sums(v, row, len(chosen)) / n for v in (nll, right))
    return [Score(a, b) for a, b in zip(nll.tolist(), right.tolist(), strict=True)]


def last_places(batch: tokens.Batch) -> Int[Tensor, "row 2"]:
    """(row, token) of the last prompt token of every row, as `Model.forward` takes them."""
    return torch.stack([torch.arange(len(batch), device=batch.last.device), batch.last], dim=1)
