"""The files of this package: safetensors with a JSON header. Nothing in them can run."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "pmet_lens"
HASHES = "sha256"
"""Where the header has the SHA-256 of every tensor."""


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Any],
    what: str,
    error: type[ValueError],
) -> None:
    """Write `tensors` and `head` (which names its "format"). The file appears whole or not at all.

    Raises `error`, which says that `what` ("an edit") could not be written there.
    """
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    head = {**head, HASHES: {name: digest(tensor) for name, tensor in own.items()}}
    try:
        with whole(Path(path)) as part:
            save_file(own, str(part), metadata={KEY: json.dumps(head)})
    except (OSError, SafetensorError) as cause:
        raise error(f"{what} could not be written to {path}: {cause}") from cause


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: behind the block the file is at `path`, on the disk and not
    only on its way there; after an error nothing is, and what was at `path` still is."""
    # No process id: on a shared disk another machine may have a process of the same.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(
    path: str | Path,
    form: str | None,
    what: str,
    error: type[ValueError],
    names: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU; `names`: these alone) of a file whose header names the format
    `form` (None: any).

    Raises `error`, which says that the file is missing, damaged, or not `what` ("an edit").
    """
    with _opened(path, form, what, error) as (head, file):
        found = {key: file.get_tensor(key) for key in (file.keys() if names is None else names)}
    known = head.get(HASHES)  # files of the first days have none
    for name, tensor in found.items():
        if known is not None and known.get(name) != digest(tensor):
            raise error(f"{path} is damaged: {name} is not what was written. Make it again.")
    return head, found


def head(path: str | Path, form: str, what: str, error: type[ValueError]) -> dict[str, Any]:
    """The header alone; raises as `read` does."""
    with _opened(path, form, what, error) as (found, _):
        return found


def shape(path: str | Path, name: str, what: str, error: type[ValueError]) -> tuple[int, ...]:
    """The shape of one tensor, which is not read; raises as `read` does."""
    with _opened(path, None, what, error) as (_, file):
        return tuple(file.get_slice(name).get_shape())


def file_digest(*paths: Path) -> str:
    """SHA-256 of the files' bytes, one after the other, read piece by piece."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights of a model (`hf.state_dict()`) as they are now."""
    parts = map(digest, state.values())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bits, rows first."""
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


@contextmanager
def _opened(
    path: str | Path, form: str | None, what: str, error: type[ValueError]
) -> Iterator[tuple[dict[str, Any], Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "{}"))
            own = isinstance(found, dict) and (form is None or found.get("format") == form)
            if own:
                yield found, file
    except (OSError, ValueError, SafetensorError) as cause:
        raise error(f"{path} cannot be read as {what}: {cause}") from cause
    if not own:
        raise error(f"{path} is a safetensors file, but not {what} saved by pmet_lens.")
