"""Causal trace: where restoring a component brings the corrupted answer back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from common import STUDIED, legend, of, panels, read, samples, script
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import plotting

ROWS = {"resid_post": "layer output", "attn_out": "MHSA output", "mlp_out": "FFN output"}


def draw(tables: Path) -> Figure:
    """One row per component, one column per model; the last critical layer is marked."""
    return grid(read(tables, "causal_trace"), STUDIED, 5)


def grid(table: pd.DataFrame, models: Mapping[str, str], columns: int) -> Figure:
    """The same for `models` (name -> title), with `columns` of the legend. A model that restores
    another number of layers than the one before says so."""
    fig, axes = panels(7, 5.4, len(ROWS), len(models), sharey=True, sharex="col")
    said: dict[str, str] = {}
    for column, (name, title) in enumerate(models.items()):
        critical = pl.HPARAMS[name]["PMET"].layers[-1] if name in pl.HPARAMS else None
        for row, (stream, label) in enumerate(ROWS.items()):
            ax, own = axes[row, column], of(table, model=name, stream=stream)
            plotting.trace_lines(own, ax, critical if row == 0 else None)
            window = int(own["window"].iloc[0])
            several = f", {window} layers" if window > 1 else ""
            text = f"recovered by\n{label}{several}"
            ax.set_ylabel("" if said.get(stream) == text else text)
            said[stream] = text
            if row < len(ROWS) - 1:
                ax.set_xlabel("")
        axes[0, column].set_title(title, pad=12)
    fig.suptitle(
        f"Noise of {table['noise'].iloc[0]:g} standard deviations, {samples(table)} facts × "
        f"{table['samples'].iloc[0]} samples, 95 % bootstrap intervals",
        fontsize=7,
    )
    legend(fig, axes[0, 0], columns)
    return fig


if __name__ == "__main__":
    script(draw, "fig_causal_trace", __doc__)
