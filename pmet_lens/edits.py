"""An edit as a value: weight changes that can be applied, undone, added up, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import artifact
from pmet_lens.adapter import Model, Site
from pmet_lens.facts import Fact
from pmet_lens.settings import SettingsError
from pmet_lens.targets import OnStep, Targets

Delta = Float[Tensor, "d_in d_model"]


@runtime_checkable
class Editor(Protocol):
    """A method with an algorithm of its own (fine-tuning, MEND) instead of the four answers of a
    `Method`. `pl.edit` hands it everything it was given."""

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
        """The edit; `model` is left as it was found."""
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

    @cached_property
    def deltas(self) -> Mapping[Site, Delta]:
        """What is added to `model.weight(site)`, in the dtype of the weight."""
        return {site: (a @ b).to(self.dtype) for site, (a, b) in self.factors.items()}

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.factors))
        return f"Edit({len(self.facts)} facts, sites {sites})"

    @contextmanager
    def applied(self, model: Model) -> Iterator[Model]:
        """The model with the edit inside the block, and bit for bit as before behind it."""
        self.apply_(model)
        try:
            yield model
        finally:
            self.revert_(model)

    def apply_(self, model: Model) -> None:
        """Change the model's weights in place, until `revert_`."""
        model.live_edits.add(self, self.deltas)

    def revert_(self, model: Model) -> None:
        """Take this edit back. When no edit is left the weights are the original bits, in whatever
        order the edits were taken back.

        Raises:
            ValueError: if this edit is not applied to this model.
        """
        model.live_edits.remove(self)

    def save(self, path: str | Path) -> None:
        """Write a `.safetensors` file: thin factors, facts, settings, hashes; no code."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "targets"}
        artifact.save(parts, path)

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read what `save` wrote. Raises ValueError for a file that is not an edit."""
        return Edit(**artifact.load(path))


def merged(edits: Sequence[Edit]) -> Edit:
    """One edit that is the sum of several on the same model; its rank is at most theirs together.

    Raises:
        SettingsError: for an empty list or edits of different methods.
    """
    if not edits or any(e.method != edits[0].method for e in edits):
        raise SettingsError("merged needs at least one edit, all of one method.")
    sites = dict.fromkeys(site for e in edits for site in e.factors)
    factors = {
        site: (
            torch.cat([e.factors[site][0] for e in edits if site in e.factors], dim=1),
            torch.cat([e.factors[site][1] for e in edits if site in e.factors], dim=0),
        )
        for site in sites
    }
    facts = tuple(f for e in edits for f in e.facts)
    first = edits[0]
    return replace(first, factors=factors, facts=facts, targets=None)
