"""A copy of a GGUF file in which some tensors are others, and the rest is byte for byte the same:
the header is copied as it stands, only the list of tensors is written anew.

Names are those of the package `gguf` (`blk.5.ffn_down.weight`). Converters turn or permute queries,
keys and values; what is edited stands in every file as `[d_model, d_in]`, and its hash is compared.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import fetched, file_format, gguf_files, progress
from pmet_lens.data.datasets import DataError
from pmet_lens.models.sites import Site
from pmet_lens.models.weights import EditError

TYPES = ("F16", "Q8_0", "F32", "BF16")
"""What an edited tensor can be stored as."""
_ALIGNMENT, _CHUNK = 32, 1 << 24
_COLUMNS = ["tensor", "site", "was", "stored", "rounded", "bytes"]
Replaced = Mapping[str, tuple[int, bytes]]
"""Per tensor its new type (a number of `gguf.GGMLQuantizationType`) and its new bytes."""


@dataclass(frozen=True)
class Entry:
    """A tensor as a file lists it: `dims` from the fastest to the slowest, `offset` from where the
    tensors begin, `room` the bytes up to the next one."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int
    room: int


@dataclass(frozen=True)
class Layout:
    """Where things stand in a GGUF file."""

    path: Path
    values: Mapping[str, Any]
    listed_at: int
    """The byte where the list of tensors begins; before it lies all that is copied as it is."""
    data_at: int
    alignment: int
    tensors: Mapping[str, Entry]

    def packed(self, name: str) -> bytes:
        """The bytes of a tensor, and what fills its room."""
        entry = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(self.data_at + entry.offset)
            return file.read(entry.room)

    def floats(self, name: str) -> Float[Tensor, "d_model d_in"]:
        """A tensor as float32; `EditError` for a type that the package `gguf` cannot unpack."""
        from gguf import quants

        entry = self.tensors[name]
        rows, length = math.prod(entry.dims[1:]), entry.dims[0]
        try:
            kind = _kind(entry.kind)
            flat = np.frombuffer(self.packed(name)[: _size(entry)], dtype=np.uint8)
            values = quants.dequantize(flat.reshape(rows, -1), kind)
        except (NotImplementedError, ValueError) as error:
            raise EditError(f"{name} of {self.path} cannot be unpacked: {error}") from error
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(rows, length))


def source_of(source: str | Path) -> Path:
    """The GGUF file that is meant: a path, a directory with one, or the name of a fetched model.

    Raises:
        EditError: where there is none.
    """
    if source in fetched.FETCHABLE:
        if not fetched.is_here(str(source)):
            raise EditError(f"The model {source!r} is not fetched: pl.load({str(source)!r}) does.")
        return fetched.folder(str(source)) / fetched.FETCHABLE[str(source)].file
    path = Path(source).expanduser()
    try:
        found = gguf_files.inside(path)
    except DataError as error:
        raise EditError(str(error)) from error
    if found is None and not path.is_file():
        raise EditError(f"There is no GGUF file {str(path)!r} to copy.")
    return path if found is None else found


def layout(path: Path) -> Layout:
    """What the header of a GGUF file says.

    Raises:
        EditError: for a file that is no GGUF, is cut, or is one part of several.
    """
    try:
        gguf_files.needed()
        with gguf_files.reading(path) as file:
            count, pairs = gguf_files.head(file, path)
            values = dict(pairs)
            at = file.tell()
            listed = [_listed(file) for _ in range(count)]
            end = file.tell()
    except DataError as error:
        raise EditError(str(error)) from error
    parts = values.get("split.count") or 1
    if parts > 1:
        raise EditError(
            f"{path} is one of {parts} files of a model: merge them first (llama-gguf-split "
            "--merge)."
        )
    alignment = values.get("general.alignment") or _ALIGNMENT
    data_at, size = _up(end, alignment), path.stat().st_size
    starts = sorted({offset for *_, offset in listed} | {size - data_at})
    after = dict(itertools.pairwise(starts))
    entries = {
        name: Entry(name, dims, kind, offset, after.get(offset, offset) - offset)
        for name, dims, kind, offset in listed
    }
    for entry in entries.values():
        if entry.room < _size(entry):
            raise EditError(f"{path} ends inside {entry.name}: the file is cut.")
    return Layout(path, values, at, data_at, alignment, entries)


def rewritten(whole: Layout, target: Path, new: Replaced) -> None:
    """Write a copy with these tensors to `target`, in the order of the source. Everything else is
    byte for byte the same, what fills the gaps included."""
    blocks = sorted(whole.tensors.values(), key=lambda entry: entry.offset)
    offsets, at = dict[str, int](), blocks[0].offset if blocks else 0
    for entry in blocks:
        offsets[entry.name] = at
        room = len(new[entry.name][1]) if entry.name in new else entry.room
        at = at + room if entry is blocks[-1] else _up(at + room, whole.alignment)
    with (
        whole.path.open("rb") as source,
        target.open("wb") as out,
        progress.line(f"writing {target.name}", "B") as tell,
    ):
        out.write(source.read(whole.listed_at))
        for entry in whole.tensors.values():
            kind = new[entry.name][0] if entry.name in new else entry.kind
            name = entry.name.encode()
            out.write(struct.pack("<Q", len(name)) + name + struct.pack("<I", len(entry.dims)))
            out.write(struct.pack(f"<{len(entry.dims)}QIQ", *entry.dims, kind, offsets[entry.name]))
        source.seek(out.tell())  # the list is as long as before: the same gap fills it up
        out.write(source.read(whole.data_at - out.tell()))
        for entry in blocks:
            out.write(b"\0" * (whole.data_at + offsets[entry.name] - out.tell()))
            if entry.name in new:
                out.write(new[entry.name][1])
            else:
                source.seek(whole.data_at + entry.offset)
                _copied(source, out, entry.room)
            tell(out.tell() - whole.data_at, at)


def save(
    parts: Mapping[str, Any],
    source: str | Path,
    target: str | Path,
    kind: str | None,
    any_base: bool,
    first: Callable[[Layout, Path, list[str]], None] | None = None,
) -> tuple[Layout, pd.DataFrame]:
    """Write the edit with these fields (`vars(edit)`) into a copy of a GGUF file; the source's
    layout, and the table that `Edit.save_gguf` returns. `first` is called with that layout, the
    copy before it gets its name, and the edited tensors. Raises `EditError` for what cannot be
    done; no copy is written then.
    """
    path, out = source_of(source), Path(target).expanduser()
    if kind is not None and kind not in TYPES:
        raise EditError(f"A tensor is stored as {', '.join(TYPES)}, not as {kind!r}.")
    if out.exists() and path.samefile(out):
        raise EditError(f"{out} is the source itself, which is never changed: name another file.")
    if out.suffix != ".gguf":
        raise EditError(f"{out} does not end in .gguf, by which other programs know such a file.")
    known = layout(path)
    new, rows = dict[str, tuple[int, bytes]](), []
    for site, (left, right) in parts["factors"].items():
        name = _name(site)
        before = _base(known, name, site, parts, any_base)
        exact = (left @ right).T.double().cpu()
        number, packed, written = _stored(known.tensors[name], before + exact, kind)
        new[name] = number, packed + b"\0" * (-len(packed) % known.alignment)
        was, now = _kind(known.tensors[name].kind).name, _kind(number).name
        lost = float((written - before - exact).norm() / exact.norm())
        rows.append((name, str(site), was, now, lost, len(packed) - _size(known.tensors[name])))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with file_format.whole(out) as part:
            rewritten(known, part, new)
            if first is not None:
                first(known, part, list(new))
    except OSError as error:
        raise EditError(f"The copy could not be written to {out}: {error}") from error
    return known, pd.DataFrame(rows, columns=_COLUMNS).set_index("tensor")


def _name(site: Site) -> str:
    from gguf import MODEL_TENSOR, TENSOR_NAMES

    kind = MODEL_TENSOR.FFN_DOWN if site.projection == "mlp" else MODEL_TENSOR.ATTN_OUT
    return f"{TENSOR_NAMES[kind].format(bid=site.layer)}.weight"


def _base(
    known: Layout, name: str, site: Site, parts: Mapping[str, Any], any_base: bool
) -> Float[Tensor, "d_model d_in"]:
    """The tensor as it is, in float64, which has to be what the edit was computed on."""
    if name not in known.tensors:
        raise EditError(f"The edit changes {site}, but {known.path} has no tensor {name}.")
    left, right = parts["factors"][site]
    shape, entry = (right.shape[1], left.shape[0]), known.tensors[name]
    if entry.dims != shape[::-1]:
        raise EditError(
            f"The edit's change at {site} is {list(shape)}, but {name} of {known.path} is "
            f"{list(entry.dims[::-1])}: it belongs to another model."
        )
    values = known.floats(name)
    digest = file_format.digest(values.T.to(parts["dtype"]))
    if not any_base and site in parts["base"] and digest != parts["base"][site]:
        raise EditError(
            f"This edit was computed on {parts['model'] or 'another model'!r} with other weights "
            f"at {site} than {known.path} has: it would not do what it did. Make it on "
            "pl.load of this file, or pass any_base=True to take it all the same."
        )
    return values.double()


def _stored(
    entry: Entry, values: Float[Tensor, "d_model d_in"], kind: str | None
) -> tuple[int, bytes, Float[Tensor, "d_model d_in"]]:
    """Number of the type, bytes, and what these say when they are read again, in float64."""
    from gguf import GGMLQuantizationType, quants

    if kind is None:
        kind = "F32" if entry.kind == GGMLQuantizationType.F32 else "F16"
    if kind == "F16" and float(values.abs().max()) > torch.finfo(torch.float16).max:
        raise EditError(f"{entry.name} has weights too large for F16: pass type='F32' or 'BF16'.")
    if kind == "Q8_0" and values.shape[1] % 32:
        raise EditError(
            f"{entry.name} has rows of {values.shape[1]} weights, and Q8_0 takes them by 32: pass "
            "type='F16'."
        )
    number = GGMLQuantizationType[kind]
    packed = quants.quantize(values.float().numpy(), number)
    again = quants.dequantize(packed.view(np.uint8), number).reshape(values.shape)
    return int(number), packed.tobytes(), torch.from_numpy(again.astype(np.float64))


def _kind(number: int) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number)


def _size(entry: Entry) -> int:
    """Bytes of a tensor; 0 for a type that is not known here."""
    from gguf import GGML_QUANT_SIZES

    try:
        block, size = GGML_QUANT_SIZES[_kind(entry.kind)]
    except (KeyError, ValueError):
        return 0
    return math.prod(entry.dims) // block * size


def _listed(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions, type and offset of the tensor that the list stands at."""
    name = gguf_files.text(file)
    (n_dims,) = gguf_files.scalars(file, "I")
    *dims, kind, offset = gguf_files.scalars(file, f"{min(n_dims, 8)}QIQ")
    return name, tuple(dims), kind, offset


def _up(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


def _copied(source: BinaryIO, out: BinaryIO, count: int) -> None:
    while count > 0:
        piece = source.read(min(count, _CHUNK))
        if not piece:
            raise OSError("the source ended while it was copied")
        out.write(piece)
        count -= len(piece)
