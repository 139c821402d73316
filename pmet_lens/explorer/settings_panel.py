"""A method and its strengths, as controls: those of one edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmet_lens.editing import objective
from pmet_lens.editing.method import FAST, Hparams, Method, SettingsError, kind_of
from pmet_lens.editing.methods import METHODS, named
from pmet_lens.explorer import widgets
from pmet_lens.explorer.session import Session

_STEPS = {"as published": "published", "fast: 10, cheaper": "fast"}
_SOONER = "PMET"
"""The method that `Hparams.fast` was chosen for: on a large model its steps are fast to begin with,
so that an answer is there within seconds; the published ones are a choice away."""
_BY_FAST = ("n_steps", "lr")
"""What fast steps settle, or do not read."""


class SettingsPanel:
    """The method, and its strengths where it has some; `mark` tells two panels of one tab apart."""

    def __init__(self, session: Session, mark: str = "") -> None:
        self._session, end = session, f" {mark}" if mark else ""
        last = max(1, session.model.n_layers - 2)
        self.method = widgets.choice(f"Method{end}", list(METHODS), "PMET", "Which method edits")
        tip = "The steps that were published, or fewer and cheaper ones: sooner, other targets"
        self.steps = widgets.choice(f"Step rule{end}", _STEPS.items(), "published", tip)
        tip = "The critical layers, whose weights are written"
        self.layers = widgets.Span(f"layer{end}", 0, last, tip)
        self.controls: Mapping[str, Any] = {
            "n_steps": widgets.number(
                f"Steps{end}", 1, 100, 30, "Optimisation steps at most; more for stubborn facts"
            ),
            "lr": widgets.magnitude(
                f"Learning rate{end}", -2, 0, 0.2, "Of Adam on the deltas; too large overshoots"
            ),
            "clamp": widgets.strength(
                *(f"Clamp{end}", 0.05, 4.0, 0.75, 0.05),
                tip="Bound on a delta, relative to the clean norm",
            ),
            "kl_weight": widgets.strength(
                *(f"KL weight μ{end}", 0.0, 2.0, 1.0, 0.0125),
                tip="How much “{} is a …” is held in place",
            ),
            "second_moment_weight": widgets.magnitude(
                *(f"λ{end}", -1, 6, 10.0),
                tip="How much the weights' old answers count against the new fact",
            ),
        }
        self.note = widgets.html()
        strengths = (self.layers.first, self.layers.last, *self.controls.values())
        self.strengths = widgets.column(widgets.row(*strengths), self.note)
        self.method.observe(lambda _: self.reset(), names="value")
        self.steps.observe(lambda _: self._switch(), names="value")
        self.reset()

    def reset(self) -> None:
        """Put layers and strengths back to those known for the model and method."""
        name = self.method.value
        known = None
        try:
            known, note = self._session.settings(name), ""
            if known is None:
                note = f"{name} has its own settings, fixed for each model."
        except SettingsError as error:
            note = f"{error} In the explorer: pl.explore(model, hparams=…)."
        for control in (self.layers, *self.controls.values()):
            control.disabled = known is None
        self.note.value = widgets.message(note) if note else ""
        method = named(name)
        can = known is not None and isinstance(method, Method) and kind_of(method) != "ROME"
        self.steps.disabled = not can
        fast = can and name == _SOONER and objective.large(self._session.model)
        self.steps.value = "fast" if fast else "published"
        if known is not None:
            self.layers.value = (known.layers[0], known.layers[-1])
            for field, control in self.controls.items():
                control.value = getattr(known, field)
            self._switch()

    def _switch(self) -> None:
        if not self.layers.disabled:
            for field in _BY_FAST:
                self.controls[field].disabled = self.steps.value == "fast"

    @property
    def name(self) -> str:
        """The method, and how its steps are taken."""
        return f"{self.method.value}{', fast' if self.steps.value == 'fast' else ''}"

    def read(self) -> tuple[str, dict[str, Any]]:
        """The method's name, and the settings that the controls say where they differ from those
        known.

        Raises:
            SettingsError: for a model without known settings, where none were given.
        """
        known = self._session.settings(self.method.value)
        return self.method.value, self._change(known)

    def n_steps(self) -> int:
        """Steps at most; 0: nobody knows."""
        known = self._session.settings(self.method.value)
        change = self._change(known)
        return int(change.get("n_steps", known.n_steps if known else 0))

    def _change(self, known: Hparams | None) -> dict[str, Any]:
        if known is None:
            return {}
        first, last = self.layers.value
        chosen = {field: control.value for field, control in self.controls.items()}
        if self.steps.value == "fast":
            chosen = {k: v for k, v in chosen.items() if k not in _BY_FAST} | dict(FAST)
        if (first, last) != (known.layers[0], known.layers[-1]):
            chosen["layers"] = tuple(range(first, last + 1))
        return {name: value for name, value in chosen.items() if value != getattr(known, name)}
