"""The Look tab: maps of component × layer × token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pandas as pd

from pmet_lens.explorer import recipes, widgets
from pmet_lens.explorer.frame import Page, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.views import View
from pmet_lens.interp.attention import subject_attention
from pmet_lens.interp.causal_trace import trace_tokens
from pmet_lens.interp.lens import all_streams, lens_tokens
from pmet_lens.models import tokens
from pmet_lens.plotting import maps
from pmet_lens.plotting.plots import COMPONENT_NAMES

KINDS: Mapping[str, str] = {
    "Lens: probability": "probability",
    "Lens: rank": "rank",
    "Causal trace": "recovered",
    "Attention to the subject": "weight",
}
"""What can be looked at, and the column that is drawn."""
_MAKERS: Mapping[str, tuple[Callable[..., pd.DataFrame], Callable[..., pd.DataFrame]]] = {
    "probability": (lens_tokens, maps.lens_panels),
    "rank": (lens_tokens, maps.lens_panels),
    "recovered": (trace_tokens, maps.trace_panels),
    "weight": (subject_attention, maps.attention_panels),
}
"""What makes the table of a column, and what arranges it as panels."""
_READ = "What each component says at each token when it is read through the model's unembedding: "
_HELP: Mapping[str, str] = {
    "probability": f"{_READ}the probability of the answer's first token.",
    "rank": f"{_READ}the rank of the answer's first token, 1 is the likeliest.",
    "recovered": "The subject is drowned in noise, and one component's clean value is put back at "
    "one layer and token: how much of the answer's probability comes back.",
    "weight": "How much attention each token pays to the subject's tokens, mean over heads.",
}
_ALL = "all"
_PLACES = {
    "every token": "",
    "last subject token": "last_subject",
    "first subject token": "first_subject",
    "last token": "last",
}


class LookTab(Tab):
    """Which answer, which component, which token."""

    def __init__(self, shell: Page) -> None:
        super().__init__(shell, "Look", "Draw the map for the fact above")
        streams = all_streams(shell.session.model)
        named = [(f"{COMPONENT_NAMES[s]} ({s})" if s in COMPONENT_NAMES else s, s) for s in streams]
        self.kind = widgets.choice("View", KINDS.items(), tip="What the map shows")
        self.component = widgets.choice(
            "Component",
            [("all, side by side", _ALL), *named],
            "resid_post",
            "Whose output is read, or put back; the trace of “all” is that of the residual stream",
        )
        tip = "Every token, or one of them"
        self.position = widgets.choice("Position", _PLACES.items(), tip=tip)
        tip = "The answer that is looked for; empty: what the unedited model says"
        self.answer = widgets.suggestion("Answer", (), tip, "what the model says")
        most = min(10, shell.session.model.n_layers)
        tip = "Causal trace only: how many layers are put back together"
        self.window = widgets.number("Window", 1, most, 1, tip)
        tip = "Look at the unedited model instead of the model as it is now"
        self.bare = widgets.tick("without the edits", tip=tip)
        shell.fact.new.observe(self._suggest, names="value")
        self._suggest(None)
        controls = (self.kind, self.component, self.position, self.answer, self.window, self.bare)
        self.box = widgets.column(widgets.row(*controls, self.button), self.pane.box)

    def _suggest(self, _: Any) -> None:
        self.answer.options = tuple(filter(None, [self._shell.fact.new.value]))

    def step(self) -> tuple[str, Work]:
        """Draw the chosen map."""
        name, measure = self.kind.label, self.kind.value

        def work(tick: Tick) -> tuple[View, str]:
            return self._look(tick, name, measure), widgets.message(_HELP[measure])

        return name, work

    def _look(self, tick: Tick, name: str, measure: str) -> View:
        session = self._shell.session
        model = session.model
        fact = self._shell.fact.read(new=False, true=self.answer.value.strip() or None)
        make, arrange = _MAKERS[measure]
        component = self.component.value
        options: dict[str, Any] = {}
        report: dict[str, Any] = {}
        if make is trace_tokens:
            options["stream"] = "resid_post" if component == _ALL else component
            options["window"] = self.window.value
            report["on_cell"] = lambda done, total: tick(done, total, name)
        elif make is lens_tokens:
            options["streams"] = None if component == _ALL else (component,)
        with model.live_edits.bare() if self.bare.value else nullcontext():
            table = make(model, fact, **options, **report)
        batch, _ = tokens.shown(model, fact)
        place = int(batch.at(self.position.value)[0]) if self.position.value else None
        panels = arrange(table, place)
        n, rows = panels["panel"].nunique(), panels["order"].nunique()
        draw = partial(maps.token_map, panels, measure=measure)
        width = min(12.0, 2.2 + n * (0.6 + 0.3 * min(model.n_layers, 16)))
        code = recipes.look(session, fact, make.__name__, options, bare=self.bare.value)
        title = f"{name} of “{fact.target_true}” in “{fact.text}”"
        size = (width, 1.1 + 0.24 * rows)
        return View(f"look-{measure}", title, table, draw, code, size)
