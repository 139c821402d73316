"""The Ask tab: what comes next, without and with the edits that are on the model."""

from __future__ import annotations

from functools import partial

import pandas as pd

from pmet_lens.data import markup
from pmet_lens.explorer import recipes, widgets
from pmet_lens.explorer.frame import Page, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.views import View
from pmet_lens.plotting.maps import answer_bars


class AskTab(Tab):
    """A prompt, the likeliest next tokens, and how the text goes on."""

    def __init__(self, shell: Page) -> None:
        tip = "Ask the model, once without and once with the edits that are on it"
        super().__init__(shell, "Ask", tip)
        self.prompt = widgets.text(
            "Other prompt", tip="Empty: the prompt of the fact above", hint="that of the fact"
        )
        self.k = widgets.number("Tokens shown", 1, 20, 5, "How many of the likeliest next tokens")
        self.length = widgets.number(
            "Continuation", 1, 60, 12, "How many tokens are written, always the likeliest"
        )
        controls = widgets.row(self.prompt, self.k, self.length, self.button)
        self.box = widgets.column(controls, self.pane.box)

    def step(self) -> tuple[str, Work]:
        """Ask."""
        session = self._shell.session
        prompt = self.prompt.value.strip() or self._shell.fact.text
        k, length = self.k.value, self.length.value

        def work(tick: Tick) -> tuple[View, str]:
            table = session.ask(prompt, k, length)
            code = recipes.ask(session, prompt, k, length)
            title = f"The {k} likeliest tokens after “{prompt}”, without and with edits"
            draw, size = partial(answer_bars, table), (7.0, 0.9 + 0.22 * k)
            return View("ask", title, table, draw, code, size), _continuations(table, prompt)

        return "Ask", work


def _continuations(table: pd.DataFrame, prompt: str) -> str:
    """The continuations, one row per model."""
    names = {"before": "without edits", "after": "with the edits that are on"}
    texts = table.groupby("model", sort=False)["continuation"].first()
    rows = [
        [names[str(model)], markup.Raw(f"{markup.escape(prompt)} <b>{markup.escape(text)}</b>")]
        for model, text in texts.items()
    ]
    return markup.table(rows, ["", "goes on (greedily)"])
