"""The way back from an edited GGUF file or checkpoint: a file of the tensors as they were, written
with it on demand, and the original made from both, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.models.weights import EditError
from pmet_lens.shipping import checkpoints, gguf_copies

FORMAT = "pmet_lens undo 1"
FOLDER = "pmet_lens"
"""Of a checkpoint: what lies in it is read by no other program."""
CARD = "README.md"


def file_of(edited: Path) -> Path:
    """Where the tensors as they were lie, of a GGUF file or a checkpoint."""
    if edited.suffix == ".gguf":
        return edited.with_name(f"{edited.name}.undo")
    return edited / FOLDER / "undo.safetensors"


def keep_gguf(
    source: gguf_copies.Layout, copy: Path, names: list[str], *, target: Path, said: list[str]
) -> None:
    """Write what `restored` needs of this copy of the source, which will lie at `target`, beside
    that."""
    raw = {name: source.packed(name) for name in names}
    tensors = {n: torch.from_numpy(np.frombuffer(b, np.uint8).copy()) for n, b in raw.items()}
    head = {
        "format": FORMAT,
        "types": {name: source.tensors[name].kind for name in names},
        "source": file_format.file_digest(source.path),
        "edited": file_format.file_digest(copy),
        "facts": said,
    }
    file_format.write(file_of(target), tensors, head, "the way back", EditError)


def keep_checkpoint(
    folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor], said: list[str]
) -> None:
    """The same of a checkpoint, by the names of the parameters."""
    head = {
        "format": FORMAT,
        "edited": {name: file_format.digest(tensor) for name, tensor in after.items()},
        "facts": said,
    }
    file_of(folder).parent.mkdir(exist_ok=True)
    file_format.write(file_of(folder), before, head, "the way back", EditError)


def restored(edited: str | Path, out: str | Path) -> list[str]:
    """Write to `out` what `edited` (a GGUF file or a checkpoint) was before its edit, bit for bit;
    the facts, in words, that it no longer says.

    Raises:
        EditError: for what has no tensors of before beside it, was changed since, or where `out` is
            there already.
    """
    path, to = Path(edited).expanduser(), Path(out).expanduser()
    beside = file_of(path)
    if not beside.is_file():
        raise EditError(
            f"{path} has no {beside.name} with its weights from before, which `pmet-lens edit` "
            "writes with a .gguf file or a checkpoint. An adapter or a .safetensors edit leaves "
            "the model as it is: there is nothing to take back."
        )
    head, tensors = file_format.read(beside, FORMAT, "the way back", EditError)
    if path.suffix == ".gguf":
        _gguf(path, to, head, tensors)
    else:
        _checkpoint(path, to, head, tensors)
    return head["facts"]


def _gguf(path: Path, out: Path, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    if out.exists():
        raise EditError(f"{out} is there already; name another file.")
    if file_format.file_digest(path) != head["edited"]:
        raise EditError(f"{path} was changed since it was edited, so it cannot be taken back.")
    old = {n: (head["types"][n], t.numpy().tobytes()) for n, t in tensors.items()}
    try:
        with file_format.whole(out) as part:
            gguf_copies.rewritten(gguf_copies.layout(path), part, old)
            if file_format.file_digest(part) != head["source"]:
                raise EditError(f"What comes back of {path} is not the file that was edited.")
    except OSError as error:
        raise EditError(f"The original could not be written to {out}: {error}") from error


def _checkpoint(
    path: Path, out: Path, head: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    left = set(tensors)
    with checkpoints.whole(out) as made:
        for file in sorted(path.iterdir()):
            if file.name in (CARD, FOLDER):
                continue
            if file.suffix != ".safetensors":
                copy = shutil.copytree if file.is_dir() else shutil.copyfile
                copy(file, made / file.name)
                continue
            try:
                with safe_open(str(file), framework="pt") as opened:
                    metadata, here = opened.metadata(), left & set(opened.keys())
                if not here:
                    shutil.copyfile(file, made / file.name)
                    continue
                weights = load_file(file)
            except SafetensorError as error:
                raise EditError(f"{file} cannot be read: {error}") from error
            for name in here:
                if file_format.digest(weights[name]) != head["edited"][name]:
                    raise EditError(f"{name} in {path} was changed since it was edited.")
                weights[name] = tensors[name]
            save_file(weights, made / file.name, metadata)
            left -= here
        if left:
            raise EditError(f"{path} has no weight {min(left)}, so it cannot be taken back.")
