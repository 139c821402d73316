"""Progress of a grid: one bar for it, one per run at work, a live table of finished rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from pmet_lens.experiments.grid import Run
from pmet_lens.experiments.tasks import Task

MOST_BARS = 8
"""Runs that have a bar at a time; the bar of the grid counts the others."""


class Progress:
    """Bars in a notebook or a terminal, and rows as they come. `show` False: nothing."""

    def __init__(self, runs: Sequence[Run], show: bool) -> None:
        from tqdm.auto import tqdm

        self._tqdm, self._show = tqdm, show
        self._bars: dict[str, Any] = {}
        self._left: dict[str, int] = {}
        self._names = {run.digest: run.name for run in runs}
        self._rows: list[pd.DataFrame] = []
        self._table = _table() if show else None
        self._grid = tqdm(
            total=len(runs), desc="grid", unit="run", disable=not show, dynamic_ncols=True
        )

    def begin(self, left: Mapping[str, int]) -> None:
        """`left`: digest of a run → how many shards are to be made for it, those that others share
        counted for the first of them."""
        self._left = dict(left)

    def task(self, task: Task) -> None:
        """A shard is done."""
        bar = self._bars.get(task.run)
        if bar is None and len(self._bars) < MOST_BARS and task.run in self._left:
            bar = self._bars[task.run] = self._tqdm(
                total=self._left[task.run],
                desc=self._names[task.run],
                unit="shard",
                leave=False,
                disable=not self._show,
                dynamic_ncols=True,
            )
        if bar is not None:
            bar.set_postfix_str(task.kind, refresh=False)
            bar.update()

    def finished(self, digest: str, rows: pd.DataFrame | None) -> None:
        """A run is over; `rows`: what it says in the table, None where it failed."""
        bar = self._bars.pop(digest, None)
        if bar is not None:
            bar.close()
        if rows is not None and self._table is not None:
            self._rows.append(rows)
            self._table(pd.concat(self._rows, ignore_index=True))
        self._grid.update()

    def close(self) -> None:
        """Leave the bar of the grid, and no other."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
        self._grid.close()


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per run, one column per metric."""
    order = list(dict.fromkeys(rows["metric"]))
    keys = ["run", "model", "edits", "digest"]  # two runs may have one name
    table = rows.pivot_table(index=keys, columns="metric", values="mean", sort=False)
    table = table[order].round(1).reset_index().rename_axis(columns=None)
    return table.drop(columns="digest")


def _table() -> Callable[[pd.DataFrame], object]:
    """Where a table goes that grows: a cell's output, or lines above the bars of a terminal."""
    from tqdm.auto import tqdm

    if _in_notebook():
        display = importlib.import_module("IPython.display")
        handle = display.display(display_id=True)
        return lambda rows: handle.update(wide(rows))
    head: list[str] = []

    def say(rows: pd.DataFrame) -> None:
        lines = wide(rows).to_string(index=False).splitlines()
        if lines[0] != "".join(head):
            head[:] = [lines[0]]
            tqdm.write(lines[0])
        tqdm.write(lines[-1])

    return say


def _in_notebook() -> bool:
    try:
        shell = importlib.import_module("IPython").get_ipython()
    except ModuleNotFoundError:
        return False
    return shell is not None and hasattr(shell, "kernel")
