"""Second moments `C = E[k kᵀ]` of the keys at every site, streamed in one pass over text.

The second moment says which directions of a projection's input are in use; solvers avoid changing
what comes out of them. It is uncentred, over all tokens of a text sample (paper: 100,000 Wikipedia
texts for GPT-J). A `Moment` is a sum and a count: samples can be merged in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import container
from pmet_lens.adapter import Model, Projection, Site
from pmet_lens.hparams import known_hparams

OnTokens = Callable[[int, int], object]
FORMAT = "pmet_lens moments 1"


class MomentError(ValueError):
    """Text or a file from which no second moment can be had; the message says what to do."""


@dataclass(frozen=True)
class Moment:
    """The running second moment of one site."""

    total: Float[Tensor, "d_in d_in"]
    """Σ k kᵀ, float64."""
    count: int
    """Tokens in the sum."""

    @property
    def value(self) -> Float[Tensor, "d_in d_in"]:
        """E[k kᵀ]."""
        return self.total / self.count

    def __add__(self, other: Moment) -> Moment:
        """The moment of both samples together."""
        return Moment(self.total + other.total, self.count + other.count)


def second_moments(
    model: Model,
    texts: Iterable[str],
    layers: Sequence[int] | None = None,
    *,
    projections: Sequence[Projection] = get_args(Projection),
    n_tokens: int | None = 100_000,
    max_length: int = 128,
    batch_tokens: int = 2048,
    on_tokens: OnTokens | None = None,
) -> dict[Site, Moment]:
    """Second moments of all sites of `layers` in one pass that stops behind the highest one.

    Args:
        texts: any number of texts; reading ends after `n_tokens` tokens (None: all of them).
        layers: None takes every layer of this model's PMET settings (`pl.HPARAMS`).
        max_length: longer texts are cut to this many tokens.
        batch_tokens: padded tokens per forward pass.
        on_tokens: called with (tokens so far, `n_tokens` or 0) after every batch.

    Raises:
        MomentError: if the texts hold no token or are one string, or a key is not finite.
    """
    if isinstance(texts, str):
        raise MomentError("texts is one string; pass a list of texts, or pl.texts(path).")
    if layers is None:
        layers = known_hparams(model, "PMET").layers
    sites = [Site(model.check_layer(n), p) for n in sorted(set(layers)) for p in projections]
    totals = {
        s: torch.zeros(model.d_in(s), model.d_in(s), dtype=torch.float64, device=model.device)
        for s in sites
    }
    stop, count = 1 + max(s.layer for s in sites), 0
    for ids, mask in _batches(model, texts, n_tokens, max_length, batch_tokens):
        hooks = [(model.key_hook(s), _adder(totals[s], mask.bool(), s)) for s in sites]
        with torch.no_grad():
            model.forward(ids, mask, hooks=hooks, stop_at_layer=stop)
        count += int(mask.sum())
        if on_tokens is not None:
            on_tokens(count, n_tokens or 0)
    if count == 0:
        raise MomentError("The texts hold no token; pass an iterable of non-empty strings.")
    return {s: Moment(total, count) for s, total in totals.items()}


def _adder(total: Tensor, used: Tensor, site: Site) -> Callable[[Tensor], None]:
    def hook(keys: Tensor) -> None:
        k = keys[used].to(total.dtype)
        total.addmm_(k.T, k)
        # The first row meets every entry of a key.
        if not bool(torch.isfinite(total[0]).all()):
            raise MomentError(f"The keys at site {site} are not finite: check the model's weights.")

    return hook


def _batches(
    model: Model, texts: Iterable[str], n_tokens: int | None, max_length: int, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded batches of about `batch_tokens`, sorted by length within a window."""
    left = n_tokens if n_tokens is not None else float("inf")
    limit = min(max_length, model.n_positions)
    window: list[list[int]] = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"][: int(min(limit, left))]
        left -= len(ids)
        if ids:
            window.append(ids)
        if sum(map(len, window)) >= 8 * batch_tokens or left <= 0:
            yield from _padded(model, window, batch_tokens)
            window = []
        if left <= 0:
            return
    yield from _padded(model, window, batch_tokens)


def _padded(
    model: Model, window: list[list[int]], batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    window = sorted(window, key=len)
    while window:
        rows: list[list[int]] = []
        while window and (len(rows) + 1) * len(window[0]) <= max(batch_tokens, len(window[0])):
            rows.append(window.pop(0))
        width = len(rows[-1])
        ids = torch.tensor([r + [model.tokenizer.pad_token_id] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        yield ids.to(model.device), mask.to(model.device)


def save_moments(moments: Mapping[Site, Moment], path: str | Path, model_name: str = "") -> None:
    """Write moments to a `.safetensors` file (float64 sums, counts in the header)."""
    tensors = {str(s): m.total.cpu().contiguous() for s, m in moments.items()}
    head = {
        "format": FORMAT,
        "model": model_name,
        "counts": {str(s): m.count for s, m in moments.items()},
    }
    container.write(path, tensors, head, "second moments", MomentError)


def load_moments(path: str | Path) -> dict[Site, Moment]:
    """Read what `save_moments` wrote.

    Raises:
        MomentError: for a file that is missing, damaged, or holds no moments.
    """
    head, tensors = container.read(path, FORMAT, "second moments", MomentError)
    return {Site.parse(s): Moment(tensors[s], n) for s, n in head["counts"].items()}
