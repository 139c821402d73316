"""An edit as a file: safetensors with thin factors and a JSON header, nothing that can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.models.chat import Frame
from pmet_lens.models.model import Site
from pmet_lens.models.weights import EditError as EditError

FORMATS = ("pmet_lens edit 1", "pmet_lens edit 2")
"""Those that are read; the last is written."""
VALUES = (Method, Hparams, Ridge, Exact, NullSpace)
"""The classes that a file may name; the values of others are read as `Recorded`."""


def save(parts: Mapping[str, Any], path: str | Path) -> None:
    """Write the fields of an edit (as `load` returns them) to `path`: per site its two thin float64
    factors, whose product rounded to the weight's dtype is the delta."""
    tensors: dict[str, Tensor] = {}
    for site, (left, right) in parts["factors"].items():
        tensors[f"{site}.left"] = left.cpu().contiguous()
        tensors[f"{site}.right"] = right.cpu().contiguous()
    head = {
        "format": FORMATS[-1],
        "facts": [asdict(f) for f in parts["facts"]],
        "method": _record(parts["method"]),
        "hparams": _record(parts["hparams"]),
        "contexts": parts["contexts"],
        "base": {str(site): digest for site, digest in parts["base"].items()},
        "parameters": {str(site): name for site, name in parts["parameters"].items()},
        "fan_in_fan_out": parts["fan_in_fan_out"],
        "model": parts["model"],
        "frame": asdict(parts["frame"]),
        "versions": {name: installed(name) for name in ("pmet-lens", "torch", "transformers")},
        "sites": [str(site) for site in parts["factors"]],
        "dtype": str(parts["dtype"]).removeprefix("torch."),
    }
    file_format.write(path, tensors, head, "an edit", EditError)


def installed(name: str) -> str:
    """The version of a package; empty where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that nobody installed
        return ""


@dataclass(frozen=True)
class Recorded:
    """What a file says of a method, or of strengths, that are no `Method` and `Hparams`."""

    name: str
    values: dict[str, Any]


def both(first: Any, second: Any) -> Any:
    """What the sum of two edits says of its method (or of its strengths): theirs, where they are
    the same, else both."""
    if first == second:
        return first
    return Recorded("sum", {"of": [_record(first), _record(second)]})


def _record(value: Any) -> dict[str, Any]:
    if isinstance(value, Recorded):
        return {"is": value.name, **value.values}
    return file_format.to_plain(value)


def _value(record: Mapping[str, Any]) -> Any:
    """The inverse of `_record`, but for methods from files above this one."""
    if record["is"] in {cls.__name__ for cls in VALUES}:
        return file_format.from_plain(record, VALUES, EditError)
    return Recorded(record["is"], {key: v for key, v in record.items() if key != "is"})


def _as_now(method: dict[str, Any], hparams: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The records of a file of the first format, which named only what was no `Method`."""
    values = hparams.get("values", hparams)
    if "name" in method:
        name = method.pop("name")
        return {"is": name, **method}, {"is": name, **values}
    solver = {"is": method["solver"].pop("name"), **method["solver"]}
    return {**method, "is": "Method", "solver": solver}, {
        "is": hparams.get("name", "Hparams"),
        **values,
    }


def load(path: str | Path) -> dict[str, Any]:
    """The fields of the `Edit` in `path`.

    Raises:
        EditError: for a file that is missing, damaged, or not an edit.
    """
    head, tensors = file_format.read(path, FORMATS, "an edit", EditError)
    method, hparams = head["method"], head["hparams"]
    if head["format"] == FORMATS[0]:
        method, hparams = _as_now(method, hparams)
    return {
        "factors": {
            Site.parse(s): (tensors[f"{s}.left"], tensors[f"{s}.right"]) for s in head["sites"]
        },
        "dtype": getattr(torch, head["dtype"]),
        "facts": tuple(Fact.from_record(f) for f in head["facts"]),
        "method": _value(method),
        "hparams": _value(hparams),
        "contexts": tuple(head["contexts"]),
        "base": {Site.parse(s): digest for s, digest in head["base"].items()},
        # Files of the first days do not name them.
        "parameters": {Site.parse(s): name for s, name in head.get("parameters", {}).items()},
        "fan_in_fan_out": head.get("fan_in_fan_out", False),
        "model": head.get("model", ""),
        "frame": Frame(**head.get("frame", {})),
    }
