"""The Edit tab: one fact, a method and its strengths, a live loss curve, and the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd

from pmet_lens.data import markup
from pmet_lens.data.facts import Fact
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.methods import HPARAMS
from pmet_lens.evaluation import knowledge
from pmet_lens.explorer import effects, recipes, widgets
from pmet_lens.explorer.frame import Page, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.session import Step
from pmet_lens.explorer.settings_panel import SettingsPanel
from pmet_lens.explorer.views import View
from pmet_lens.interp.suggestion import Suggestion, suggest_hparams
from pmet_lens.models import generation
from pmet_lens.plotting import maps

_REDRAW = 1.0  # seconds between two drawings of the loss curve
_TRACED = 10  # facts that settings are suggested from
_COLUMNS = ("kind", "prompt", "before", "after", "p_before", "p_after")
_HEAD = ("", "prompt", "before", "after", "P(new) before", "P(new) after")


class EditTab(Tab):
    """Edits one after the other; each can be taken back in any order."""

    def __init__(self, page: Page) -> None:
        tip = "Edit the fact above; the edit stays on the model until Undo"
        super().__init__(page, "Edit", tip)
        self.settings = SettingsPanel(page.session)
        self.method, self.layers = self.settings.method, self.settings.layers
        self.controls, self._note = self.settings.controls, self.settings.note
        tip = "Put layers and strengths back to those known for this model"
        reset = page.button("Known settings", tip, self.settings.reset)
        tip = "Find layers by a causal trace of facts that the model knows (not tuned)"
        suggest = page.button("Suggest settings", tip, self._suggest)
        if page.session.model.name.lower() in HPARAMS:
            suggest.layout.display = "none"
        tip = "Ask in full sentences, without and with the newest edit: other words, what follows, "
        tip += "what has to stay, and ten prompts about other things"
        more = page.button("What else changed", tip, self._more)
        self._rows = widgets.column()
        self.history: list[tuple[Step, Any, Any]] = []
        self._also: Callable[[], object] = lambda: None
        page.session.on_change = self._changed
        top = widgets.row(self.method, self.settings.steps, self.button, reset, suggest, more)
        self.box = widgets.column(top, self.settings.strengths, self._rows, self.pane.box)

    def also_resets(self, reset: Callable[[], object]) -> None:
        """`reset` is called when settings were suggested: another tab has them too."""
        self._also = reset

    def step(self) -> tuple[str, Work]:
        """Edit the fact, with a curve of its losses."""
        session, (name, change) = self._shell.session, self.settings.read()
        n_steps, title = self.settings.n_steps(), f"Edit with {self.settings.name}"

        def work(tick: Tick) -> Step:
            fact = self._shell.fact.read(new=True)
            curve = _Curve(self, tick, n_steps)
            before, session.on_made = session.on_made, partial(self._made, tick)
            try:
                return session.edit(fact, name, change, curve.on_step, tick)
            finally:
                session.on_made = before

        return title, work

    def _made(self, tick: Tick, fact: Fact, edit: Edit) -> None:
        """Say at once what the model says with the edit; the table takes longer."""
        model = self._shell.session.model
        with edit.applied(model):
            (answer,) = generation.answers(model, [fact.text])
        tick(0, 0, f"the model says “{answer}” with it; asking more")

    def drawn(self, made: Step) -> Any:
        """The answers before and after, below the losses; and what the model says about every edit
        of the session."""
        table, fact, session = made.table, made.fact, self._shell.session
        title = f"P(“{fact.target_new}”) before and after the edit of “{fact.text}”"
        draw, size = partial(maps.prompt_shifts, table), (7.0, 0.9 + 0.26 * len(table))
        name, code = f"edit-{len(session.steps)}", recipes.edit(session, made)
        targets = made.edit.targets
        loss = "" if targets is None else _drawn(targets.history, fact.text)
        answers = markup.table(maps.rows_of(table, _COLUMNS), _HEAD)
        view = View(name, title, table, draw, code, size)
        return (*super().drawn((view, loss + answers)), self.now())

    def show(self, made: Any) -> None:
        """Show them."""
        view, text, figure, now = made
        self.remember(now)  # first: whatever fails after it, the edit can be undone
        super().show((view, text, figure))

    def _more(self) -> None:
        if not self.history:
            raise SettingsError("There is no edit yet: edit a fact first.")
        step, session = self.history[-1][0], self._shell.session
        name = f"edit {len(self.history)}"

        def work(tick: Tick) -> Any:
            table = effects.effects(session.model, step.fact, {name: step.edit}, tick)
            title = f"What else {name} changed: “{step.fact.text} {step.fact.target_new}”"
            draw = partial(maps.changed_bars, table)
            code = recipes.effects(session, step, name)
            view = View(f"effects-{len(self.history)}", title, table, draw, code, (7.0, 1.6))
            return view, effects.shown(table), view.inline()

        self._shell.run("What else changed", work, lambda made: self.pane.show(*made))

    def _suggest(self) -> None:
        session = self._shell.session

        def work(tick: Tick) -> Suggestion:
            with session.model.live_edits.bare():
                tick(0, 0, "which facts the model knows")
                facts = knowledge.recalled(session.model, n=_TRACED)
                tick(0, 0, f"causal trace of {len(facts)} facts")
                return suggest_hparams(session.model, facts, n_edits=1)

        def show(made: Suggestion) -> None:
            session.hparams = made.hparams
            self.settings.reset()
            self._also()
            self._note.value = widgets.message(made.why)

        self._shell.run("Suggest settings", work, show)

    def remember(self, now: list[str]) -> None:
        """Give every step of the session a row, those that were made in code too, and say what
        the model says `now` about each."""
        for step in self._shell.session.steps[len(self.history) :]:
            line = widgets.beside(widgets.html())
            tip = f"Take edit {len(self.history) + 1} off the model, or put it on again"
            button = self._shell.button("Undo", tip, partial(self._toggle, step))
            self.history.append((step, line, button))
            self._rows.children = (*self._rows.children, widgets.row(button, line))
        self._update_rows(now)

    def _changed(self) -> None:
        """An edit was made or undone, here or in code."""
        if self._shell.runner.busy:  # the step shows it itself, where widgets may change
            self._shell.runner.firm()
        else:
            self.remember(self.now())

    def _toggle(self, step: Step) -> None:
        session = self._shell.session
        on = session.is_on(step)

        def work(tick: Tick) -> list[str]:
            tick(0, 0, "taking it off" if on else "putting it on")
            session.undo(step) if on else session.redo(step)
            return self.now()

        self._shell.run("Undo" if on else "Redo", work, self._update_rows)

    def now(self) -> list[str]:
        """What the model says now about the fact of every edit of the session."""
        session = self._shell.session
        return generation.answers(session.model, [step.fact.text for step in session.steps])

    def _update_rows(self, now: list[str]) -> None:
        """Say it."""
        session = self._shell.session
        for number, ((step, line, button), says) in enumerate(
            zip(self.history, now, strict=True), start=1
        ):
            on = session.is_on(step)
            button.description = "Undo" if on else "Redo"
            state = "on" if on else "off"
            text = f"{number}. {step.method}: {step.fact.text} → {step.fact.target_new}"
            line.value = (
                f'<div style="line-height: 1.35">{markup.escape(text)} ({state}); '
                f"the model says now: <b>{markup.escape(says)}</b></div>"
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
            figure = _drawn(pd.DataFrame(self._rows), "the fact", self._n_steps)
            self._tab._shell.runner.post(lambda: self._tab.pane.figure(figure))
            self._drawn = time.monotonic()


def _drawn(history: pd.DataFrame, of: str, n_steps: int | None = None) -> str:
    draw = partial(maps.loss_curve, history, n_steps=n_steps)
    return View("loss", f"Losses over the steps for {of}", history, draw, "", (6.0, 2.0)).inline()
