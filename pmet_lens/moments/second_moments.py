"""Second moments `C = E[k kᵀ]` of the keys at every site, streamed in one pass over text.

The second moment says which directions of a projection's input are in use; solvers avoid changing
what comes out of them. It is uncentred, over all tokens of a text sample (paper: 100,000 Wikipedia
texts for GPT-J). A `Moment` is a sum and a count: samples can be merged in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.editing import solvers
from pmet_lens.editing.methods import known_hparams
from pmet_lens.models import tokens
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model, Projection, Site

OnTokens = Callable[[int, int], object]
_N_PROBES, _LEAST_SHARDS, _SHARD = 16, 4, 2


class MomentError(ValueError):
    """Text or a file from which no second moment can be had; the message says what to do."""


@dataclass(frozen=True)
class Moment:
    """The running second moment of one site."""

    total: Float[Tensor, "d_in d_in"]
    """Σ k kᵀ, in the dtype it was summed in (float64, or float32 where asked for)."""
    count: int
    """Tokens in the sum."""
    shards: int = 0
    """Parts of the text whose differences `error` is estimated from; 0: not known."""
    squares: float = 0.0
    """Σ over the shards of tokens · ‖C_shard Z‖², for the fixed random `_probes` Z."""
    max_length: int | None = None
    """Tokens at which texts were cut; None: not known, or several."""

    @property
    def value(self) -> Float[Tensor, "d_in d_in"]:
        """E[k kᵀ]."""
        return self.total / self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """[d_in, d_in]."""
        return tuple(self.total.shape)

    def matrix(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """`value` on a device, as solvers ask for it (`solvers.SecondMoment`)."""
        return self.total.to(device or self.total.device) / self.count

    def cholesky(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """Its lower Cholesky factor, float64; computed once."""
        if "_dense" not in self.__dict__:
            self.__dict__["_dense"] = solvers.Dense(self.value)
        return self.__dict__["_dense"].cholesky(device)

    @property
    def error(self) -> float:
        """Estimated relative standard error of `value` in the Frobenius norm, from how much the
        shards of text differ; NaN with fewer than two."""
        if self.shards < 2:
            return float("nan")
        probed = float((self.value.double() @ _probes(self.total)).square().sum())
        return _standard_error(self.squares, probed, self.count, self.shards)

    def __add__(self, other: Moment) -> Moment:
        """The moment of both samples together."""
        known = self.shards and other.shards
        return Moment(
            self.total + other.total,
            self.count + other.count,
            self.shards + other.shards if known else 0,
            self.squares + other.squares,
            self.max_length if self.max_length == other.max_length else None,
        )


def _standard_error(squares: float, probed: float, count: int, shards: int) -> float:
    """Of the mean over shards, relative to it: `squares` as in `Moment`, `probed` = ‖C Z‖²."""
    between = max(squares - count * probed, 0.0)
    return (between / (count * (shards - 1)) / probed) ** 0.5


def _probes(like: Tensor) -> Float[Tensor, "d_in probe"]:
    """Fixed random vectors: ‖M Z‖² / their number has the mean ‖M‖² in the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(like), _N_PROBES)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device)


def second_moments(
    model: Model,
    texts: Iterable[str],
    layers: Sequence[int] | None = None,
    *,
    projections: Sequence[Projection] = get_args(Projection),
    n_tokens: int | None = 100_000,
    max_length: int = 128,
    batch_tokens: int = 2048,
    dtype: torch.dtype = torch.float64,
    precision: float | None = None,
    on_tokens: OnTokens | None = None,
) -> dict[Site, Moment]:
    """Second moments of all sites of `layers` in one pass that stops behind the highest one.

    Args:
        texts: any number of texts; reading ends after `n_tokens` tokens (None: all of them).
        layers: None takes every layer of this model's PMET settings (`pl.HPARAMS`).
        max_length: longer texts are cut to this many tokens.
        batch_tokens: padded tokens per forward pass.
        dtype: what is summed in: float64, or float32 (half the memory and, on a CPU, half the time
            of the products; a singular moment may then look regular).
        precision: stop before `n_tokens` as soon as `Moment.error` of every site is at most this
            (0.03, say; at least four shards of 2 · `batch_tokens` tokens are read).
        on_tokens: called with (tokens so far, `n_tokens` or 0) after every batch.

    Raises:
        MomentError: if the texts hold no token or are one string, or a key is not finite.
    """
    run = Summing(model, layers, projections, n_tokens, max_length, batch_tokens, dtype, precision)
    for _ in run.read(texts, on_tokens):
        pass
    return run.moments()


class Summing:
    """Second moments while texts are read: what `second_moments` does, shard of text by shard, so
    that it can be kept on the way and gone on with (`moment_files.kept_moments`)."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[int] | None = None,
        projections: Sequence[Projection] = get_args(Projection),
        n_tokens: int | None = 100_000,
        max_length: int = 128,
        batch_tokens: int = 2048,
        dtype: torch.dtype = torch.float64,
        precision: float | None = None,
    ) -> None:
        """The arguments of `second_moments`; raises as it does."""
        if dtype not in (torch.float32, torch.float64):
            raise MomentError(f"second moments are summed in float32 or float64, not {dtype}.")
        if precision is not None and not precision > 0:
            raise MomentError(f"precision must be greater than 0, not {precision}.")
        if layers is None:
            layers = known_hparams(model, "PMET").layers
        self.model, self.n_tokens, self.batch_tokens = model, n_tokens, batch_tokens
        self.precision, self.max_length = precision, min(max_length, model.n_positions)
        sites = [Site(model.check_layer(n), p) for n in sorted(set(layers)) for p in projections]
        self.sums = {s: _Sum(model.d_in(s), dtype, model.weight(s).device, s) for s in sites}
        self.count, self.n_texts = 0, 0
        self.read_texts = ""
        """What was read so far: a hash of the text before and the next text, again and again."""

    def read(self, texts: Iterable[str], on_tokens: OnTokens | None = None) -> Iterator[int]:
        """Go on with `texts`; gives the number of tokens read so far behind every shard."""
        if isinstance(texts, str):
            raise MomentError("texts is one string; pass a list of texts, or pl.texts(path).")
        stop = 1 + max(site.layer for site in self.sums)
        shards = self._shards(texts)
        while not self._precise() and (shard := next(shards, None)) is not None:
            (chosen, rows), before = shard, self.count
            for chunk in tokens.chunks([len(row) for row in rows], self.batch_tokens):
                ids, mask = tokens.pad(self.model, [rows[i] for i in chunk])
                self._add(ids, mask, stop)
                self.count += int(mask.sum())
                if on_tokens is not None:
                    on_tokens(self.count, self.n_tokens or 0)
            self.n_texts += len(chosen)
            self.read_texts = chained(self.read_texts, chosen)
            for one in self.sums.values():
                one.end_of_shard(self.count - before)
            yield self.count
        if self.count == 0:
            raise MomentError("The texts hold no token; pass an iterable of non-empty strings.")

    def _precise(self) -> bool:
        errors = [one.error for one in self.sums.values()]
        return self.precision is not None and max(errors) <= self.precision

    def moments(self) -> dict[Site, Moment]:
        """What was summed."""
        return {s: one.moment(self.max_length) for s, one in self.sums.items()}

    def _add(self, ids: Tensor, mask: Tensor, stop: int) -> None:
        """One batch; in halves where it does not fit into memory. A site that had its keys before
        that happened does not get them twice."""
        had: dict[Site, set[int]] = {site: set() for site in self.sums}

        def some(rows: Sequence[int]) -> None:
            width = int(mask[list(rows)].sum(1).max())
            used = mask[list(rows), :width].bool()
            hooks = [
                (self.model.key_hook(site), _once(one.adder(used), had[site], rows))
                for site, one in self.sums.items()
            ]
            with torch.no_grad():
                own = ids[list(rows), :width]
                self.model.forward(own, used.long(), hooks=hooks, stop_at_layer=stop)

        halving(range(len(ids)), some, "texts")

    def _shards(self, texts: Iterable[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
        """Parts of the text of about `_SHARD` · `batch_tokens` tokens, and their tokens."""
        left = float("inf") if self.n_tokens is None else self.n_tokens - self.count
        chosen: list[str] = []
        window: list[list[int]] = []
        for text in texts if left > 0 else ():
            ids = self.model.tokenizer(text)["input_ids"][: int(min(self.max_length, left))]
            left -= len(ids)
            chosen.append(text)
            if ids:
                window.append(ids)
            if sum(map(len, window)) >= _SHARD * self.batch_tokens or left <= 0:
                yield chosen, window
                chosen, window = [], []
            if left <= 0:
                return
        if window:
            yield chosen, window


def chained(before: str, texts: Iterable[str]) -> str:
    """A hash of texts read in this order, behind what the hash `before` stands for."""
    for text in texts:
        before = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return before


def _once(
    add: Callable[[Tensor], None], had: set[int], rows: Sequence[int]
) -> Callable[[Tensor], None]:
    """`add`, unless these rows had their turn."""

    def hook(keys: Tensor) -> None:
        if not had.issuperset(rows):
            add(keys)
            had.update(rows)

    return hook


class _Sum:
    """The sum of one site while texts are read: the upper blocks of Σ k kᵀ, and what the shards of
    text look like through a few random vectors, which costs next to nothing."""

    def __init__(self, d_in: int, dtype: torch.dtype, device: torch.device, site: Site) -> None:
        self.total = torch.zeros(d_in, d_in, dtype=dtype, device=device)
        self.site, self.count, self.shards, self.squares = site, 0, 0, 0.0
        self._probes = _probes(self.total)
        self._all, self._own = torch.zeros_like(self._probes), torch.zeros_like(self._probes)

    def adder(self, used: Tensor) -> Callable[[Tensor], None]:
        """A hook that adds the keys of the `used` tokens."""

        def hook(keys: Tensor) -> None:
            k = keys[used.to(keys.device)].to(self.total)
            own = (k.T @ (k @ self._probes.to(k.dtype))).double()
            # In place, so that nothing behind this line can run out of memory.
            solvers.add_gram(self.total, k)
            self._own += own
            # The first row meets every entry of a key.
            if not bool(torch.isfinite(self.total[0]).all()):
                raise MomentError(
                    f"The keys at site {self.site} are not finite: check the model's weights."
                )

        return hook

    def end_of_shard(self, count: int) -> None:
        """Count the shard of `count` tokens."""
        if count == 0:
            return
        self.count, self.shards = self.count + count, self.shards + 1
        self.squares += float(self._own.square().sum()) / count
        self._all += self._own
        self._own.zero_()

    @property
    def error(self) -> float:
        """The relative standard error so far, infinite while there are too few shards to tell."""
        if self.shards < _LEAST_SHARDS:
            return float("inf")
        probed = float((self._all / self.count).square().sum())
        return _standard_error(self.squares, probed, self.count, self.shards)

    def moment(self, max_length: int) -> Moment:
        """What was summed."""
        total = solvers.mirrored(self.total)
        return Moment(total, self.count, self.shards, self.squares, max_length)

    def state(self) -> tuple[dict[str, Tensor], list[float]]:
        """All that `restore` needs, at the end of a shard."""
        numbers = [float(self.count), float(self.shards), self.squares]
        return {"total": self.total, "all": self._all}, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Sequence[float]) -> None:
        """The inverse of `state`."""
        self.total.copy_(tensors["total"])
        self._all.copy_(tensors["all"])
        self.count, self.shards, self.squares = int(numbers[0]), int(numbers[1]), numbers[2]
