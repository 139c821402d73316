"""How an edit is written as one file of this package (safetensors with thin factors and a JSON
header, nothing that can run); and the receipt, which tells what it did to the weights and to the
answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pmet_lens.data import file_format, markup
from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.evaluation import scoring
from pmet_lens.models import tokens
from pmet_lens.models.chat import Frame
from pmet_lens.models.model import Model, Site
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


def receipt(edit: Any, model: Model, n: int | None) -> Receipt:
    """`Edit.receipt`."""
    facts = [fact for fact in edit.facts if fact.target_new is not None][:n]
    with model.live_edits.without(edit):
        sites = _weights_written(edit.factors, edit.deltas, model)
        before = _answers(model, facts)
        with edit.applied(model):
            after = _answers(model, facts)
    table = pd.DataFrame(
        {
            "subject": [f.subject for f in facts],
            "prompt": [f.text for f in facts],
            "wanted": [f.target_new for f in facts],
            "before": before["token"],
            "after": after["token"],
            "nll before": before["nll"],
            "nll after": after["nll"],
            "said": after["argmax"],
        }
    )
    return Receipt(sites, table, len(edit.facts) - len(facts))


def _weights_written(
    factors: Mapping[Site, tuple[Tensor, Tensor]], deltas: Mapping[Site, Tensor], model: Model
) -> pd.DataFrame:
    """`Receipt.sites` of an edit that is not on the model."""
    table = pd.DataFrame(
        {
            "weight": [model.parameter_name(site) for site in factors],
            "site": [str(site) for site in factors],
            "rank": [left.shape[1] for left, _ in factors.values()],
            "norm": [float(delta.double().norm()) for delta in deltas.values()],
        }
    )
    weights = [float(model.weight(site).double().norm()) for site in factors]
    rounded: list[float] = []
    for site, (left, right) in factors.items():
        before, exact = model.weight(site), (left @ right).double()
        # Rounded twice: the change to the dtype of the weights, and their sum.
        written = (before + deltas[site].to(before)).double() - before.double()
        rounded.append(float((written - exact.to(written)).norm() / exact.norm()))
    return table.assign(relative=table["norm"] / weights, rounded=rounded).set_index("weight")


def _answers(model: Model, facts: Sequence[Fact]) -> dict[str, Any]:
    """Per fact the likeliest next token, and the wanted answer's nll and whether it is the
    argmax."""
    asked = scoring.ask(model, [f.text for f in facts], k=1)
    prompts = [tokens.Prompt(f.text, None, f.target_new, f.blank) for f in facts]
    scores = scoring.score(model, prompts)
    return {
        "token": asked["token"].str.strip(),
        "nll": [s.nll for s in scores],
        "argmax": [s.right == 1 for s in scores],
    }


def shown(edit: Any) -> str:
    """An edit as a notebook shows it."""
    sites = [f"{site} (rank {a.shape[1]})" for site, (a, _) in edit.factors.items()]
    facts = [f"{f.text} → {f.target_new}" for f in edit.facts]
    rows = {"facts": markup.listed(facts, 5), "weights": ", ".join(sites)}
    rows |= {"method": repr(edit.method), "model": edit.model or "–"}
    title = f"Edit of {len(facts)} fact{'' if len(facts) == 1 else 's'}"
    return markup.pairs(rows, title)


def side_by_side(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the sum of the products of these."""
    left, right = zip(*factors, strict=True)
    return torch.cat(left, dim=1), torch.cat(right)


def thin(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors `[d_in, rank]` and `[rank, d_model]`; their product and an identity where that is
    smaller, which has the same product to the bit: so an edit of many facts is no larger than the
    weights that it writes."""
    if left.shape[1] <= right.shape[1]:
        return left, right
    return left @ right, torch.eye(right.shape[1], dtype=right.dtype, device=right.device)


def origin(model: Model, sites: Sequence[Site]) -> dict[str, Any]:
    """The fields of an `Edit` of these sites that say what it was computed on."""
    return {
        "base": {site: file_format.digest(model.weight(site)) for site in sites},
        "parameters": {site: model.parameter_name(site) for site in sites},
        "fan_in_fan_out": model.fan_in_fan_out,
        "model": model.name,
        "frame": model.frame,
    }
