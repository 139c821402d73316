"""An edit as a value: weight changes that can be applied, undone, added up, saved and loaded; and
its receipt, which tells what it did to the weights and to the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens.data import file_format, markup
from pmet_lens.data.facts import Fact
from pmet_lens.editing import edit_files
from pmet_lens.editing.edit_files import Receipt as Receipt
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.targets import OnStep, Targets
from pmet_lens.evaluation import scoring
from pmet_lens.models import tokens
from pmet_lens.models.chat import Frame
from pmet_lens.models.model import Model, Site
from pmet_lens.models.weights import EditError


@runtime_checkable
class Editor(Protocol):
    """A method that is another algorithm (fine-tuning, MEND) than the one a `Method` describes.
    `pl.edit` hands it all its arguments."""

    def edit(
        self,
        model: Model,
        facts: Sequence[Fact],
        moments: Any = None,
        hparams: Any = None,
        contexts: Any = None,
        targets: Any = None,
        on_step: OnStep | None = None,
    ) -> Edit:
        """The edit; `model` is left as it was."""
        ...


@dataclass(frozen=True)
class Edit:
    """Weight changes, and everything that says where they came from."""

    factors: Mapping[Site, tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_model"]]]
    """Per site two thin float64 matrices whose product is the weight change; the rank is at most
    the number of facts."""
    dtype: torch.dtype
    """Dtype of the weights the edit was computed on; deltas are rounded to it once."""
    facts: tuple[Fact, ...]
    method: Any
    """The value that made it: a `Method`, or one of the gradient methods."""
    hparams: Any
    """The strengths that method took."""
    contexts: tuple[str, ...]
    targets: Targets | None = field(default=None, repr=False)
    """Present on a fresh edit; not saved."""
    base: Mapping[Site, str] = field(default_factory=dict, repr=False)
    """SHA-256 of every weight the edit was computed on."""
    parameters: Mapping[Site, str] = field(default_factory=dict, repr=False)
    """The names of these weights in the Hugging Face model."""
    fan_in_fan_out: bool = field(default=False, repr=False)
    """Whether they are stored `[d_in, d_model]` there (GPT-2's Conv1D), else the other way."""
    model: str = ""
    """The name of the model it was computed on."""
    frame: Frame = field(default_factory=Frame, repr=False)
    """The chat template its prompts stood in."""
    answered: int | None = field(default=None, compare=False)
    """Facts that the model gave the new answer to right after; None: it was not asked."""

    @cached_property
    def deltas(self) -> Mapping[Site, Float[Tensor, "d_in d_model"]]:
        """What is added to `model.weight(site)`, in the dtype of the weight."""
        return {site: (a @ b).to(self.dtype) for site, (a, b) in self.factors.items()}

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.factors))
        said = "" if self.answered is None else f", {self.answered} of them answered"
        return f"Edit({len(self.facts)} facts{said}, sites {sites})"

    def _repr_html_(self) -> str:
        sites = [f"{site} (rank {a.shape[1]})" for site, (a, _) in self.factors.items()]
        facts = [f"{f.text} → {f.target_new}" for f in self.facts]
        rows = {"facts": markup.listed(facts, 5), "weights": ", ".join(sites)}
        rows |= {"method": repr(self.method), "model": self.model or "–"}
        title = f"Edit of {len(facts)} fact{'' if len(facts) == 1 else 's'}"
        return markup.pairs(rows, title)

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the edit inside the block, and bit for bit as before after it."""
        on = self in model.live_edits  # then `apply_` refuses
        try:
            self.apply_(model)
            yield model
        finally:
            if not on and self in model.live_edits:
                self.revert_(model)

    def apply_(self, model: Model) -> None:
        """Change the model's weights in place, until `revert_`."""
        model.live_edits.add(self, self.deltas)

    def revert_(self, model: Model) -> None:
        """Take this edit back. When no edit is left, the weights are the original bits, in whatever
        order the edits were taken back.

        Raises:
            ValueError: if this edit is not applied to this model.
        """
        model.live_edits.remove(self)

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file: thin factors, facts, settings, hashes; no code."""
        edit_files.save(vars(self), path)

    @staticmethod
    def load(path: str | Path, model: Model | None = None, *, any_base: bool = False) -> Edit:
        """Read what `save` wrote.

        With `model`, its weights (as they are without the edits applied now) must be those the edit
        was computed on; `any_base` takes any others of these shapes.

        Raises:
            EditError: for a file that is not an edit, and for another model.
        """
        edit = Edit(**edit_files.load(path))
        if model is not None and not any_base:
            edit.check_base(model)
        return edit

    def check_base(self, model: Model) -> None:
        """Raises `EditError` unless the edit was computed on the weights of this model."""
        for site, digest in self.base.items():
            try:
                now = file_format.digest(model.live_edits.original(site))
            except ValueError as error:
                raise EditError(f"The edit changes {site}, but {error}") from error
            if now != digest:
                raise EditError(
                    f"This edit was computed on {self.model or 'another model'!r} with other "
                    f"weights at {site} than {model.name!r} has here: it would not do what it did. "
                    "Load the model it was made on, or pass any_base=True to take it all the same."
                )

    def __add__(self, other: Edit) -> Edit:
        """The edit that changes the weights by what both change together, rounded once. Its rank is
        at most theirs together.

        Both must have been computed on the same weights. The sum is not one edit of all facts:
        neither was computed with the other applied. For edits made one after the other, see
        `merged`.

        Raises:
            EditError: for edits computed on different weights or in different dtypes.
        """
        shared = self.factors.keys() & other.factors.keys()
        if self.dtype != other.dtype or any(self.base.get(s) != other.base.get(s) for s in shared):
            raise EditError(
                "These edits were computed on different weights, so their sum is none that either "
                "was computed for; pl.merged adds up edits that were made one after the other."
            )
        return replace(
            _sum([self, other]),
            method=edit_files.both(self.method, other.method),
            hparams=edit_files.both(self.hparams, other.hparams),
            contexts=tuple(dict.fromkeys([*self.contexts, *other.contexts])),
            base={**other.base, **self.base},
            parameters={**other.parameters, **self.parameters},
        )

    def receipt(self, model: Model, n: int | None = 50) -> Receipt:
        """What the edit does to the weights and to the answers about its first `n` facts (None:
        all): two tables, which show themselves in a notebook. The model may have the edit applied;
        it is left as it was."""
        facts = [fact for fact in self.facts if fact.target_new is not None][:n]
        with model.live_edits.without(self):
            sites = _weights_written(self, model)
            before = _answers(model, facts)
            with self.applied(model):
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
        return Receipt(sites, table, len(self.facts) - len(facts))

    def to_peft(self, directory: str | Path, *, max_rank: int = 256) -> None:
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(base, directory)` puts onto the
        model, to be served, switched off, merged or shared. peft is not needed here.

        Raises:
            EditError: where its rank exceeds `max_rank`, for an edit from a file that does not name
                the weights, or where the files cannot be written.
        """
        edit_files.export_lora(vars(self), directory, max_rank)


def _weights_written(edit: Edit, model: Model) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "weight": [model.parameter_name(site) for site in edit.factors],
            "site": [str(site) for site in edit.factors],
            "rank": [left.shape[1] for left, _ in edit.factors.values()],
            "norm": [float(delta.double().norm()) for delta in edit.deltas.values()],
        }
    )
    weights = [float(model.weight(site).double().norm()) for site in edit.factors]
    rounded: list[float] = []
    for site, (left, right) in edit.factors.items():
        before, exact = model.weight(site), (left @ right).double()
        # Rounded twice: the change to the dtype of the weights, and their sum.
        written = (before + edit.deltas[site].to(before)).double() - before.double()
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


def merged(edits: Edit | Sequence[Edit]) -> Edit:
    """One edit that is the sum of several on the same model; its rank is at most theirs together.

    Raises:
        SettingsError: for an empty list or edits of different methods.
    """
    edits = [edits] if isinstance(edits, Edit) else edits
    if not edits or any(e.method != edits[0].method for e in edits):
        raise SettingsError("merged needs at least one edit, all of one method.")
    return _sum(edits)


def _sum(edits: Sequence[Edit]) -> Edit:
    """The first edit with the factors and facts of all."""
    sites = dict.fromkeys(site for e in edits for site in e.factors)
    factors = {s: side_by_side([e.factors[s] for e in edits if s in e.factors]) for s in sites}
    facts = tuple(f for e in edits for f in e.facts)
    return replace(edits[0], factors=factors, facts=facts, targets=None, answered=None)


def side_by_side(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Two factors whose product is the sum of the products of these."""
    left, right = zip(*factors, strict=True)
    return torch.cat(left, dim=1), torch.cat(right)


def refuse(given: Mapping[str, object], why: str) -> None:
    """Raises `SettingsError` for an argument that would not be used."""
    for name, value in given.items():
        if value is not None:
            raise SettingsError(f"{name}= cannot be used here: {why}. Leave it out.")


def origin(model: Model, sites: Sequence[Site]) -> dict[str, Any]:
    """The fields of an `Edit` of these sites that say what it was computed on."""
    return {
        "base": {site: file_format.digest(model.weight(site)) for site in sites},
        "parameters": {site: model.parameter_name(site) for site in sites},
        "fan_in_fan_out": model.fan_in_fan_out,
        "model": model.name,
        "frame": model.frame,
    }
