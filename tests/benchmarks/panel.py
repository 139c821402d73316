"""How long a click in the explorer takes, and what holds its event loop up meanwhile.

`python tests/benchmarks/panel.py [MODEL]` opens a model, SmolLM2-135M where none is named, as
`pl.explore` does in a fresh kernel: edits five facts that it offers, one after the other, each
undone before the next, asks, and compares side by side. One row an action: seconds from the click
to the answer that is shown first and to the end, and the longest that the loop did not run
meanwhile. Nothing is drawn in a browser. `--record` replaces the committed table.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from conftest import RESULTS, markdown, number, where

import pmet_lens as pl

BEAT, PAUSE = 0.02, 4.0
"""Seconds between two beats of the loop, and between two actions: a reader looks at the answer."""
EDITS = 5
SAYS = "the model says"


@dataclass
class Measured:
    """One action: seconds, and the longest that the loop was late for a beat."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)


class Panel:
    """An explorer of a model, the clicks on it, and what they took."""

    def __init__(self, model: str) -> None:
        self.rows: dict[str, Measured] = {}
        self._said, self._late = 0.0, 0.0
        self._beats = asyncio.create_task(self._beat())
        self.explorer: Any = None
        self._model = model

    async def all(self) -> None:
        """Every action, one after the other."""
        await self._act("open it", self._open)
        panel = self.explorer
        there = panel.fact.example.options[1 : 1 + EDITS]
        for i, (_, value) in enumerate(there):
            panel.fact.example.value = value
            await asyncio.sleep(PAUSE)
            what = "the first edit of a session" if i == 0 else "an edit"
            await self._act(what, panel.edit.button.click)
            await asyncio.sleep(PAUSE)
            if i + 1 < len(there):
                await self._act("undo it", panel.edit.history[-1][2].click)
        await self._act("ask", panel.ask.button.click)
        await self._act("side by side", panel.two.button.click)
        self._beats.cancel()

    def _open(self) -> None:
        self.explorer = pl.explore(self._model)
        runner = self.explorer.runner
        told: Callable[[int, int, str], object] = runner._on_progress

        def on_progress(done: int, total: int, what: str) -> None:
            if what.startswith(SAYS):
                self._said = time.perf_counter()
            told(done, total, what)

        runner._on_progress = on_progress

    async def _act(self, what: str, click: Callable[[], object]) -> None:
        row = self.rows.setdefault(what, Measured())
        self._said, self._late, begun = 0.0, 0.0, time.perf_counter()
        click()
        while self.explorer.runner.busy:
            await asyncio.sleep(BEAT)
        end = time.perf_counter()
        await asyncio.sleep(2 * BEAT)  # a beat that is late is heard
        row.first.append((self._said or end) - begun)
        row.whole.append(end - begun)
        row.held.append(self._late)
        sys.stderr.write(f"{what}: {row.first[-1]:.2f} s, {row.whole[-1]:.2f}, {self._late:.3f}\n")

    async def _beat(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(BEAT)
            self._late = max(self._late, time.perf_counter() - begun - BEAT)

    def table(self) -> pd.DataFrame:
        """Medians, with the range where there are several."""

        def cell(times: list[float]) -> str:
            middle = f"{number(statistics.median(times))} s"
            if len(times) == 1:
                return middle
            return f"{middle} [{number(min(times))}, {number(max(times))}]"

        rows = [
            {
                "click": what,
                "times": len(row.first),
                "first answer": cell(row.first),
                "all of it": cell(row.whole),
                "loop held": f"{max(row.held):.2f} s",
            }
            for what, row in self.rows.items()
        ]
        return pd.DataFrame(rows)


async def measured(model: str) -> pd.DataFrame:
    """The table of one model."""
    panel = Panel(model)
    await panel.all()
    return panel.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--record", action="store_true", help="replace the committed table")
    args = parser.parse_args()
    table = asyncio.run(measured(args.model))
    note = f"{args.model}; medians, in brackets the range; loop held: the longest of all."
    text = f"{markdown(table)}\n{note} {where()}.\n"
    for folder in [RESULTS.parent / "out", *([RESULTS] if args.record else [])]:
        folder.mkdir(exist_ok=True)
        (folder / f"panel_{Path(args.model).name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
