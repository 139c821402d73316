"""The tab of two edits of one fact, side by side, in full sentences."""

from __future__ import annotations

from functools import partial
from typing import Any

from pmet_lens.editing.method import SettingsError
from pmet_lens.explorer import effects, recipes, widgets
from pmet_lens.explorer.frame import Page, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.session import Step
from pmet_lens.explorer.settings_panel import SettingsPanel
from pmet_lens.explorer.views import View
from pmet_lens.panel.tab_edit import EditTab
from pmet_lens.plotting import maps

_MARKS = ("A", "B")


class TwoTab(Tab):
    """Two methods, or one with two settings; either of the two edits can be put on the model."""

    def __init__(self, page: Page, edits: EditTab) -> None:
        tip = "Make both edits of the fact above, each on the unedited model, ask in full sentences"
        super().__init__(page, "Edit twice", f"{tip}, and take them back")
        self.settings = {mark: SettingsPanel(page.session, mark) for mark in _MARKS}
        self.settings["B"].method.value = "MEMIT"
        self.steps: dict[str, Step] = {}
        self._edits = edits
        edits.also_resets(self.reset)
        self._keep = {mark: self._keeper(mark) for mark in _MARKS}
        sides = []
        for mark, panel in self.settings.items():
            strengths = widgets.folded(f"Layers and strengths of {mark}", panel.strengths)
            sides.append(widgets.column(widgets.row(panel.method, panel.steps), strengths))
        buttons = widgets.row(self.button, *self._keep.values())
        self.box = widgets.column(*sides, buttons, self.pane.box)

    def reset(self) -> None:
        """Put the settings of both back to those known."""
        for panel in self.settings.values():
            panel.reset()

    def step(self) -> tuple[str, Work]:
        """Both edits, and what they change."""
        session = self._shell.session
        edits = {f"{mark}: {p.name}": p.read() for mark, p in self.settings.items()}
        total = sum(panel.n_steps() for panel in self.settings.values())

        def work(tick: Tick) -> Any:
            fact = self._shell.fact.read(new=True)
            done = 0

            def on_step(step: int, losses: Any) -> None:
                nonlocal done
                done += 1
                tick(min(done, total), total, "optimising (steps of both)")

            table, steps = effects.compared(session, fact, edits, on_step, tick)
            self.steps = dict(zip(_MARKS, steps.values(), strict=True))
            title = f"Two edits: “{fact.text} {fact.target_new}” ({', '.join(edits)})"
            draw, size = partial(maps.changed_bars, table), (7.0, 2.0)
            code = recipes.side_by_side(session, fact, edits)
            return View("two", title, table, draw, code, size), effects.shown(table)

        return "Edit twice", work

    def _keeper(self, mark: str) -> Any:
        tip = f"Put edit {mark} onto the model; Undo is in the Edit tab"
        return self._shell.button(f"Keep {mark}", tip, partial(self._put, mark))

    def _put(self, mark: str) -> None:
        if mark not in self.steps:
            raise SettingsError("Make the two edits first.")
        step, session = self.steps[mark], self._shell.session
        if session.is_on(step):
            raise SettingsError(f"Edit {mark} is on the model; Undo is in the Edit tab.")

        def work(tick: Tick) -> list[str]:
            tick(0, 0, "putting it on")
            session.redo(step) if step in session.steps else session.keep(step)
            return self._edits.now()

        self._shell.run(f"Keep {mark}", work, self._edits.remember)
