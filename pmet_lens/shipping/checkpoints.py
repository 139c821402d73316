"""An edited model as a checkpoint: a directory that transformers and, by its format, vLLM open."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pmet_lens.models import loading
from pmet_lens.models.weights import EditError


@contextmanager
def whole(directory: str | Path) -> Iterator[Path]:
    """A new directory beside `directory`, to be filled; after the block it is at that name, after
    an error there is nothing.

    Raises:
        EditError: for one that is there and not empty, or that cannot be written.
    """
    out = Path(directory).expanduser()
    check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as there:
            made = Path(there) / "made"
            made.mkdir()
            yield made
            if out.is_dir():
                out.rmdir()  # it is empty
            made.rename(out)
    except (OSError, SafetensorError) as error:
        raise EditError(f"The model could not be written to {out}: {error}") from error


def check_free(out: Path) -> None:
    """Raises `EditError` for a file, or a directory with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EditError(f"{out} is there already and not empty; name another directory.")


def write(hf: Any, tokenizer: Any, folder: Path, max_shard_size: str) -> None:
    """Weights (safetensors, with an index where they are cut into several files), configuration,
    generation settings and tokenizer."""
    with loading.quiet():
        hf.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
