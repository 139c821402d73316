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
from pmet_lens.editing import solvers
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.models.chat import Frame
from pmet_lens.models.model import Site
from pmet_lens.models.weights import EditError as EditError

FORMAT = "pmet_lens edit 1"
_SOLVERS = {cls.__name__: cls for cls in (solvers.Ridge, solvers.Exact, solvers.NullSpace)}


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of a weight's bits, rows first."""
    return file_format.digest(weight)


def save(parts: Mapping[str, Any], path: str | Path) -> None:
    """Write the fields of an edit (as `load` returns them) to `path`: per site its two thin float64
    factors, whose product rounded to the weight's dtype is the delta."""
    tensors: dict[str, Tensor] = {}
    for site, (left, right) in parts["factors"].items():
        tensors[f"{site}.left"] = left.cpu().contiguous()
        tensors[f"{site}.right"] = right.cpu().contiguous()
    head = {
        "format": FORMAT,
        "facts": [asdict(f) for f in parts["facts"]],
        "method": _method_record(parts["method"]),
        "hparams": asdict(parts["hparams"]),
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
    return asdict(value) if isinstance(value, Hparams) else _method_record(value)


def _method_record(method: Any) -> dict[str, Any]:
    if isinstance(method, Recorded):
        return {"name": method.name, **method.values}
    if not isinstance(method, Method):
        return {"name": type(method).__name__, **asdict(method)}
    return {
        **asdict(method),
        "solver": {"name": type(method.solver).__name__, **vars(method.solver)},
    }


def _methods(head: dict[str, Any]) -> dict[str, Any]:
    """The fields `method` and `hparams` of an edit."""
    method, hparams = dict(head["method"]), dict(head["hparams"])
    if "name" in method:
        name = method.pop("name")
        values = hparams.get("values", hparams)
        return {"method": Recorded(name, method), "hparams": Recorded(name, values)}
    solver = dict(method["solver"])
    method["solver"] = _SOLVERS[solver.pop("name")](**solver)
    method.update({k: tuple(method[k]) for k in ("delta_at", "write")})
    hparams["layers"] = tuple(hparams["layers"])
    return {"method": Method(**method), "hparams": Hparams(**hparams)}


def load(path: str | Path) -> dict[str, Any]:
    """The fields of the `Edit` in `path`.

    Raises:
        EditError: for a file that is missing, damaged, or not an edit.
    """
    head, tensors = file_format.read(path, FORMAT, "an edit", EditError)
    return {
        "factors": {
            Site.parse(s): (tensors[f"{s}.left"], tensors[f"{s}.right"]) for s in head["sites"]
        },
        "dtype": getattr(torch, head["dtype"]),
        "facts": tuple(Fact.from_record(f) for f in head["facts"]),
        **_methods(head),
        "contexts": tuple(head["contexts"]),
        "base": {Site.parse(s): digest for s, digest in head["base"].items()},
        # Files of the first days do not name them.
        "parameters": {Site.parse(s): name for s, name in head.get("parameters", {}).items()},
        "fan_in_fan_out": head.get("fan_in_fan_out", False),
        "model": head.get("model", ""),
        "frame": Frame(**head.get("frame", {})),
    }
