"""What each part of PMET is worth: paired differences on the same facts, on both kinds of block."""

from __future__ import annotations

from pathlib import Path

from common import EDITED, legend, of, panels, paper_note, read, script
from matplotlib.figure import Figure

from pmet_lens import plotting


def draw(tables: Path) -> Figure:
    """One panel per model: differences against PMET in points."""
    table = read(tables, "ablations")
    # Models have different numbers of critical layers, so some rows are of one model alone.
    longest = max((of(table, model=name) for name in EDITED), key=lambda t: t["run"].nunique())
    runs = [run for run in dict.fromkeys(longest["run"]) if run != "PMET"]
    fig, axes = panels(7.5, 5.2, 1, len(EDITED), sharey=True)
    for ax, (name, kind) in zip(axes[0], EDITED.items(), strict=True):
        plotting.effect_dots(of(table, model=name), ax, runs=runs)
        ax.set_title(f"{name}: {kind}", fontsize=8)
    legend(fig, axes[0, 0], 4)
    n = int(table["edits"].iloc[0])
    fig.suptitle(paper_note(tables, f"{n} facts at once; paired 95 % bootstrap intervals"))
    return fig


if __name__ == "__main__":
    script(draw, "fig_ablations", __doc__, paper=True)
