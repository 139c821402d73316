"""Every method at 1 … 750 edits at once: what still holds, and what breaks first."""

from __future__ import annotations

from pathlib import Path

from common import EDITED, legend, of, panels, paper_note, read, script
from matplotlib.figure import Figure

from pmet_lens import plotting

METRICS = ("S", "ES", "PS", "NS", "collateral")


def draw(tables: Path) -> Figure:
    """One row per model, one panel per metric, one line per method."""
    table = of(read(tables, "scaling"), benchmark="counterfact")
    fig, axes = panels(9.5, 4.8, len(EDITED), len(METRICS), sharex=True, sharey=True)
    for row, (name, kind) in zip(axes, EDITED.items(), strict=True):
        own = of(table, model=name)
        for ax, metric in zip(row, METRICS, strict=True):
            plotting.load_lines(own, ax, metric)
            ax.set_ylim(-3, 103)
            ax.set_ylabel("")
            ax.set_xlabel("")
        row[0].set_ylabel(f"{name}\n{kind}\nper cent", fontsize=7)
    for ax, metric in zip(axes[0], METRICS, strict=True):
        ax.set_title(metric)
    for ax in axes[-1]:
        ax.set_xlabel("edits at once")
    legend(fig, axes[0, 0], 9)
    fig.suptitle(paper_note(tables, "CounterFact records of the bundled world, all at once"))
    return fig


if __name__ == "__main__":
    script(draw, "fig_scaling", __doc__, paper=True)
