"""The weight of what the model already knows (λ), and which layers are written."""

from __future__ import annotations

from pathlib import Path

from common import EDITED, legend, of, panels, paper_note, read, script
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import plotting


def draw(tables: Path) -> Figure:
    """Per model: metrics over λ for PMET and MEMIT, and S over the critical layers."""
    weights, layers = read(tables, "lambda"), read(tables, "layers")
    fig, axes = panels(9, 5, len(EDITED), 3)
    for row, name in zip(axes, EDITED, strict=True):
        for ax, run in zip(row, ("PMET", "MEMIT"), strict=False):
            own = of(weights, model=name, run=run)
            plotting.sweep_lines(own, ax, "second_moment_weight")
            chosen = pl.HPARAMS[name][run].second_moment_weight
            ax.axvline(chosen, color="#444444", lw=0.8, ls=":")
            ax.set_xscale("log")
            ax.set_xlabel("λ (dotted: the settings)")
            ax.set_title(f"{name}: {run}", fontsize=8)
        row[1].set_ylabel("")
        plotting.layer_map(of(layers, model=name), row[2])
        row[2].set_title(f"{name}: S of PMET", fontsize=8)
    legend(fig, axes[0, 0], 5)
    n = int(weights["edits"].iloc[0])
    fig.suptitle(paper_note(tables, f"{n} facts at once; 95 % bootstrap intervals"))
    return fig


if __name__ == "__main__":
    script(draw, "fig_sweeps", __doc__, paper=True)
