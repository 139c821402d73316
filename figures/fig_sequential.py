"""Batch after batch: earlier edits, other facts, text and weights, with and without protection."""

from __future__ import annotations

from pathlib import Path

from common import EDITED, legend, of, panels, paper_note, read, script
from matplotlib.figure import Figure

from pmet_lens import plotting

METRICS = {
    "ES": "ES of all facts so far",
    "NS": "NS of all facts so far",
    "collateral": "other facts right (%)",
    "perplexity": "perplexity",
    "weight_norm": "‖W + ΣΔ‖ / ‖W‖, largest",
}


def draw(tables: Path) -> Figure:
    """One row per model, one panel per metric, one line per run."""
    table = read(tables, "sequential")
    fig, axes = panels(10, 4.6, len(EDITED), len(METRICS), sharex=True)
    for row, name in zip(axes, EDITED, strict=True):
        for ax, metric in zip(row, METRICS, strict=True):
            plotting.step_lines(of(table, model=name), ax, metric)
            ax.set_ylabel("")
            ax.set_xlabel("")
            ax.set_xlim(0, table["edits"].max() * 1.04)
            if metric == "weight_norm":
                ax.set_yscale("log")
            elif metric != "perplexity":
                ax.set_ylim(top=101)
        row[0].set_ylabel(name)
    for ax, label in zip(axes[0], METRICS.values(), strict=True):
        ax.set_title(label, fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("edits so far")
    legend(fig, axes[0, 0], 5)
    batch = int(table["batch"].iloc[0])
    text = f"{batch} facts per batch; 95 % intervals; a cross: perplexity above three times before"
    fig.suptitle(paper_note(tables, text))
    return fig


if __name__ == "__main__":
    script(draw, "fig_sequential", __doc__, paper=True)
