"""Where models come from: a bundled name, a directory or a hub id, read with plain transformers.

Knows files, checksums and dtypes, nothing about what is inside a model. transformers is imported
inside functions, because importing it takes long.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

BUNDLED = ("world", "world-sequential", "world-unmasked")
_BUNDLED_ROOT = Path(__file__).parents[1] / "bundled"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class ModelError(ValueError):
    """A model, layer, stream or batch that cannot be used; the message says what to do."""


def read(
    source: str | Path,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
) -> tuple[nn.Module, Any, str]:
    """The Hugging Face model, its tokenizer (yours if you pass one) and a short name.

    A bundled name wins over a directory of that name: write `./world` for the directory.
    `dtype` None: float32 for the bundled models (stored in half precision), else the
    checkpoint's own. A tokenizer read here without a pad token pads with its end-of-text token.

    Raises `ModelError` for a directory that does not exist, a bundled file that does not match
    its checksum, an unknown dtype, or whatever transformers finds no model or tokenizer at.
    """
    where, default = _locate(source)
    chosen = as_dtype(dtype) or default
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        _check_plain(AutoConfig.from_pretrained(where), where)
        with _quiet(source in BUNDLED):
            hf = AutoModelForCausalLM.from_pretrained(where, dtype=chosen, device_map=device_map)
        found = AutoTokenizer.from_pretrained(where) if tokenizer is None else tokenizer
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where!r} cannot be read as a model with its tokenizer; give a bundled name "
            f"({', '.join(BUNDLED)}), a directory, a hub id that can be reached, or tokenizer=… "
            f"[{next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]}]"
        ) from error
    if tokenizer is None and found.pad_token is None:
        # This object is not the user's, and the mask hides what is padded with.
        found.pad_token = found.eos_token
    return hf, found, Path(where).name


def _check_plain(config: Any, where: str) -> None:
    """Refuse a quantised checkpoint before it is read: that may need packages that are not here."""
    found = getattr(config, "quantization_config", None)
    if found is not None:
        kind = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ModelError(
            f"the weights of {where!r} are quantised ({kind}), so nothing can be written into "
            "them: load the checkpoint it was made from"
        )


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """A block without transformers' progress bars: a bundled model loads in a moment."""
    from transformers.utils import logging

    quiet = quiet and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


def name_of(hf: nn.Module) -> str:
    """The end of the path an instantiated model was read from, or its model type."""
    config: Any = hf.config
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name


def moved(hf: nn.Module, device: str | torch.device) -> nn.Module:
    """The model on `device`; "auto": the accelerator there is, else the CPU.

    Raises `ModelError` for a device that this machine, or this build of torch, does not have.
    """
    if device == "auto":
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        device = found or "cpu"
    try:
        return hf.to(device)
    # torch.OutOfMemoryError is a RuntimeError too, and its message says it best.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the model cannot be put on device {str(device)!r}: {error}") from error


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`dtype` as torch knows it; raises `ModelError` for a name that is not a float type."""
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _locate(source: str | Path) -> tuple[str, torch.dtype | str]:
    """What to hand to `from_pretrained`, and the dtype where the caller names none."""
    if source in BUNDLED:
        directory = _BUNDLED_ROOT / str(source)
        _check_manifest(directory)
        return str(directory), torch.float32
    path = Path(source).expanduser()
    looks_local = isinstance(source, Path) or source.startswith((".", "/", "~"))
    if looks_local and not path.is_dir():
        raise ModelError(f"there is no directory {str(path)!r}")
    return (str(path) if path.is_dir() else str(source)), "auto"


def _check_manifest(directory: Path) -> None:
    """Compare the files of a bundled model with the checksums in its `manifest.json`."""
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        raise ModelError(f"{manifest} of the bundled model is missing: reinstall pmet_lens")
    for file, sha256 in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        path = directory / file
        if not path.is_file():
            raise ModelError(f"{path} of the bundled model is missing: reinstall pmet_lens")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ModelError(f"{path} does not match its checksum: reinstall pmet_lens")
