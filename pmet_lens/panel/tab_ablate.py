"""The Ablate tab: the same fact under variations of PMET."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from pmet_lens.data import markup
from pmet_lens.editing.method import Method, SettingsError
from pmet_lens.editing.methods import PMET
from pmet_lens.explorer import recipes, variants, widgets
from pmet_lens.explorer.frame import Page, Tab, Work
from pmet_lens.explorer.jobs import Tick
from pmet_lens.explorer.views import View
from pmet_lens.plotting import maps

_HEAD = ("method", "says", "P(new)", "paraphrases %", "neighbours kept %", "‖ΔW‖/‖W‖")


class AblateTab(Tab):
    """Boxes to tick; every combination of them is edited and measured."""

    def __init__(self, shell: Page) -> None:
        tip = "Edit the fact above on the unedited model under each combination, and take it back"
        super().__init__(shell, "Compare", tip)
        self.attention = {
            True: widgets.tick("with δ^a", True, "Attention gets a delta, as in PMET"),
            False: widgets.tick("without δ^a", True, "Only the feed-forward output gets a delta"),
        }
        self.write_attention = {
            False: widgets.tick("W_out only", True, "Only feed-forward weights are written: PMET"),
            True: widgets.tick("W_O and W_out", False, "Attention weights are written, too"),
        }
        self.spread = {
            "sqrt": widgets.tick("square root", True, "A layer takes R/√n when n remain: PMET"),
            "linear": widgets.tick("linear", True, "A layer takes R/n when n remain: MEMIT"),
        }
        tips = {
            "ridge": "λ times the second moment against the new keys: PMET, MEMIT",
            "exact": "The new value is stored exactly: ROME, EMMET",
            "null space": "Written only where old keys hardly reach: AlphaEdit",
        }
        self.solver = {name: widgets.tick(name, name == "ridge", tips[name]) for name in tips}
        self._groups = (self.attention, self.write_attention, self.spread, self.solver)
        lines = []
        for name, group in zip(("δ^a", "Written", "Spread", "Solver"), self._groups, strict=True):
            label = widgets.html(f'<div style="width: 5em"><b>{name}</b></div>')
            lines.append(widgets.row(label, *group.values()))
            for box in group.values():
                box.observe(lambda _: self._count_variants(), names="value")
        self._count = widgets.html()
        self.box = widgets.column(*lines, widgets.row(self.button, self._count), self.pane.box)
        self._count_variants()

    def _methods(self) -> dict[str, Method]:
        def ticked(group: Mapping[Any, Any]) -> list[Any]:
            return [value for value, box in group.items() if box.value]

        return variants.variants(*map(ticked, self._groups))

    def _count_variants(self) -> None:
        names = list(self._methods())
        text = f"{len(names)} variants: {'; '.join(names)}." if names else "Tick one of each."
        self._count.value = widgets.message(text)

    def step(self) -> tuple[str, Work]:
        """Compare the ticked variants."""
        methods, session = self._methods(), self._shell.session
        if not methods:
            raise SettingsError("Tick at least one box of each line.")
        hparams = session.settings(PMET)  # says what is missing before anything runs
        assert hparams is not None

        def work(tick: Tick) -> tuple[View, str]:
            fact = self._shell.fact.read(new=True)
            rows = variants.ablate(
                session, fact, methods, lambda step, _: tick(0, 0, f"optimising, step {step}"), tick
            )
            table = variants.compared(rows)
            code = recipes.ablate(session, fact, methods, hparams)
            title = f"“{fact.text} {fact.target_new}” under {len(table)} variations of PMET"
            draw, size = partial(maps.variant_bars, table), (7.0, 0.9 + 0.26 * len(table))
            return View("ablate", title, rows, draw, code, size), _table(table)

        return "Compare", work


def _table(compared: pd.DataFrame) -> str:
    flat = compared.reset_index()
    for name in ("paraphrases", "neighbours"):
        flat[name] = [None if v != v else round(v) for v in flat[name]]
    return markup.table(maps.rows_of(flat, list(flat.columns)), _HEAD)
