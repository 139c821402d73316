"""The second moment `C = E[k kᵀ]` of one site's keys, as a value and while it is summed.

It says which directions of a projection's input ordinary text uses; solvers avoid changing the
outputs there. It is uncentred. A `Moment` is a sum and a count: samples can be merged in any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.editing import solvers
from pmet_lens.models.model import Site

_N_PROBES = 16
"""Random vectors through which the shards of text are compared: an estimate within about a third,
for 16 products of a key instead of d_in."""
_LEAST_SHARDS = 4
"""Before `precision` may end the reading."""


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
        return self._dense.cholesky(device)

    @cached_property
    def _dense(self) -> solvers.Dense:
        return solvers.Dense(self.value)

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


class SiteSum:
    """The sum of one site while texts are read: the upper blocks of Σ k kᵀ, and the products of the
    shards with a few random vectors, from which the error is estimated at next to no cost."""

    def __init__(self, site: Site, d_in: int, dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(d_in, d_in, dtype=dtype, device=device)
        self.site, self.count, self.shards, self.squares = site, 0, 0, 0.0
        self._probes = _probes(self.total)
        self._probed, self._shard = torch.zeros_like(self._probes), torch.zeros_like(self._probes)

    def add(self, keys: Float[Tensor, "token d_in"]) -> None:
        """Add these keys to the shard."""
        k = keys.to(self.total)
        probed = (k.T @ (k @ self._probes.to(k.dtype))).double()
        # In place, so that nothing after this line can run out of memory.
        solvers.add_gram(self.total, k)
        self._shard += probed
        # The first row meets every entry of a key.
        if not bool(torch.isfinite(self.total[0]).all()):
            raise MomentError(
                f"The keys at site {self.site} are not finite: check the model's weights."
            )

    def end_shard(self, count: int) -> None:
        """Count the shard of `count` tokens."""
        if count == 0:
            return
        self.count, self.shards = self.count + count, self.shards + 1
        self.squares += float(self._shard.square().sum()) / count
        self._probed += self._shard
        self._shard.zero_()

    @property
    def error(self) -> float:
        """The relative standard error so far, infinite while there are too few shards to tell."""
        if self.shards < _LEAST_SHARDS:
            return float("inf")
        probed = float((self._probed / self.count).square().sum())
        return _standard_error(self.squares, probed, self.count, self.shards)

    def moment(self, max_length: int) -> Moment:
        """The moment of all shards."""
        total = solvers.mirrored(self.total)
        return Moment(total, self.count, self.shards, self.squares, max_length)

    def state(self) -> tuple[dict[str, Tensor], list[float]]:
        """All that `restore` needs, at the end of a shard."""
        numbers = [float(self.count), float(self.shards), self.squares]
        return {"total": self.total, "all": self._probed}, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Sequence[float]) -> None:
        """The inverse of `state`."""
        self.total.copy_(tensors["total"])
        self._probed.copy_(tensors["all"])
        self.count, self.shards, self.squares = int(numbers[0]), int(numbers[1]), numbers[2]


def _standard_error(squares: float, probed: float, count: int, shards: int) -> float:
    """Of the mean over shards, relative to it: `squares` as in `Moment`, `probed` = ‖C Z‖²."""
    between = max(squares - count * probed, 0.0)
    return (between / (count * (shards - 1)) / probed) ** 0.5


def _probes(like: Tensor) -> Float[Tensor, "d_in probe"]:
    """Fixed random vectors: ‖M Z‖² / their number has the mean ‖M‖² in the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(like), _N_PROBES)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device)
