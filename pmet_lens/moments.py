"""Second moments `C = E[k kᵀ]` of the keys at every site, streamed in one pass over text.

The second moment says which directions of a projection's input are in use; solvers avoid changing
what comes out of them. It is uncentred, over all tokens of a text sample (paper: 100,000 Wikipedia
texts for GPT-J). A `Moment` is a sum and a count: samples can be merged in any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import container, linalg
from pmet_lens.adapter import Model, Projection, Site
from pmet_lens.hparams import known_hparams

OnTokens = Callable[[int, int], object]
FORMAT = "pmet_lens moments 1"
FACTOR = "pmet_lens factor 1"
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
        """`value` on a device, as solvers ask for it (`linalg.SecondMoment`)."""
        return self.total.to(device or self.total.device) / self.count

    def cholesky(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """Its lower Cholesky factor, float64; computed once."""
        if "_dense" not in self.__dict__:
            self.__dict__["_dense"] = linalg.Dense(self.value)
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
    if isinstance(texts, str):
        raise MomentError("texts is one string; pass a list of texts, or pl.texts(path).")
    if dtype not in (torch.float32, torch.float64):
        raise MomentError(f"second moments are summed in float32 or float64, not {dtype}.")
    if precision is not None and not precision > 0:
        raise MomentError(f"precision must be greater than 0, not {precision}.")
    if layers is None:
        layers = known_hparams(model, "PMET").layers
    sites = [Site(model.check_layer(n), p) for n in sorted(set(layers)) for p in projections]
    sums = {s: _Sum(model.d_in(s), dtype, model.weight(s).device, s) for s in sites}
    stop, count = 1 + max(s.layer for s in sites), 0
    for shard in _shards(model, texts, n_tokens, max_length, batch_tokens):
        own = 0
        for ids, mask in shard:
            used = mask.bool()
            hooks = [(model.key_hook(s), sums[s].adder(used)) for s in sites]
            with torch.no_grad():
                model.forward(ids, mask, hooks=hooks, stop_at_layer=stop)
            own += int(mask.sum())
            if on_tokens is not None:
                on_tokens(count + own, n_tokens or 0)
        count += own
        errors = [one.end_of_shard(own) for one in sums.values()]
        if precision is not None and max(errors) <= precision:
            break
    if count == 0:
        raise MomentError("The texts hold no token; pass an iterable of non-empty strings.")
    limit = min(max_length, model.n_positions)
    return {s: one.moment(limit) for s, one in sums.items()}


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
            linalg.add_gram(self.total, k)
            self._own += (k.T @ (k @ self._probes.to(k.dtype))).double()
            # The first row meets every entry of a key.
            if not bool(torch.isfinite(self.total[0]).all()):
                raise MomentError(
                    f"The keys at site {self.site} are not finite: check the model's weights."
                )

        return hook

    def end_of_shard(self, count: int) -> float:
        """Count the shard of `count` tokens; the relative standard error so far, infinite while
        there are too few to tell."""
        if count == 0:
            return float("inf")
        self.count, self.shards = self.count + count, self.shards + 1
        self.squares += float(self._own.square().sum()) / count
        self._all += self._own
        self._own.zero_()
        if self.shards < _LEAST_SHARDS:
            return float("inf")
        probed = float((self._all / self.count).square().sum())
        return _standard_error(self.squares, probed, self.count, self.shards)

    def moment(self, max_length: int) -> Moment:
        """What was summed."""
        total = linalg.mirrored(self.total)
        return Moment(total, self.count, self.shards, self.squares, max_length)


def _shards(
    model: Model, texts: Iterable[str], n_tokens: int | None, max_length: int, batch_tokens: int
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Parts of the text of about `_SHARD` · `batch_tokens`, each in right-padded batches of about
    `batch_tokens`, sorted by length."""
    left = n_tokens if n_tokens is not None else float("inf")
    limit = min(max_length, model.n_positions)
    window: list[list[int]] = []
    for text in texts:
        ids = model.tokenizer(text)["input_ids"][: int(min(limit, left))]
        left -= len(ids)
        if ids:
            window.append(ids)
        if sum(map(len, window)) >= _SHARD * batch_tokens or left <= 0:
            yield _padded(model, window, batch_tokens)
            window = []
        if left <= 0:
            return
    yield _padded(model, window, batch_tokens)


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
    """Write moments to a `.safetensors` file: the sums in their own dtype; counts, and what else a
    `Moment` knows, in the header."""
    tensors = {str(s): m.total.cpu().contiguous() for s, m in moments.items()}
    head = {
        "format": FORMAT,
        "model": model_name,
        "counts": {str(s): m.count for s, m in moments.items()},
        "read": {str(s): [m.shards, m.squares, m.max_length] for s, m in moments.items()},
        "digests": {name: container.digest(tensor) for name, tensor in tensors.items()},
    }
    container.write(path, tensors, head, "second moments", MomentError)


def load_moments(path: str | Path) -> dict[Site, Moment]:
    """Read what `save_moments` wrote, all of it.

    Raises:
        MomentError: for a file that is missing, damaged, or holds no moments.
    """
    head, tensors = container.read(path, FORMAT, "second moments", MomentError)
    read = head.get("read", {})
    return {
        Site.parse(s): Moment(tensors[s], n, *read.get(s, ())) for s, n in head["counts"].items()
    }


def open_moments(path: str | Path) -> dict[Site, StoredMoment]:
    """The moments of a file, each read when an edit comes to its site and not kept in memory.

    A Cholesky factor that is computed is kept beside the file (`NAME.SITE.factor.safetensors`,
    d_in² · 8 bytes), so that every later edit costs triangular solves only.

    Raises:
        MomentError: for a file that is missing, damaged, or holds no moments.
    """
    head = container.head(path, FORMAT, "second moments", MomentError)
    return {Site.parse(s): StoredMoment(Path(path), s) for s in head["counts"]}


@dataclass(frozen=True)
class StoredMoment:
    """One site's moment in a file (`open_moments`); see `linalg.SecondMoment`."""

    path: Path
    site: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the moment, without reading it."""
        return container.shape(self.path, self.site, "second moments", MomentError)

    def matrix(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """E[k kᵀ], read from the file."""
        head, found = self._read()
        return found.to(device or found.device) / head["counts"][self.site]

    def cholesky(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """Its lower Cholesky factor, float64, read from its file; computed where there is none, or
        one of another moment."""
        head = container.head(self.path, FORMAT, "second moments", MomentError)
        digest = head.get("digests", {}).get(self.site) or container.digest(self._read()[1])
        file = self.path.with_name(f"{self.path.stem}.{self.site}.factor.safetensors")
        what = "the factor of a moment"
        if file.exists() and container.head(file, FACTOR, what, MomentError).get("of") == digest:
            found = container.read(file, FACTOR, what, MomentError)[1]["factor"]
            return found.to(device or found.device)
        factor = linalg.cholesky(self.matrix(device))
        try:
            head = {"format": FACTOR, "of": digest}
            container.write(file, {"factor": factor}, head, what, MomentError)
        except MomentError as error:  # a folder that cannot be written costs time, not the edit
            warnings.warn(f"{error}. The next edit computes it again.", stacklevel=2)
        return factor

    def _read(self) -> tuple[dict[str, Any], Tensor]:
        what = "second moments"
        head, found = container.read(self.path, FORMAT, what, MomentError, [self.site])
        return head, found[self.site]
