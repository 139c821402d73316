"""The Look tab: maps of component × layer × token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pmet_lens.explorer import recipes, widgets
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.views import Pane, Shell, View
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
_ALL = "all"
_HELP: Mapping[str, str] = {
    "probability": "What each component says at each token when it is read through the model's "
    "unembedding: the probability of the answer's first token.",
    "rank": "What each component says at each token when it is read through the model's "
    "unembedding: the rank of the answer's first token, 1 is the likeliest.",
    "recovered": "The subject is drowned in noise, and one component's clean value is put back at "
    "one layer and token: how much of the answer's probability comes back.",
    "weight": "How much attention each token pays to the subject's tokens, mean over heads.",
}


class LookTab:
    """Which answer, which component, which token."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        streams = all_streams(shell.session.model)
        named = [(f"{COMPONENT_NAMES[s]} ({s})" if s in COMPONENT_NAMES else s, s) for s in streams]
        self.kind = widgets.choice("View", KINDS.items(), tip="What the map shows")
        self.component = widgets.choice(
            "Component",
            [("all, side by side", _ALL), *named],
            "resid_post",
            "Whose output is read, or put back; the trace of “all” is that of the residual stream",
        )
        places = [("every token", ""), ("last subject token", "last_subject")]
        places += [("first subject token", "first_subject"), ("last token", "last")]
        self.position = widgets.choice("Position", places, tip="Every token, or one of them")
        self.answer = widgets.suggestion(
            "Answer",
            (),
            "The answer that is looked for; empty: what the unedited model says",
            "what the model says",
        )
        self.window = widgets.number(
            "Window", 1, min(10, shell.session.model.n_layers), 1,
            "Causal trace only: how many layers are put back together",
        )  # fmt: skip
        self.bare = widgets.tick(
            "without the edits", tip="Look at the unedited model instead of the model as it is now"
        )
        tip = "Draw the map for the fact above"
        self.button = shell.button("Look", tip, self.run, "primary")
        self.pane = Pane(shell)
        shell.fact.new.observe(self._suggest, names="value")
        self._suggest(None)
        controls = (self.kind, self.component, self.position, self.answer, self.window)
        self.box = widgets.column(widgets.row(*controls, self.bare, self.button), self.pane.box)

    def _suggest(self, _: Any) -> None:
        self.answer.options = tuple(filter(None, [self._shell.fact.new.value]))

    def run(self) -> None:
        """Draw the chosen map, in a step."""
        name, measure = self.kind.label, self.kind.value

        def show(view: View) -> None:
            self.pane.show(view, widgets.message(_HELP[measure]))

        self._shell.run(name, lambda tick: self._look(tick, name, measure), show)

    def _look(self, tick: Tick, name: str, measure: str) -> View:
        session = self._shell.session
        model = session.model
        fact = self._shell.fact.read(new=False, true=self.answer.value.strip() or None)
        component, call = self.component.value, "lens_tokens"
        options: dict[str, Any] = {}
        if measure == "recovered":
            call = "trace_tokens"
            options["stream"] = "resid_post" if component == _ALL else component
            options["window"] = self.window.value
        elif measure == "weight":
            call = "subject_attention"
        else:
            options["streams"] = None if component == _ALL else (component,)
        function = {"lens_tokens": lens_tokens, "subject_attention": subject_attention}.get(call)

        def look() -> Any:
            if function is not None:
                return function(model, fact, **options)
            return trace_tokens(
                model, fact, on_cell=lambda done, total: tick(done, total, name), **options
            )

        if self.bare.value:
            with model.live_edits.bare():
                table = look()
        else:
            table = look()
        batch, _ = tokens.shown(model, fact)
        place = None if not self.position.value else int(batch.at(self.position.value)[0])
        arrange = {
            "lens_tokens": maps.lens_panels,
            "trace_tokens": maps.trace_panels,
            "subject_attention": maps.attention_panels,
        }[call]
        panels = arrange(table, place)
        n, rows = panels["panel"].nunique(), panels["order"].nunique()
        draw = partial(maps.token_map, panels, measure=measure)
        width = min(12.0, 2.2 + n * (0.6 + 0.3 * min(model.n_layers, 16)))
        code = recipes.look(session, fact, call, options, bare=self.bare.value)
        title = f"{name} of “{fact.target_true}” in “{fact.text}”"
        size = (width, 1.1 + 0.24 * rows)
        return View(f"look-{measure}", title, table, draw, code, size)
