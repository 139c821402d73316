"""GGUF files, the form in which quantised models are passed around (llama.cpp): found, named, and
what transformers leaves behind when it has read one as floats; and such floats kept on disk.

transformers reads the weights (`from_pretrained(…, gguf_file=…)`, with the package `gguf`). Weights
that were dequantised are floats like others, only coarser ones.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pmet_lens.data import file_format
from pmet_lens.data.datasets import DataError
from pmet_lens.data.progress import AFTER

_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Types of a value in the header: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
_SCALARS: dict[int, str] = dict(zip(_NUMBERS, "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_ONE_AT_A_TIME = threading.Lock()


def inside(path: Path) -> Path | None:
    """The GGUF file at `path`: itself, or the one in a directory that has no other weights.

    Raises:
        DataError: for a directory with several, which nobody chose from.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(next(path.glob(kind), None) for kind in _OTHER_WEIGHTS):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} holds several GGUF files ({names}): give the path of one of them.")
    return files[0] if files else None


def kind(path: Path) -> str:
    """How the weights of a GGUF file are quantised, as llama.cpp calls it ("Q4_K_M", "F16"); empty
    where its header does not say.

    Raises:
        DataError: for a file that is no GGUF, or whose header is cut.
    """
    needed()
    from gguf import LlamaFileType

    with reading(path) as file:
        for name, value in head(file, path)[1]:
            if name == "general.file_type":
                known = {int(of): of.name.partition("_")[2] for of in LlamaFileType}
                return known.get(value, "")
    return ""


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, open for a block that reads its header; what cannot be read is a `DataError`."""
    try:
        with path.open("rb") as file:
            yield file
    except (OSError, struct.error, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"the header of {path} cannot be read; is it whole? {error}") from error


def head(file: BinaryIO, path: Path) -> tuple[int, Iterator[tuple[str, Any]]]:
    """How many tensors a GGUF file has, and its values one by one (None for an array); after the
    last the file stands where the tensors are listed.

    Raises:
        DataError: for a file that is no GGUF, or of a version that is not read.
    """
    if file.read(4) != b"GGUF":
        raise DataError(f"{path} is not a GGUF file: it does not begin with GGUF.")
    version, n_tensors, n_values = scalars(file, "IQQ")
    if version < 2:
        raise DataError(f"{path} is a GGUF file of version {version}, which is not read.")
    pairs = ((text(file), _value(file, *scalars(file, "I"))) for _ in range(n_values))
    return n_tensors, pairs


def scalars(file: BinaryIO, of: str) -> tuple[Any, ...]:
    """Numbers of these types of `struct`, from where the file stands."""
    layout = struct.Struct(f"<{of}")
    return layout.unpack(file.read(layout.size))


def text(file: BinaryIO) -> str:
    """The string that the file stands at."""
    (length,) = scalars(file, "Q")
    return file.read(min(length, 1 << 24)).decode("utf-8")


def _value(file: BinaryIO, of: int) -> Any:
    """The value of a type that the file stands at; that of an array is passed over."""
    if of == _STRING:
        return text(file)
    if of != _ARRAY:
        return scalars(file, _SCALARS[of])[0]
    of, count = scalars(file, "IQ")
    if of in _SCALARS:
        file.seek(count * struct.calcsize(f"<{_SCALARS[of]}"), 1)
    else:
        for _ in range(count):
            _value(file, of)
    return None


def needed() -> None:
    """Raises `DataError` where the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise DataError(
            "reading a GGUF file needs the package gguf, which is not installed: "
            'pip install "pmet-lens[gguf]"'
        )


def options(file: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for a GGUF file of this name; nothing for None.

    Raises:
        DataError: where the package `gguf` is missing.
    """
    if file is None:
        return {}
    needed()
    return {"gguf_file": file}


def as_floats(file: str | None) -> dict[str, Any]:
    """What makes transformers unpack every weight, where it could also keep them packed."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)  # versions before it always unpack
    return {"quantization_config": packed(dequantize=True)} if file and packed else {}


@contextmanager
def read_once(file: str | None) -> Iterator[None]:
    """A block in which a GGUF file (None: no such file) is read once: transformers parses its
    header, with every word of the vocabulary, for the configuration, the weights and the tokenizer
    again, and builds the table of tensor names anew for every module. Nothing but time changes."""
    names = ("gguf.GGUFReader", "gguf.get_tensor_name_map")
    names = (*names, "transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint")
    with ExitStack() as stack:
        if file:
            stack.enter_context(_ONE_AT_A_TIME)
        for name in names if file else ():
            where, _, what = name.rpartition(".")
            module = importlib.import_module(where)
            plain = getattr(module, what, None)  # other versions may have no such name
            if plain is not None:
                setattr(module, what, _remembering(_unmapped(plain)))
                stack.callback(setattr, module, what, plain)
                bar = getattr(module, "tqdm", None)
                if bar is not None:  # as `progress.line`: none where nobody watches
                    how = {"disable": None, "delay": AFTER, "leave": False}
                    module.__dict__["tqdm"] = functools.partial(bar, **how)
                    stack.callback(setattr, module, "tqdm", bar)
        yield


def _unmapped(reader: Any) -> Any:
    """A reader of the header that cuts it out of a plain array: numpy takes three times as long
    for each of the hundred thousand pieces of a memory map. What is no reader stays as it is."""
    if not hasattr(reader, "_build_fields"):
        return reader

    class Unmapped(reader):
        def _build_fields(self, *args: Any) -> Any:
            self.data = np.asarray(self.data)
            return super()._build_fields(*args)

    return Unmapped


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which computes each answer once, for as long as it lives. Tensors are read anew
    (of a model), and who gets a dictionary may change it."""
    known: dict[str, Any] = {}

    def ask(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("model_to_load") is not None:
            return function(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            known[key] = function(*args, **kwargs)
        return copy.deepcopy(known[key]) if isinstance(known[key], dict) else known[key]

    return ask


def kind_read(hf: Any) -> str:
    """How the weights of a model in memory were quantised in their GGUF file, as far as it says;
    empty for a model that was not read from one."""
    found = getattr(hf.config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else _method(found)
    if method != "gguf":
        return ""
    file = getattr(found, "gguf_file", None) or ""
    path = Path(getattr(hf.config, "_name_or_path", "") or "") / file
    return kind(path) if file and path.is_file() else "GGUF"


def _method(config: Any) -> str:
    how = getattr(config, "quant_method", "")
    return str(getattr(how, "value", how))


def unpacked(hf: Any) -> bool:
    """Whether a model that calls itself quantised says that its weights were made floats when it
    was read: all of a GGUF file are, unless they were kept packed, which their dtype shows."""
    config = getattr(hf.config, "quantization_config", None)
    return _method(config) == "gguf" or bool(getattr(config, "dequantize", False))


def forget(hf: Any) -> None:
    """Let a model that was read from a GGUF file be the plain float model it is: transformers goes
    on calling it quantised, and would not save it."""
    hf.is_quantized = False
    hf.hf_quantizer = None
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config


def are_whole(floats: Path, sha256: str) -> bool:
    """Whether the directory holds what `keep` wrote of the GGUF file with this SHA-256."""
    try:
        manifest = json.loads((floats / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        return manifest["of"] == [sha256, _version()] and all(
            file_format.file_digest(floats / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def keep(floats: Path, hf: Any, tokenizer: Any, sha256: str) -> bool:
    """Write model and tokenizer to the directory, whole or not at all. False: the disk could not
    take them, and nothing was changed."""
    try:
        with tempfile.TemporaryDirectory(dir=floats.parent) as there:
            made = Path(there) / "made"
            hf.save_pretrained(made)
            tokenizer.save_pretrained(made)
            files = {p.name: file_format.file_digest(p) for p in made.iterdir()}
            manifest = {"of": [sha256, _version()], "files": files}
            (made / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            if floats.exists():
                shutil.rmtree(floats)
            made.rename(floats)
    except OSError:
        return False
    return True


def _version() -> str:
    """What read the file: another version may read tokenizer or configuration otherwise."""
    import transformers

    return transformers.__version__
