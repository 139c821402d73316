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

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact
from pmet_lens.editing import edit_files
from pmet_lens.editing.edit_files import Receipt as Receipt
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.targets import OnStep, Targets
from pmet_lens.models.chat import Frame
from pmet_lens.models.model import Model, Site
from pmet_lens.models.weights import EditError
from pmet_lens.shipping import exits
from pmet_lens.shipping.cards import Effects


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
        return edit_files.shown(self)

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
        return edit_files.receipt(self, model, n)

    def to_peft(
        self,
        directory: str | Path,
        *,
        max_rank: int = 256,
        receipt: Receipt | None = None,
        effects: Effects = None,
    ) -> None:
        """Write a LoRA adapter that `peft.PeftModel.from_pretrained(base, directory)` puts onto the
        model, to be served, switched off, merged or shared, with a model card. peft is not needed
        here.

        `receipt`, `effects`: what the card tells, as in `save_model`.

        Raises:
            EditError: where its rank exceeds `max_rank`, for an edit from a file that does not name
                the weights, or where the files cannot be written.
        """
        exits.adapter(self, directory, max_rank, receipt, effects)

    def save_model(
        self,
        model: Model,
        directory: str | Path,
        *,
        receipt: Receipt | None = None,
        effects: Effects = None,
        max_shard_size: str = "5GB",
        any_base: bool = False,
        undoable: bool = False,
    ) -> None:
        """Write the edited model as a checkpoint that transformers and, by its format, vLLM
        open: safetensors in the dtype the model has, with an index where it is cut into files of
        `max_shard_size`, configuration, generation settings, tokenizer, and a model card. Of the
        edits that are on the model only this one goes in; the model is left as it was.

        Args:
            model: the one the edit was computed on; `any_base` takes any other of these shapes.
            directory: a new or an empty one; it appears whole or not at all.
            receipt: `edit.receipt(model)`, for the card.
            effects: a table of `pl.general_ability` or `pl.summarise`, or several under their
                headings, for the card.
            undoable: also write the changed weights as they were (`pmet_lens/undo.safetensors`),
                from which `pmet-lens edit --undo` makes the checkpoint of before.

        Raises:
            EditError: for another model, and where the directory is not empty or cannot be written.
        """
        if not any_base:
            self.check_base(model)
        exits.checkpoint(self, model, directory, receipt, effects, max_shard_size, undoable)

    def save_gguf(
        self,
        source: str | Path,
        target: str | Path,
        type: str | None = None,
        *,
        receipt: Receipt | None = None,
        effects: Effects = None,
        any_base: bool = False,
        undoable: bool = False,
    ) -> pd.DataFrame:
        """Write a copy of a GGUF file in which only the edited tensors differ, for Ollama and
        llama.cpp, and a model card beside it (`target.gguf.md`). Every other tensor and every value
        of the header is byte for byte that of the source. Needs `pmet-lens[gguf]`.

        Args:
            source: the file the edited model was loaded from, a directory with one, or the name of
                a fetched model. It is never changed.
            target: a new file; it appears whole or not at all.
            type: what edited tensors are stored as: "F16", "Q8_0", "F32" or "BF16". None: F32 where
                they are so now, else F16, also where they were quantised: it loses 0.2 to 0.7 % of
                the change, Q8_0 6 to 17 % (SmolLM2-135M from Q4_1, three facts by PMET).
            receipt, effects: what the card tells, as in `save_model`.
            any_base: also onto other weights than those the edit was computed on.
            undoable: also write the tensors as they were (`target.gguf.undo`), from which
                `pmet-lens edit --undo` makes the source again, bit for bit.

        Returns:
            One row per edited tensor (index: its name): site, was, stored (types), rounded (share
            of the change, from 0, that is lost by rounding to that type), bytes (how much longer
            it is than it was).

        Raises:
            EditError: for a source that is no GGUF file, is cut or split, is `target` itself, has
                other weights, or lacks a tensor; where the file cannot be written.
        """
        return exits.gguf(self, source, target, type, receipt, effects, any_base, undoable)


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
    factors = {
        s: edit_files.side_by_side([e.factors[s] for e in edits if s in e.factors]) for s in sites
    }
    facts = tuple(f for e in edits for f in e.facts)
    return replace(edits[0], factors=factors, facts=facts, targets=None, answered=None)


def refuse(given: Mapping[str, object], why: str) -> None:
    """Raises `SettingsError` for an argument that would not be used."""
    for name, value in given.items():
        if value is not None:
            raise SettingsError(f"{name}= cannot be used here: {why}. Leave it out.")
