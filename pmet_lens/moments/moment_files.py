"""Second moments on disk: kept while they are computed, read whole or site by site.

The file is safetensors with the sums in their own dtype; counts, and what else a `Moment` knows, in
the header.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.editing import solvers
from pmet_lens.models.model import Model, Site
from pmet_lens.moments.second_moments import Moment, MomentError, OnTokens, Summing, chained

FORMAT = "pmet_lens moments 1"
FACTOR = "pmet_lens factor 1"
PART = "pmet_lens moments, begun 1"
_WHAT = "second moments"


def kept_moments(
    path: str | Path,
    model: Model,
    texts: Iterable[str],
    layers: Sequence[int] | None = None,
    *,
    every: float = 60.0,
    on_tokens: OnTokens | None = None,
    **options: Any,
) -> dict[Site, Moment]:
    """`second_moments` of the same arguments, kept at `path` (`.safetensors`): computed once.

    What is there is read. While it is computed, the sums so far are kept beside it every `every`
    seconds, and a run that was cut goes on there, to the same bits. Of two processes one computes
    and the other waits for it. `options`: those of `second_moments`.

    Raises:
        MomentError: as `second_moments`; for a file made of other weights, other texts or with
            other settings, and for a folder that cannot be written.
    """
    path, run = Path(path), Summing(model, layers, **options)
    part = path.with_name(f"{path.name}.begun")
    if isinstance(texts, str):
        raise MomentError("texts is one string; pass a list of texts, or pl.texts(path).")
    texts = iter(texts)
    with _alone(path):
        if path.exists():
            _check(path, file_format.head(path, FORMAT, _WHAT, MomentError), run, texts)
            return load_moments(path)
        if part.exists():
            _go_on(part, run, texts)
        last = time.monotonic()
        for _ in run.read(texts, on_tokens):
            if time.monotonic() - last >= every:
                _keep(part, run)
                last = time.monotonic()
        found = run.moments()
        try:
            save_moments(found, path, model.name, made=_settings(run))
            part.unlink(missing_ok=True)
        except MomentError as error:  # hours of work are not thrown away for a full disk
            warnings.warn(f"{error}. They are returned, but not kept.", stacklevel=2)
    return found


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """A block that one process at a time is in, for this file."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"Another process computes {path}; waiting for it.", stacklevel=4)
            lock.acquire()
    except OSError as error:
        raise MomentError(f"{path} cannot be written: {error}. Name another file.") from error
    try:
        yield
    finally:
        lock.release()


def _settings(run: Summing) -> dict[str, Any]:
    """What moments follow from: weights, texts and settings."""
    return {
        "weights": file_format.state_digest(run.model.hf.state_dict()),
        "sites": [str(site) for site in run.sums],
        "n_tokens": run.n_tokens,
        "max_length": run.max_length,
        "batch_tokens": run.batch_tokens,
        "precision": run.precision,
        "dtype": str(next(iter(run.sums.values())).total.dtype),
        "n_texts": run.n_texts,
        "texts": run.read_texts,
    }


def _check(
    path: Path, head: Mapping[str, Any], run: Summing, texts: Iterator[str]
) -> dict[str, Any]:
    """What the file was made of; it must be what `run` is to be made of, and its texts the first of
    `texts`, which are taken from there."""
    made, asked = head.get("made"), _settings(run)
    if made is None:
        raise MomentError(f"{path} does not say what it was made of; read it with load_moments.")
    other = [k for k in asked if k not in ("n_texts", "texts") and asked[k] != made[k]]
    if chained("", itertools.islice(texts, made["n_texts"])) != made["texts"]:
        other.append("texts")
    if other:
        raise MomentError(
            f"{path} was made with other {', '.join(other)}: name another file, or remove it."
        )
    return made


def _keep(part: Path, run: Summing) -> None:
    states = {site: one.state() for site, one in run.sums.items()}
    tensors = {f"{s}.{name}": t for s, (own, _) in states.items() for name, t in own.items()}
    numbers = {str(s): own for s, (_, own) in states.items()}
    head = {"format": PART, "made": _settings(run), "count": run.count, "numbers": numbers}
    try:
        file_format.write(part, tensors, head, _WHAT, MomentError)
    except MomentError as error:
        warnings.warn(f"{error}. Going on without keeping what was read so far.", stacklevel=3)


def _go_on(part: Path, run: Summing, texts: Iterator[str]) -> None:
    """Put `run` where the file stopped, and `texts` behind what it read."""
    head, tensors = file_format.read(part, PART, _WHAT, MomentError)
    made = _check(part, head, run, texts)
    for site, one in run.sums.items():
        own = {name: tensors[f"{site}.{name}"] for name in ("total", "all")}
        one.restore(own, head["numbers"][str(site)])
    run.count, run.n_texts, run.read_texts = head["count"], made["n_texts"], made["texts"]


def save_moments(
    moments: Mapping[Site, Moment],
    path: str | Path,
    model_name: str = "",
    *,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write moments to a `.safetensors` file. `made`: what they were made of (`kept_moments`)."""
    tensors = {str(s): m.total.cpu().contiguous() for s, m in moments.items()}
    head = {
        "format": FORMAT,
        "model": model_name,
        "counts": {str(s): m.count for s, m in moments.items()},
        "read": {str(s): [m.shards, m.squares, m.max_length] for s, m in moments.items()},
        "made": made,
    }
    file_format.write(path, tensors, head, _WHAT, MomentError)


def load_moments(path: str | Path, sites: Sequence[Site] | None = None) -> dict[Site, Moment]:
    """Read what `save_moments` wrote, all of it or these sites.

    Raises:
        MomentError: for a file that is missing, damaged, or holds no moments (of these sites).
    """
    names = None if sites is None else [str(site) for site in sites]
    head, tensors = file_format.read(path, FORMAT, _WHAT, MomentError, names)
    read, counts = head.get("read", {}), head["counts"]
    return {Site.parse(s): Moment(t, counts[s], *read.get(s, ())) for s, t in tensors.items()}


def open_moments(path: str | Path) -> dict[Site, StoredMoment]:
    """The moments of a file, each read when an edit comes to its site and not kept in memory.

    A Cholesky factor that is computed is kept beside the file (`NAME.SITE.factor.safetensors`,
    d_in² · 8 bytes), so that every later edit costs triangular solves only.

    Raises:
        MomentError: for a file that is missing, damaged, or holds no moments.
    """
    head = file_format.head(path, FORMAT, _WHAT, MomentError)
    return {Site.parse(s): StoredMoment(Path(path), s) for s in head["counts"]}


@dataclass(frozen=True)
class StoredMoment:
    """One site's moment in a file (`open_moments`); see `solvers.SecondMoment`."""

    path: Path
    site: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the moment, without reading it."""
        return file_format.shape(self.path, self.site, _WHAT, MomentError)

    def matrix(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """E[k kᵀ], read from the file."""
        head, found = self._read()
        return found.to(device or found.device) / head["counts"][self.site]

    def cholesky(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """Its lower Cholesky factor, float64, read from its file; computed where there is none, or
        one of another moment."""
        head = file_format.head(self.path, FORMAT, _WHAT, MomentError)
        # Older files call it digests.
        known = head.get(file_format.HASHES, head.get("digests", {}))
        digest = known.get(self.site) or file_format.digest(self._read()[1])
        file = self.path.with_name(f"{self.path.stem}.{self.site}.factor.safetensors")
        what = "the factor of a moment"
        if file.exists() and file_format.head(file, FACTOR, what, MomentError).get("of") == digest:
            found = file_format.read(file, FACTOR, what, MomentError)[1]["factor"]
            return found.to(device or found.device)
        # As it is read from the file: solves of another memory layout round otherwise.
        factor = solvers.cholesky(self.matrix(device)).contiguous()
        try:
            head = {"format": FACTOR, "of": digest}
            file_format.write(file, {"factor": factor}, head, what, MomentError)
        except MomentError as error:  # a folder that cannot be written costs time, not the edit
            warnings.warn(f"{error}. The next edit computes it again.", stacklevel=2)
        return factor

    def _read(self) -> tuple[dict[str, Any], Tensor]:
        head, found = file_format.read(self.path, FORMAT, _WHAT, MomentError, [self.site])
        return head, found[self.site]
