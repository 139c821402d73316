"""Second moments of the keys at every site, over all tokens of a text sample, in one pass (paper:
100,000 Wikipedia texts for GPT-J)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from pmet_lens.data.datasets import WorldTexts
from pmet_lens.data.progress import Tell, shown
from pmet_lens.editing.methods import known_hparams
from pmet_lens.models import tokens
from pmet_lens.models.loading import of_the_world
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.models.sites import several
from pmet_lens.moments.moment import Moment as Moment
from pmet_lens.moments.moment import MomentError as MomentError
from pmet_lens.moments.moment import SiteSum

BOTH: tuple[Projection, ...] = get_args(Projection)
_SHARD = 2
"""Batches in a shard of text."""


@shown("second moments", "token", "on_tokens")
def second_moments(
    model: Model,
    texts: Iterable[str],
    layers: int | Sequence[int] | None = None,
    *,
    projections: Projection | Sequence[Projection] = BOTH,
    n_tokens: int | None = 100_000,
    max_length: int = 128,
    batch_tokens: int = 2048,
    dtype: torch.dtype = torch.float64,
    precision: float | None = None,
    first_tokens: bool = True,
    on_tokens: Tell | None = None,
) -> dict[Site, Moment]:
    """Second moments of all sites of `layers` in one pass that stops after the highest one.

    Args:
        texts: any number of texts; reading ends after `n_tokens` tokens (None: all of them).
        layers: None takes every layer of this model's PMET settings (`pl.HPARAMS`).
        max_length: longer texts are cut to this many tokens.
        batch_tokens: padded tokens per forward pass.
        dtype: what is summed in: float64, or float32 (half the memory and, on a CPU, half the time
            of the products; a singular moment may then look regular).
        precision: stop before `n_tokens` as soon as `Moment.error` of every site is at most this
            (0.03, say; at least four shards of 2 · `batch_tokens` tokens are read).
        first_tokens: whether the first token of a text counts (as released). Its key can be far
            larger than all others (an attention sink, whether it is a BOS or not): on SmolLM2-135M
            a third of C at layer 2, where leaving it out changed 20 edits by 3 % and no answer.
        on_tokens: called with (tokens so far, `n_tokens` or 0) after every batch.

    Raises:
        MomentError: if the texts hold no token, are one string or those about the bundled world
            for another model than its own, or a key is not finite.
    """
    how = (n_tokens, max_length, batch_tokens, dtype, precision, first_tokens)
    run = Summing(model, layers, projections, *how)
    for _ in run.read(texts, on_tokens):
        pass
    return run.moments()


@dataclass
class Summing:
    """Second moments while texts are read, with the arguments of `second_moments`: shard by shard,
    so that they can be saved on the way and continued (`moment_files.kept_moments`)."""

    model: Model
    layers: int | Sequence[int] | None = None
    projections: Projection | Sequence[Projection] = BOTH
    n_tokens: int | None = 100_000
    max_length: int = 128
    batch_tokens: int = 2048
    dtype: torch.dtype = torch.float64
    precision: float | None = None
    first_tokens: bool = True

    def __post_init__(self) -> None:
        model = self.model
        if self.dtype not in (torch.float32, torch.float64):
            raise MomentError(f"second moments are summed in float32 or float64, not {self.dtype}.")
        if self.precision is not None and not self.precision > 0:
            raise MomentError(f"precision must be greater than 0, not {self.precision}.")
        layers = known_hparams(model, "PMET").layers if self.layers is None else self.layers
        layers = [model.check_layer(n) for n in sorted(set(several(layers)))]
        self.max_length = min(self.max_length, model.n_positions)
        self.sums = {
            site: SiteSum(site, model.d_in(site), self.dtype, model.weight(site).device)
            for site in (Site(n, p) for n in layers for p in several(self.projections))
        }
        self.count, self.n_texts = 0, 0
        self.read_texts = ""
        """`chained` hash of the texts read so far."""

    def read(self, texts: Iterable[str], on_tokens: Tell | None = None) -> Iterator[int]:
        """Continue with `texts`; yields the number of tokens read so far after every shard."""
        check_fit(self.model, texts)
        shards = self._shards(text_iterator(texts))
        while not self._precise() and (shard := next(shards, None)) is not None:
            (chosen, rows), before = shard, self.count
            for chunk in tokens.chunks([len(row) for row in rows], self.batch_tokens):
                ids, mask = tokens.pad(self.model, [rows[i] for i in chunk])
                self._add(ids, mask)
                self.count += int(mask.sum()) - (0 if self.first_tokens else len(chunk))
                if on_tokens is not None:
                    on_tokens(self.count, self.n_tokens or 0)
            self.n_texts += len(chosen)
            self.read_texts = chained(self.read_texts, chosen)
            for site_sum in self.sums.values():
                site_sum.end_shard(self.count - before)
            yield self.count
        if self.count == 0:
            raise MomentError("The texts hold no token; pass an iterable of non-empty strings.")

    def moments(self) -> dict[Site, Moment]:
        """The moments of the text read so far."""
        return {site: sums.moment(self.max_length) for site, sums in self.sums.items()}

    def _precise(self) -> bool:
        errors = [sums.error for sums in self.sums.values()]
        return self.precision is not None and max(errors) <= self.precision

    def _add(self, ids: Tensor, mask: Tensor) -> None:
        """One batch; in halves where it does not fit into memory. A site that had its keys before
        that happened does not get them twice."""
        done: dict[Site, set[int]] = {site: set() for site in self.sums}

        def some(rows: Sequence[int]) -> None:
            chosen = list(rows)
            width = int(mask[chosen].sum(1).max())
            used = mask[chosen, :width]
            counted = used.bool()
            counted[:, 0] &= self.first_tokens

            def add(site: Site, keys: Tensor) -> None:
                if not done[site].issuperset(chosen):
                    self.sums[site].add(keys[counted.to(keys.device)])
                    done[site].update(chosen)

            hooks = [(self.model.key_hook(site), partial(add, site)) for site in self.sums]
            stop = 1 + max(site.layer for site in self.sums)
            ids_used = ids[chosen, :width]
            with torch.no_grad():
                self.model.forward(ids_used, used.long(), hooks=hooks, stop_at_layer=stop)

        halving(range(len(ids)), some, "texts")

    def _shards(self, texts: Iterator[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Parts of the text of about `_SHARD` · `batch_tokens` tokens, and their tokens."""
        left = float("inf") if self.n_tokens is None else self.n_tokens - self.count
        chosen: list[str] = []
        rows: list[list[int]] = []
        for text in texts if left > 0 else ():
            ids = self.model.tokenizer(text)["input_ids"][: int(min(self.max_length, left))]
            left -= len(ids)
            chosen.append(text)
            if ids:
                rows.append(ids)
            if sum(map(len, rows)) >= _SHARD * self.batch_tokens or left <= 0:
                yield chosen, rows
                chosen, rows = [], []
            if left <= 0:
                return
        if rows:
            yield chosen, rows


def text_iterator(texts: Iterable[str]) -> Iterator[str]:
    """Raises `MomentError` for one string, whose letters would be read one by one."""
    if isinstance(texts, str):
        raise MomentError("texts is one string; pass a list of texts, or pl.texts(path).")
    return iter(texts)


def check_fit(model: Model, texts: Iterable[str]) -> None:
    """Raises `MomentError` for the text about the bundled world with a model of another."""
    if isinstance(texts, WorldTexts) and not of_the_world(model):
        raise MomentError(
            f"this text is about the bundled world, which {model.name!r} knows nothing of. Pass "
            "ordinary text: pl.texts(path) of a file with one text a line, pl.texts(download=True) "
            "(Wikipedia), or the model's own words: pl.sampled_texts(model)."
        )


def chained(before: str, texts: Iterable[str]) -> str:
    """A hash of texts read in this order, after those that the hash `before` stands for."""
    for text in texts:
        before = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return before
