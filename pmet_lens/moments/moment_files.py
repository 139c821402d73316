"""Second moments on disk: saved while they are computed, read whole or site by site.

The file is safetensors with the sums in the dtype they were summed in; counts, and the other fields
of a `Moment`, are in the header.
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
from pmet_lens.data.progress import Tell, shown
from pmet_lens.editing import solvers
from pmet_lens.models.model import Model, Site
from pmet_lens.moments.moment import Moment, MomentError
from pmet_lens.moments.second_moments import Summing, chained, text_iterator

FORMAT = "pmet_lens moments 1"
FACTOR = "pmet_lens factor 1"
PART = "pmet_lens moments, begun 1"
_WHAT = "second moments"


@shown("second moments", "token", "on_tokens")
def kept_moments(
    path: str | Path,
    model: Model,
    texts: Iterable[str],
    layers: int | Sequence[int] | None = None,
    *,
    every: float = 60.0,
    on_tokens: Tell | None = None,
    **options: Any,
) -> dict[Site, Moment]:
    """`second_moments` of the same arguments, kept at `path` (`.safetensors`): computed once.

    An existing file is read. While it is computed, the sums so far are saved beside it every
    `every` seconds, and a run that was interrupted continues from there, to the same bits. Of two
    processes one computes and the other waits for it. `options`: those of `second_moments`.

    Raises:
        MomentError: as `second_moments`; for a file made of other weights, other texts or with
            other settings, and for a folder that cannot be written.
    """
    path, run, texts = Path(path), Summing(model, layers, **options), text_iterator(texts)
    part = path.with_name(f"{path.name}.begun")
    with _alone(path):
        if path.exists():
            _check(path, file_format.head(path, FORMAT, _WHAT, MomentError), run, texts)
            return load_moments(path)
        if part.exists():
            _continue(part, run, texts)
        last = time.monotonic()
        for _ in run.read(texts, on_tokens):
            if time.monotonic() - last >= every:
                _keep(part, run)
                last = time.monotonic()
        moments = run.moments()
        try:
            save_moments(moments, path, model.name, made=_settings(run))
            part.unlink(missing_ok=True)
        except MomentError as error:  # hours of work are not thrown away for a full disk
            warnings.warn(f"{error}. They are returned, but not kept.", stacklevel=2)
    return moments


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time is inside the block, per file."""
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
        **({} if run.first_tokens else {"first_tokens": False}),  # older files do not say
        **{k: getattr(run, k) for k in ("n_tokens", "max_length", "batch_tokens", "precision")},
        "dtype": str(run.dtype),
        "n_texts": run.n_texts,
        "texts": run.read_texts,
    }


def _check(
    path: Path, head: Mapping[str, Any], run: Summing, texts: Iterator[str]
) -> dict[str, Any]:
    """The settings in the header, which must be those of `run`, and its texts the first of `texts`,
    which are taken from there."""
    made, asked = head.get("made"), _settings(run)
    if made is None:
        raise MomentError(f"{path} does not say what it was made of; read it with load_moments.")
    names = [k for k in {**asked, **made} if k not in ("n_texts", "texts")]
    other = [k for k in names if asked.get(k) != made.get(k)]
    if chained("", itertools.islice(texts, made["n_texts"])) != made["texts"]:
        other.append("texts")
    if other:
        raise MomentError(
            f"{path} was made with other {', '.join(other)}: name another file, or remove it."
        )
    return made


def _keep(part: Path, run: Summing) -> None:
    """Save the sums so far."""
    states = {str(site): sums.state() for site, sums in run.sums.items()}
    tensors = {f"{s}.{name}": t for s, (parts, _) in states.items() for name, t in parts.items()}
    numbers = {s: values for s, (_, values) in states.items()}
    head = {"format": PART, "made": _settings(run), "count": run.count, "numbers": numbers}
    try:
        file_format.write(part, tensors, head, _WHAT, MomentError)
    except MomentError as error:
        warnings.warn(f"{error}. Going on without keeping what was read so far.", stacklevel=3)


def _continue(part: Path, run: Summing, texts: Iterator[str]) -> None:
    """Restore `run` from the file, and advance `texts` by those it has read."""
    head, tensors = file_format.read(part, PART, _WHAT, MomentError)
    made = _check(part, head, run, texts)
    for site, sums in run.sums.items():
        parts = {name: tensors[f"{site}.{name}"] for name in ("total", "all")}
        sums.restore(parts, head["numbers"][str(site)])
    run.count, run.n_texts, run.read_texts = head["count"], made["n_texts"], made["texts"]


def save_moments(
    moments: Mapping[Site, Moment],
    path: str | Path,
    model_name: str = "",
    *,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Write moments to a `.safetensors` file. `made`: what they were made of (`kept_moments`)."""
    tensors = {str(s): m.total for s, m in moments.items()}
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
    """The moments of a file, each read when an edit reaches its site, and not kept in memory.

    A Cholesky factor that is computed is saved beside the file (`NAME.SITE.factor.safetensors`,
    d_in² · 8 bytes), so that later edits cost triangular solves only.

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

    @property
    def count(self) -> int:
        """Tokens in the sum."""
        return file_format.head(self.path, FORMAT, _WHAT, MomentError)["counts"][self.site]

    def matrix(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """E[k kᵀ], read from the file."""
        head, total = self._read()
        return total.to(device or total.device) / head["counts"][self.site]

    def cholesky(self, device: torch.device | None = None) -> Float[Tensor, "d_in d_in"]:
        """Its lower Cholesky factor, float64, read from its file; computed where there is none, or
        one of another moment."""
        head = file_format.head(self.path, FORMAT, _WHAT, MomentError)
        # Older files call it digests.
        digests = head.get(file_format.HASHES, head.get("digests", {}))
        digest = digests.get(self.site) or file_format.digest(self._read()[1])
        file = self.path.with_name(f"{self.path.stem}.{self.site}.factor.safetensors")
        what = "the factor of a moment"
        if file.exists() and file_format.head(file, FACTOR, what, MomentError).get("of") == digest:
            factor = file_format.read(file, FACTOR, what, MomentError)[1]["factor"]
            return factor.to(device or factor.device)
        # As it is read from the file: solves of another memory layout round otherwise.
        factor = solvers.cholesky(self.matrix(device)).contiguous()
        try:
            head = {"format": FACTOR, "of": digest}
            file_format.write(file, {"factor": factor}, head, what, MomentError)
        except MomentError as error:  # a folder that cannot be written costs time, not the edit
            warnings.warn(f"{error}. The next edit computes it again.", stacklevel=2)
        return factor

    def _read(self) -> tuple[dict[str, Any], Tensor]:
        head, tensors = file_format.read(self.path, FORMAT, _WHAT, MomentError, [self.site])
        return head, tensors[self.site]
