"""Where models come from: a bundled name, a directory, a hub id, or a model in memory.

transformers is imported inside functions, because importing it takes long.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmet_lens.data import file_format
from pmet_lens.models.chat import Messages
from pmet_lens.models.model import DTYPES, Model
from pmet_lens.models.sites import ModelError

BUNDLED = ("world", "world-sequential", "world-unmasked")
_BUNDLED_ROOT = Path(__file__).parents[1] / "bundled"


@torch.inference_mode(False)
def load(
    source: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    name: str | None = None,
    template: str | Messages | None = None,
) -> Model:
    """A `Model` from a bundled name, a directory, a hub id or a model in memory.

    `source`: "world", "world-sequential" or "world-unmasked" (bundled, checked against their
    checksums; the last without an imposed recall site, for study and not for editing); a directory
    as `save_pretrained` writes it (`./world` where its name is a bundled one); a hub id; or an
    instantiated Hugging Face causal LM, which stays yours and needs `tokenizer`. A tokenizer read
    here without a pad token pads with its end-of-text token; one you pass is never changed, but
    refused.
    `device`: where to put what is read here; "auto": the accelerator there is, else the CPU; None:
    the CPU.
    `device_map`: for a model larger than one accelerator, as `from_pretrained` takes it ("auto",
    "balanced", or module names to devices). Every delta and solve happens where its weight lies;
    weights that had to be offloaded to the host or the disk cannot be edited.
    `dtype`: a torch dtype or its name such as "float64"; None: float32 for the bundled models
    (stored in half precision), else the checkpoint's own.
    `name`: what hyper-parameters are looked up by; None: the bundled name, the end of the path or
    the model type.
    `template`: for chat models, what the user says, with one `{}` for the prompt ("{}", or
    "Complete the sentence: {}"), or a list of messages with one; every prompt is then phrased
    through the tokenizer's chat template, and the answer is the assistant's (`chat.frame`).

    Raises `ModelError`, in words, for whatever cannot be loaded or edited.
    """
    if not isinstance(source, nn.Module):
        if device is not None and device_map is not None:
            raise ModelError("give device or device_map, not both")
        hf, tokenizer, default = _read(source, tokenizer, dtype, device_map)
        hf = hf if device is None else moved(hf, device)
        return Model(hf, tokenizer, name or default, template)
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load(hf, tokenizer=…)")
    if (device, dtype, device_map) != (None, None, None):
        raise ModelError("your model is left as it is: call hf.to(device, dtype) before load")
    config: Any = source.config
    path = getattr(config, "_name_or_path", "") or config.model_type
    return Model(source, tokenizer, name or Path(path).name, template)


def _read(
    source: str | Path, tokenizer: Any, dtype: str | torch.dtype | None, device_map: Any
) -> tuple[nn.Module, Any, str]:
    """The Hugging Face model, its tokenizer (yours if you pass one) and a short name."""
    where, default = _locate(source)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        _check_plain(AutoConfig.from_pretrained(where), where)
        with _quiet(source in BUNDLED):
            hf = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype or default, device_map=device_map
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(where)
            if tokenizer.pad_token is None:
                # This object is not the user's, and the mask hides what is padded with.
                tokenizer.pad_token = tokenizer.eos_token
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where!r} cannot be read as a model with its tokenizer; give a bundled name "
            f"({', '.join(BUNDLED)}), a directory, a hub id that can be reached, or tokenizer=… "
            f"[{next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]}]"
        ) from error
    return hf, tokenizer, Path(where).name


def _check_plain(config: Any, where: str) -> None:
    """Refuse a quantised checkpoint before it is read: that may need packages that are not here."""
    how = getattr(config, "quantization_config", None)
    if how is not None:
        kind = how.get("quant_method") if isinstance(how, dict) else how.quant_method
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


def moved(hf: nn.Module, device: str | torch.device) -> nn.Module:
    """The model on `device`; "auto": the accelerator there is, else the CPU.

    Raises `ModelError` for a device that this machine, or this build of torch, does not have.
    """
    if device == "auto":
        here = torch.accelerator.is_available()
        device = (torch.accelerator.current_accelerator() if here else None) or "cpu"
    try:
        return hf.to(device)
    # torch.OutOfMemoryError is a RuntimeError too, and its message says it best.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the model cannot be put on device {str(device)!r}: {error}") from error


def _locate(source: str | Path) -> tuple[str, torch.dtype | str]:
    """What `from_pretrained` takes, and the dtype where the caller names none."""
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

    def existing(name: str) -> Path:
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path} of the bundled model is missing: reinstall pmet_lens")
        return path

    manifest = json.loads(existing("manifest.json").read_text(encoding="utf-8"))
    for name, sha256 in manifest["files"].items():
        if file_format.file_digest(path := existing(name)) != sha256:
            raise ModelError(f"{path} does not match its checksum: reinstall pmet_lens")
