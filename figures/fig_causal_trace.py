"""Causal trace: where restoring a component brings the corrupted answer back."""

from __future__ import annotations

from pathlib import Path

from common import STUDIED, legend, of, panels, read, samples, script
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import plotting

ROWS = {"resid_post": "layer output", "attn_out": "MHSA output", "mlp_out": "FFN output"}


def draw(tables: Path) -> Figure:
    """One row per component, one column per model; the last critical layer is marked."""
    table = read(tables, "causal_trace")
    fig, axes = panels(7, 5.4, len(ROWS), len(STUDIED), sharey=True, sharex="col")
    for column, (name, title) in enumerate(STUDIED.items()):
        critical = pl.HPARAMS[name]["PMET"].layers[-1] if name in pl.HPARAMS else None
        for row, (stream, label) in enumerate(ROWS.items()):
            ax, own = axes[row, column], of(table, model=name, stream=stream)
            plotting.trace_lines(own, ax, critical if row == 0 else None)
            window = int(own["window"].iloc[0])
            several = f", {window} layers" if window > 1 else ""
            ax.set_ylabel("" if column else f"recovered by\n{label}{several}")
            if row < len(ROWS) - 1:
                ax.set_xlabel("")
        axes[0, column].set_title(title, pad=12)
    fig.suptitle(
        f"Noise of {table['noise'].iloc[0]:g} standard deviations, {samples(table)} facts × "
        f"{table['samples'].iloc[0]} samples, 95 % bootstrap intervals",
        fontsize=7,
    )
    legend(fig, axes[0, 0], 5)
    return fig


if __name__ == "__main__":
    script(draw, "fig_causal_trace", __doc__)
