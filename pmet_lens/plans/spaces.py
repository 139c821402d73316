"""Which settings `tune` tries: around a first guess, one change at a time, then two.

A setting is optimised for (a *group*: the last critical layer, the clamp, the norm it refers to) or
only solved for (λ, the layers below the last): of those a group tries several, with the same
targets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pmet_lens.data.facts import Fact
from pmet_lens.editing.edits import Editor
from pmet_lens.editing.finetune import FineTune, FineTuneHparams
from pmet_lens.editing.method import Hparams, Method, SettingsError, kind_of
from pmet_lens.editing.methods import hparams_for
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.interp.suggestion import suggest_hparams
from pmet_lens.models.model import Model

RANGE = 10.0
"""λ (or what the solver has instead) is tried from a tenth of the guess to ten times it."""
_FT_BOUND = 5e-4
"""Of FT+L where nothing is known: as released for GPT-2 XL."""
_SHOWN = ("layers", "layer", "clamp", "reference_norm", "lr", "norm_constraint")
_SOLVED: dict[type, str] = {Ridge: "second_moment_weight", NullSpace: "null_space_l2"}
"""Solver -> the strength that weighs the old against the new facts."""


def tunable(method: object) -> bool:
    """Whether the method has settings to choose: a trained editor has none."""
    return isinstance(method, (Method, FineTune))


def check_tunable(method: object) -> None:
    """Raises `SettingsError` for a method that has no settings to choose."""
    if not tunable(method):
        raise SettingsError(
            f"{type(method).__name__} has nothing to tune: it was trained, and acts as its editor "
            "does. Tune another method, or train an editor with train_editor."
        )


def first_guess(model: Model, facts: Sequence[Fact], method: Method | Editor) -> tuple[Any, str]:
    """Settings to begin with, and in words where they are from: those known for the model, else
    `suggest_hparams`, of which methods other than PMET take the layers.

    Raises:
        SettingsError: for a method that has no settings to choose.
    """
    check_tunable(method)
    try:
        if isinstance(method, FineTune):
            return method.settings(model), "the settings known for the model"
        assert isinstance(method, Method)
        return hparams_for(model, method), "the settings known for the model"
    except SettingsError:
        suggested = suggest_hparams(model, list(facts), len(facts)).hparams
    said = "suggest_hparams"
    last = suggested.layers[-1]
    if isinstance(method, FineTune):
        bound = _FT_BOUND if method.constrained else None
        return FineTuneHparams(layer=last, norm_constraint=bound), said
    assert isinstance(method, Method)
    kind = kind_of(method)
    if kind == "PMET":
        return suggested, said
    return Hparams((last,) if kind == "ROME" else suggested.layers), said


@dataclass(frozen=True)
class Space:
    """The settings of one method on one model."""

    method: Method | FineTune
    centre: Any
    """The first guess, with nothing left open."""
    n_layers: int
    usable: frozenset[int]
    """Layers whose weights can be written: those with second moments."""

    @property
    def dear(self) -> bool:
        """Whether nothing is kept between two settings, because each optimises its facts anew."""
        way = self.method
        return not isinstance(way, Method) or way.at_once is not None or way.refresh

    @property
    def strength(self) -> str | None:
        """The field that says how hard an edit is written; None: the solver reads none."""
        return self.weight or ("lr" if isinstance(self.method, FineTune) else None)

    @property
    def weight(self) -> str | None:
        """The field that weighs old facts against new ones; None: the solver reads none."""
        if not isinstance(self.method, Method):
            return None
        return _SOLVED.get(type(self.method.solver))

    def groups(self) -> list[Any]:
        """Settings whose targets differ, the guess first, then one change each, then two; those
        that do not fit the model are left out."""
        changes = list(self._changes())
        pairs = itertools.combinations(changes, 2)
        both = [one | other for one, other in pairs if not one.keys() & other.keys()]
        found = [self._with(change) for change in ({}, *changes, *both)]
        return list(dict.fromkeys(hp for hp in found if hp is not None))

    def near(self, hp: Any, first: bool, last: bool) -> list[Any]:
        """`hp`, and settings near it with the same targets. `first`: over the whole range of λ;
        `last`: closer, and no other number of layers."""
        name, found = self.weight, [hp]
        if self.dear or not isinstance(hp, Hparams):
            return found
        if name is not None:
            low, high = (getattr(self.centre, name) * f for f in (1 / RANGE, RANGE))
            factors = (0.1, 10.0) if first else (0.5, 2.0) if last else (0.3, 3.0)
            tried = [min(max(f * getattr(hp, name), low), high) for f in factors]
            found += [replace(hp, **{name: value}) for value in tried]
        if not first and not last:
            n = len(hp.layers)
            counts = [] if isinstance(self.method.solver, Exact) else [max(1, n // 2), n + 2]  # type: ignore[union-attr]
            more = [self._layers(hp.layers[-1], count) for count in counts]
            found += [replace(hp, layers=layers) for layers in more if layers]
            if isinstance(self.method.solver, NullSpace):  # type: ignore[union-attr]
                threshold = hp.null_space_threshold
                found += [replace(hp, null_space_threshold=threshold * f) for f in (0.1, 10.0)]
        return list(dict.fromkeys(found))

    def scaled(self, hp: Any, share: float) -> Any:
        """The settings for another number of facts at once, `share` times as many: λ in
        proportion."""
        name = self.weight
        return hp if name is None else replace(hp, **{name: share * getattr(hp, name)})

    def _changes(self) -> Iterator[dict[str, Any]]:
        """What may differ from the guess, the likeliest first."""
        hp = self.centre
        step = max(1, round(self.n_layers / 12))
        if isinstance(hp, FineTuneHparams):
            rates = [{"lr": hp.lr * f} for f in (3.0, 10.0, 1 / 3)]
            bound = hp.norm_constraint
            if bound is not None:  # too small, or reached too slowly, it lets nothing be edited
                both = [{"norm_constraint": bound * f, "lr": hp.lr * f} for f in (10.0, 3.0, 30.0)]
                rates = [*both, *({"norm_constraint": bound * f} for f in (3.0, 1 / 3)), *rates]
            yield from rates
            yield from ({"layer": hp.layer + step * n} for n in (1, -1, 2, -2))
            return
        # First where it is written: on real models that matters most (`grid_MEMIT.csv`).
        yield from ({"last": hp.layers[-1] + step * n} for n in (1, -1, 2, -2, 3, -3))
        if self.dear and self.weight is not None:
            value = getattr(hp, self.weight)
            yield from ({self.weight: value * f} for f in (1 / RANGE, RANGE))
        yield from ({"clamp": hp.clamp * f} for f in (2.0, 0.5))
        assert isinstance(self.method, Method)
        if {"attn_out", "mlp_out"} & {*self.method.delta_at} and kind_of(self.method) == "PMET":
            norm = "own stream" if hp.reference_norm == "resid_post" else "resid_post"
            yield {"reference_norm": norm}

    def _with(self, change: dict[str, Any]) -> Any:
        """The guess with these changes; None where there are no such layers."""
        hp, change = self.centre, dict(change)
        if isinstance(hp, FineTuneHparams):
            there = 0 <= change.get("layer", hp.layer) < self.n_layers
            return replace(hp, **change) if there else None
        last = change.pop("last", hp.layers[-1])
        layers = hp.layers if last == hp.layers[-1] else self._layers(last, len(hp.layers))
        return replace(hp, layers=layers, **change) if layers else None

    def _layers(self, last: int, count: int) -> tuple[int, ...]:
        """So many layers that end at `last`, or as many as can be written; none where that one
        cannot be."""
        if last not in self.usable or last > self.n_layers - 2:
            return ()
        found = [last]
        while len(found) < count and found[-1] - 1 in self.usable:
            found.append(found[-1] - 1)
        return tuple(reversed(found))


def fields_of(hp: Any, weight: str | None) -> dict[str, Any]:
    """The settings that are searched, as columns."""
    shown = [*_SHOWN, *([weight] if weight else [])]
    if weight == "null_space_l2":
        shown.append("null_space_threshold")
    found = {name: getattr(hp, name) for name in shown if getattr(hp, name, None) is not None}
    if isinstance(hp, Hparams):
        found.pop("lr", None)
        found["layers"] = " ".join(map(str, hp.layers))
    return found


def text_of(hp: Any, weight: str | None) -> str:
    """The same in words."""
    names = {"second_moment_weight": "λ", "reference_norm": "of", "norm_constraint": "bound"}
    names |= {"null_space_l2": "l2", "null_space_threshold": "null space below"}
    values = fields_of(hp, weight)
    said = [
        f"{names.get(name, name)} {value:.3g}"
        if isinstance(value, float)
        else f"{names.get(name, name)} {value}"
        for name, value in values.items()
    ]
    return ", ".join(said)
