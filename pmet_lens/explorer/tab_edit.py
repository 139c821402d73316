"""The Edit tab: one fact, a method and its strengths, a live loss curve, and the way back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from pmet_lens.data import markup
from pmet_lens.editing.method import Hparams, SettingsError
from pmet_lens.editing.methods import METHODS
from pmet_lens.explorer import recipes, widgets
from pmet_lens.explorer.frame import Shell, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.session import Step
from pmet_lens.explorer.views import View
from pmet_lens.models import generation
from pmet_lens.plotting import maps

_REDRAW = 0.4  # seconds between two drawings of the loss curve
_COLUMNS = ("kind", "prompt", "before", "after", "p_before", "p_after")
_HEAD = ("", "prompt", "before", "after", "P(new) before", "P(new) after")


class EditTab(Tab):
    """Edits one after the other; each can be taken back in any order."""

    def __init__(self, shell: Shell) -> None:
        super().__init__(
            shell, "Edit", "Edit the fact above; the edit stays on the model until Undo"
        )
        last = max(1, shell.session.model.n_layers - 2)
        self.method = widgets.choice("Method", list(METHODS), "PMET", "Which method edits")
        self.layers = widgets.span(
            "Layers", 0, last, (0, last), "The critical layers, whose weights are written"
        )
        self.controls: Mapping[str, Any] = {
            "n_steps": widgets.number(
                "Steps", 1, 100, 30, "Optimisation steps at most; more for stubborn facts"
            ),
            "lr": widgets.magnitude(
                "Learning rate", -2, 0, 0.2, "Of Adam on the deltas; too large overshoots"
            ),
            "clamp": widgets.strength(
                "Clamp", 0.05, 4.0, 0.75, 0.05, "Bound on a delta, relative to the clean norm"
            ),
            "kl_weight": widgets.strength(
                "KL weight μ", 0.0, 2.0, 1.0, 0.0125, "How much “{} is a …” is held in place"
            ),
            "second_moment_weight": widgets.magnitude(
                "λ", -1, 6, 10.0, "How much the weights' old answers count against the new fact"
            ),
        }
        self._note = widgets.html()
        strengths = widgets.row(self.layers, *self.controls.values())
        self._strengths = widgets.column(strengths, self._note)
        tip = "Put layers and strengths back to those known for this model"
        reset = shell.button("Known settings", tip, self._reset)
        self._rows = widgets.column()
        self.history: list[tuple[Step, Any, Any]] = []
        self.method.observe(lambda _: self._reset(), names="value")
        self._reset()
        shell.session.on_change = self._changed
        top = widgets.row(self.method, self.button, reset)
        self.box = widgets.column(top, self._strengths, self._rows, self.pane.box)

    def _reset(self) -> None:
        try:
            known, note = self._shell.session.settings(self.method.value), ""
            if known is None:
                note = f"{self.method.value} has its own settings, fixed for each model."
        except SettingsError as error:
            known, note = None, f"{error} In the explorer: pl.explore(model, hparams=…)."
        for control in (self.layers, *self.controls.values()):
            control.disabled = known is None
        self._note.value = widgets.message(note) if note else ""
        if known is not None:
            self.layers.value = (known.layers[0], known.layers[-1])
            for name, control in self.controls.items():
                control.value = getattr(known, name)

    def _change(self, known: Hparams | None) -> dict[str, Any]:
        """The settings that the controls say, where they differ from the known ones."""
        if known is None:
            return {}
        first, last = self.layers.value
        chosen = {name: control.value for name, control in self.controls.items()}
        if (first, last) != (known.layers[0], known.layers[-1]):
            chosen["layers"] = tuple(range(first, last + 1))
        return {name: value for name, value in chosen.items() if value != getattr(known, name)}

    def step(self) -> tuple[str, Work]:
        """Edit the fact, with a curve of its losses."""
        session, name = self._shell.session, self.method.value
        known = session.settings(name)
        change = self._change(known)
        n_steps = change.get("n_steps", known.n_steps if known else 0)

        def work(tick: Tick) -> Step:
            fact = self._shell.fact.read(new=True)
            curve = _Curve(self, tick, n_steps)
            return session.edit(fact, name, change, curve.on_step, tick)

        return f"Edit with {name}", work

    def show(self, made: Step) -> None:
        """Show the answers before and after, below the losses."""
        self._remember()  # first: whatever fails after it, the edit can be undone
        table, fact, session = made.table, made.fact, self._shell.session
        title = f"P(“{fact.target_new}”) before and after the edit of “{fact.text}”"
        draw, size = partial(maps.prompt_shifts, table), (7.0, 0.9 + 0.26 * len(table))
        name, code = f"edit-{len(session.steps)}", recipes.edit(session, made)
        targets = made.edit.targets
        loss = "" if targets is None else _drawn(targets.history, fact.text)
        answers = markup.table(maps.rows_of(table, _COLUMNS), _HEAD)
        super().show((View(name, title, table, draw, code, size), loss + answers))

    def _remember(self) -> None:
        """Give every step of the session a row, those that were made in code too."""
        for step in self._shell.session.steps[len(self.history) :]:
            line = widgets.beside(widgets.html())
            tip = f"Take edit {len(self.history) + 1} off the model, or put it on again"
            button = self._shell.button("Undo", tip, partial(self._toggle, step))
            self.history.append((step, line, button))
            self._rows.children = (*self._rows.children, widgets.row(button, line))
        self._update_rows()

    def _changed(self) -> None:
        """An edit was made or undone, here or in code."""
        if not self._shell.runner.busy:  # then the step shows it itself, where widgets may change
            self._remember()

    def _toggle(self, step: Step) -> None:
        session = self._shell.session
        if session.is_on(step):
            session.undo(step)
        else:
            session.redo(step)

    def _update_rows(self) -> None:
        """What the model says now about the fact of every edit."""
        session = self._shell.session
        answers = generation.answers(session.model, [s.fact.text for s, _, _ in self.history])
        rows = zip(self.history, answers, strict=True)
        for number, ((step, line, button), now) in enumerate(rows, start=1):
            on = session.is_on(step)
            button.description = "Undo" if on else "Redo"
            state = "on" if on else "off"
            text = f"{number}. {step.method}: {step.fact.text} → {step.fact.target_new}"
            line.value = (
                f'<div style="line-height: 1.35; opacity: {1 if on else 0.7}">'
                f"{markup.escape(text)} ({state}); "
                f"the model says now: <b>{markup.escape(now)}</b></div>"
            )
        on = sum(session.is_on(step) for step, _, _ in self.history)
        self._shell.say(f"{on} of {len(self.history)} edits are on the model.")


class _Curve:
    """Collects the losses of the steps and draws them now and then."""

    def __init__(self, tab: EditTab, tick: Tick, n_steps: int) -> None:
        self._tab, self._tick, self._n_steps = tab, tick, n_steps
        self._rows: list[dict[str, float]] = []
        self._drawn = 0.0

    def on_step(self, step: int, losses: Mapping[str, Any]) -> None:
        """`OnStep` of an edit of one fact."""
        self._rows.append({"step": step, **{k: float(v.mean()) for k, v in losses.items()}})
        self._tick(step + 1, self._n_steps, "optimising (steps)")
        if time.monotonic() - self._drawn > _REDRAW:
            self._drawn = time.monotonic()
            history = pd.DataFrame(self._rows)
            self._tab._shell.runner.post(lambda: self._show(history))

    def _show(self, history: pd.DataFrame) -> None:
        self._tab.pane.figure(_drawn(history, "the fact", self._n_steps))


def _drawn(history: pd.DataFrame, of: str, n_steps: int | None = None) -> str:
    draw = partial(maps.loss_curve, history, n_steps=n_steps)
    return View("loss", f"Losses over the steps for {of}", history, draw, "", (6.0, 2.0)).inline()
