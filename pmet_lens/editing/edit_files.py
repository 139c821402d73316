"""How an edit is written: as one file of this package (safetensors with thin factors and a JSON
header, nothing that can run), or as a LoRA adapter for `peft`, which is not needed to write it; and
the receipt, which tells what it did to the weights and to the answers.

A LoRA adapter is a weight change of low rank, and so is an edit: nothing is lost but float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save_file
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
_ROUNDED = 0.01
"""Share of a change lost by rounding from which a receipt says so."""
VALUES = (Method, Hparams, Ridge, Exact, NullSpace)
"""The classes that a file may name; the values of others are read as `Recorded`."""


def save(parts: Mapping[str, Any], path: str | Path) -> None:
    """Write the fields of an edit (as `load` returns them) to `path`: per site two thin float64
    factors, whose product, rounded to the dtype of the weight, is the delta."""
    tensors: dict[str, Tensor] = {}
    for site, (left, right) in parts["factors"].items():
        tensors |= {f"{site}.left": left, f"{site}.right": right}
    head = {
        "format": FORMATS[-1],
        "facts": [f.record() for f in parts["facts"]],
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
        # The first files do not name them.
        "parameters": {Site.parse(s): name for s, name in head.get("parameters", {}).items()},
        "fan_in_fan_out": head.get("fan_in_fan_out", False),
        "model": head.get("model", ""),
        "frame": Frame(**head.get("frame", {})),
    }


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
    """The inverse of `_record` for `VALUES`."""
    if record["is"] in {cls.__name__ for cls in VALUES}:
        return file_format.from_plain(record, VALUES, EditError)
    return Recorded(record["is"], {key: v for key, v in record.items() if key != "is"})


def _as_now(method: dict[str, Any], hparams: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The records of a file of the first format, which named only what was no `Method`."""
    name = hparams.pop("name", "Hparams")
    hparams = hparams.get("values", hparams)
    if "name" in method:
        name = method.pop("name")
        return {"is": name, **method}, {"is": name, **hparams}
    solver = {"is": method["solver"].pop("name"), **method["solver"]}
    return {**method, "is": "Method", "solver": solver}, {"is": name, **hparams}


def export_lora(parts: Mapping[str, Any], directory: str | Path, max_rank: int) -> None:
    """Write the fields of an edit as `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        EditError: for an edit that does not name its weights, where its rank exceeds `max_rank`,
            or where the files cannot be written.
    """
    factors, parameters = parts["factors"], parts["parameters"]
    if factors.keys() - parameters.keys():
        raise EditError(
            "This edit was saved before files named their weights: make it again, or apply it "
            "and save the whole model with model.hf.save_pretrained."
        )
    thin = {site: balanced(left, right) for site, (left, right) in factors.items()}
    rank = max([1, *(left.shape[1] for left, _ in thin.values())])
    if rank > max_rank:
        raise EditError(
            f"The edit has rank {rank} (its facts at one site), an adapter at most {max_rank}: "
            "pass a larger max_rank if what serves it can, or apply the edit and save the whole "
            "model with model.hf.save_pretrained."
        )
    tensors: dict[str, Tensor] = {}
    modules = [parameters[site].removesuffix(".weight") for site in thin]
    for module, (left, right) in zip(modules, thin.values(), strict=True):
        missing = rank - left.shape[1]  # peft knows one rank for all
        down = torch.nn.functional.pad(left.T, (0, 0, 0, missing))
        up = torch.nn.functional.pad(right.T, (0, missing))
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parts["model"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of one
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": parts["fan_in_fan_out"],
        "target_modules": modules,
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_format.whole(folder / "adapter_model.safetensors") as part:
            save_file(tensors, str(part), metadata={"format": "pt"})
        with file_format.whole(folder / "adapter_config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EditError(f"The adapter could not be written to {folder}: {error}") from error


def balanced(
    left: Float[Tensor, "d_in rank"], right: Float[Tensor, "rank d_model"]
) -> tuple[Float[Tensor, "d_in thin"], Float[Tensor, "thin d_model"]]:
    """Two factors of the same product and of equal size, without the directions that are nothing
    but rounding: what float32 loses least of."""
    inner, outer = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(inner.R @ outer.R.T, full_matrices=False)
    eps = torch.finfo(s.dtype).eps * max(left.shape[0], right.shape[1])
    used = s > eps * s.max().clamp(min=torch.finfo(s.dtype).tiny)
    root = s[used].sqrt()
    return inner.Q @ u[:, used] * root, root[:, None] * (vh[used] @ outer.Q.T)


@dataclass(frozen=True)
class Receipt:
    """Shows itself as two tables in a notebook; `to_frame` is the one of the facts."""

    sites: pd.DataFrame
    """One row per written weight (index: its name in the Hugging Face model): site, rank, norm
    (Frobenius, of the change), relative (to the norm of the weight), rounded (share of the change,
    0 to 1, that is lost by rounding to the dtype of the weights)."""
    facts: pd.DataFrame
    """One row per fact: subject, prompt, wanted; before, after (the likeliest next token); nll
    before and after (−log P of the wanted answer, nats per token, ≥ 0, lower is better); said
    (whether every token of it is now the argmax)."""
    left_out: int
    """Facts of the edit that were not asked about."""

    def to_frame(self) -> pd.DataFrame:
        """The table of the facts."""
        return self.facts

    @property
    def rounding(self) -> str:
        """A sentence where the weights' dtype took more than a hundredth of a change, else ""."""
        worst = float(self.sites["rounded"].max())
        if not worst > _ROUNDED:
            return ""
        site = self.sites["site"].iloc[int(self.sites["rounded"].to_numpy().argmax())]
        return (
            f"Rounding to the dtype of the weights took {100 * worst:.0f} % of the change at {site}"
            "; load the model in float32 to keep it whole."
        )

    def __repr__(self) -> str:
        more = f"\n… and {self.left_out} more facts" if self.left_out else ""
        return f"{self.sites.to_string()}\n\n{self.facts.round(3).to_string()}{more}{self._note}"

    @property
    def _note(self) -> str:
        return f"\n{self.rounding}" if self.rounding else ""

    def _repr_html_(self) -> str:
        right = int(self.facts["said"].sum())
        head = f"<p><b>{right} of {len(self.facts)}</b> facts are answered as wanted now"
        head += f" ({self.left_out} more were not asked about)" if self.left_out else ""
        facts = self.facts.round(3).to_html(index=False, border=0)
        note = f"<p>{self.rounding}</p>" if self.rounding else ""
        sites = self.sites.to_html(border=0, float_format="{:.3g}".format)
        return f"{head}.</p>{facts}<p>Weights written:</p>{sites}{note}"
