"""The files of this package: safetensors with a JSON header. Nothing in them can run.

Also how a value (a method, its strengths) is written as JSON, and the hashes of all these.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "pmet_lens"
HASHES = "sha256"
"""Where the header has the SHA-256 of every tensor."""


def to_plain(value: Any) -> Any:
    """`value` as JSON has it: a dataclass as its fields and, under "is", the name of its class;
    what JSON cannot hold as its text. A field whose metadata says "later" is left out at its
    default, so that what was written before it was there has the same digest."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {f: getattr(value, f.name) for f in fields(value)}
        told = {f: v for f, v in own.items() if "later" not in f.metadata or v != f.default}
        values = {f.name: to_plain(v) for f, v in told.items()}
        return {"is": type(value).__name__, **values}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def from_plain(value: Any, classes: Iterable[type], error: type[ValueError]) -> Any:
    """The inverse of `to_plain` for dataclasses of these `classes`; lists come back as tuples.

    Raises `error` where another class is named.
    """
    known = {cls.__name__: cls for cls in classes}

    def build(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(build, value))
        if not isinstance(value, Mapping):
            return value
        values = {key: build(v) for key, v in value.items() if key != "is"}
        if value.get("is") not in known:
            raise error(f"There is no {value.get('is')!r} among {', '.join(known)}.")
        return known[value["is"]](**values)

    return build(value)


def hash_of(plain: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of what JSON can hold."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    head = {**head, HASHES: {name: digest(tensor) for name, tensor in tensors.items()}}
    try:
        with whole(Path(path)) as part:
            save_file(tensors, str(part), metadata={KEY: json.dumps(head)})
    except (OSError, SafetensorError) as cause:
        raise error(f"{what} could not be written to {path}: {cause}") from cause


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. After the block the file is at `path`, and on the disk;
    after an error it is not, and what was at `path` still is."""
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
    form: str | tuple[str, ...] | None,
    what: str,
    error: type[ValueError],
    names: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU; `names`: these alone) of a file whose header names the format
    `form` (several: one of them; None: any).

    Raises `error`, which says that the file is missing, damaged, or not `what` ("an edit").
    """
    with _opened(path, form, what, error) as (head, file):
        tensors = {key: file.get_tensor(key) for key in (file.keys() if names is None else names)}
    known = head.get(HASHES)  # files of the first days have none
    for name, tensor in tensors.items():
        if known is not None and known.get(name) != digest(tensor):
            raise error(f"{path} is damaged: {name} is not what was written. Make it again.")
    return head, tensors


def head(path: str | Path, form: str, what: str, error: type[ValueError]) -> dict[str, Any]:
    """The header alone; raises as `read` does."""
    with _opened(path, form, what, error) as (header, _):
        return header


def shape(path: str | Path, name: str, what: str, error: type[ValueError]) -> tuple[int, ...]:
    """The shape of one tensor, which is not read; raises as `read` does."""
    with _opened(path, None, what, error) as (_, file):
        return tuple(file.get_slice(name).get_shape())


def file_digest(*paths: Path) -> str:
    """SHA-256 of the files' bytes, one after the other, read piece by piece."""
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


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
    path: str | Path, form: str | tuple[str, ...] | None, what: str, error: type[ValueError]
) -> Iterator[tuple[dict[str, Any], Any]]:
    forms = (form,) if isinstance(form, str) else form
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            fits = isinstance(header, dict) and (forms is None or header.get("format") in forms)
            if fits:
                yield header, file
    except (OSError, ValueError, SafetensorError) as cause:
        raise error(f"{path} cannot be read as {what}: {cause}") from cause
    if not fits:
        raise error(f"{path} is a safetensors file, but not {what} saved by pmet_lens.")
