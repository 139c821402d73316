"""What the studies here share: a pass that keeps activations, the parts of a prompt, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.models.bridge import Hook
from pmet_lens.models.model import Model
from pmet_lens.models.sites import ModelError, ending, several
from pmet_lens.models.tokens import Batch

Key = TypeVar("Key")


def keep(
    values: dict[Key, Tensor], key: Key, pick: Callable[[Tensor], Tensor] | None = None
) -> Hook:
    """A hook that stores the activation, or what `pick` takes of it, as `values[key]`."""

    def hook(value: Tensor) -> None:
        values[key] = value if pick is None else pick(value)

    return hook


def capture(
    model: Model, batch: Batch, points: Mapping[Key, str], pick: Callable[[Tensor], Tensor]
) -> dict[Key, Tensor]:
    """What `pick` takes of the activation at each hook name of `points`, in one pass up to the
    highest layer. A point that the model never reaches is left out."""
    values: dict[Key, Tensor] = {}
    hooks = [(name, keep(values, key, pick)) for key, name in points.items()]
    end = ending(list(points.values()), model.n_layers)
    with torch.no_grad():
        model.forward(batch.ids, batch.mask, hooks=hooks, **end)
    return values


def parts_of(batch: Batch) -> dict[str, Bool[Tensor, "row token"]]:
    """The parts of a prompt: each of its tokens is in exactly one. The last token counts as the
    subject's where the prompt ends with the subject."""
    position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    first, subject, last = (x[:, None] for x in (batch.first, batch.subject, batch.last))
    return {
        "before": position < first,
        "first subject token": (position == first) & (first < subject),
        "middle subject tokens": (position > first) & (position < subject),
        "last subject token": position == subject,
        "between": (position > subject) & (position < last),
        "last": (position == last) & (last > subject),
    }


def same_pairs(facts: Sequence[Fact]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[fact, fact]` each: whether two facts share the relation, the subject, the template."""

    def same(values: list[str]) -> np.ndarray:
        codes = np.unique(values, return_inverse=True)[1]
        return codes[:, None] == codes

    columns = zip(*((str(f.relation), f.subject, f.prompt) for f in facts), strict=True)
    relation, subject, prompt = (same(list(values)) for values in columns)
    return relation, subject, prompt


def layers_of(model: Model, layers: int | Sequence[int] | None, needed_by: str) -> Sequence[int]:
    """`layers` (one or several); None: all. Raises `ModelError` for an empty choice."""
    layers = range(model.n_layers) if layers is None else several(layers)
    if not layers:
        raise ModelError(f"{needed_by} needs at least one layer")
    return layers


def check_relations(facts: Sequence[Fact], needed_by: str) -> None:
    """Raises `FactError` for a fact without a relation."""
    for fact in facts:
        if fact.relation is None:
            raise FactError(f"{fact.text!r} has no relation; {needed_by} needs one.")


def some(facts: Fact | Iterable[Fact]) -> list[Fact]:
    """The facts as a list, one or several. Raises `FactError` for none."""
    several = listed(facts)
    if not several:
        raise FactError("There are no facts to look at; pass at least one Fact.")
    return several


def each(facts: Iterable[Fact], table: Callable[[Fact], pd.DataFrame]) -> pd.DataFrame:
    """The tables of single facts under each other, with the columns fact (number) and subject.
    Raises `FactError` for none."""
    frames = []
    for number, fact in enumerate(some(facts)):
        frame = table(fact)
        frame.insert(0, "fact", number)
        frame.insert(1, "subject", fact.subject)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
