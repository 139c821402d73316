"""Every method at 1 … 750 edits at once: what still holds, and what breaks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import EDITED, legend, of, panels, paper_note, read, script
from matplotlib.figure import Figure

from pmet_lens import plotting

METRICS = ("S", "ES", "PS", "NS", "collateral")


def draw(tables: Path) -> Figure:
    """One row per model, one panel per metric, one line per method."""
    table = of(read(tables, "scaling"), benchmark="counterfact")
    fig, axes = grid(table, {name: f"{name}\n{kind}" for name, kind in EDITED.items()}, METRICS)
    legend(fig, axes[0, 0], 9)
    fig.suptitle(paper_note(tables, "CounterFact records of the bundled world, all at once"))
    return fig


def grid(
    table: pd.DataFrame, models: Mapping[str, str], metrics: Sequence[str]
) -> tuple[Figure, Any]:
    """A figure and its axes: one row per model (name -> what stands beside it), one panel per
    metric."""
    fig, axes = panels(9.5, 2.4 * len(models), len(models), len(metrics), sharex=True, sharey=True)
    for row, (name, label) in zip(axes, models.items(), strict=True):
        own = of(table, model=name)
        for ax, metric in zip(row, metrics, strict=True):
            plotting.load_lines(own, ax, metric)
            ax.set(ylim=(-3, 103), xlabel="", ylabel="")
        row[0].set_ylabel(f"{label}\nper cent", fontsize=7)
    for ax, metric in zip(axes[0], metrics, strict=True):
        ax.set_title(metric)
    for ax in axes[-1]:
        ax.set_xlabel("edits at once")
    return fig, axes


if __name__ == "__main__":
    script(draw, "fig_scaling", __doc__, paper=True)
