"""The study on real models as pictures, from its committed tables.

Where the models recall, component by component; every method over the number of facts that are
edited at once, each with its own settings; what each part of PMET is worth. `redraw.py` draws them
with all others; by itself: `python figures/real_figures.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from common import HERE, OUT, legend, make, of, panels, read
from matplotlib.figure import Figure

from pmet_lens import plotting

RESULTS = HERE / "results" / "real"
ROWS = {"resid_post": "layer output", "attn_out": "MHSA output", "mlp_out": "FFN output"}
METRICS = ("S", "PS", "NS", "EA", "EF", "collateral")
ABLATED = ("ES", "PS", "NS", "EA")


def models(table: pd.DataFrame) -> list[str]:
    """The larger model last."""
    return sorted(table["model"].unique(), reverse=True)


def trace(tables: Path) -> Figure:
    """One row per component, one column per model."""
    table = read(tables, "trace")
    names = models(table)
    fig, axes = panels(7, 5.4, len(ROWS), len(names), sharey=True, sharex="col")
    for column, name in enumerate(names):
        for row, (stream, label) in enumerate(ROWS.items()):
            ax, own = axes[row, column], of(table, model=name, stream=stream)
            plotting.trace_lines(own, ax)
            window = int(own["window"].iloc[0])
            several = f"{label}, {window} layers" if window > 1 else label
            ax.set_ylabel(f"recovered by\n{several}" if column == 0 or window > 1 else "")
            if row < len(ROWS) - 1:
                ax.set_xlabel("")
        axes[0, column].set_title(name)
    fig.suptitle(
        f"Noise of {table['noise'].iloc[0]:g} standard deviations, {int(table['n'].max())} facts "
        "that the model recalls, 95 % bootstrap intervals",
        fontsize=7,
    )
    legend(fig, axes[0, 0], 2)
    return fig


def edits(tables: Path) -> Figure:
    """One row per model, one panel per metric, one line per method; dotted: unedited."""
    table = of(read(tables, "edits"), benchmark="facts")
    names, edited = models(table), set(table.loc[table["edits"] > 0, "metric"])
    metrics = [metric for metric in METRICS if metric in edited]
    fig, axes = panels(9.5, 2.4 * len(names), len(names), len(metrics), sharex=True, sharey=True)
    for row, name in zip(axes, names, strict=True):
        own = of(table, model=name)
        for ax, metric in zip(row, metrics, strict=True):
            plotting.load_lines(own[own["edits"] > 0], ax, metric)
            for value in own.loc[(own["edits"] == 0) & (own["metric"] == metric), "mean"]:
                ax.axhline(value, color="#444444", ls=":", lw=1, label="unedited")
            ax.set(ylim=(-3, 103), xlabel="", ylabel="")
        row[0].set_ylabel(f"{name}\nper cent", fontsize=7)
    for ax, metric in zip(axes[0], metrics, strict=True):
        ax.set_title("free answers (EF)" if metric == "EF" else metric)
    sizes = sorted(set(table["edits"]) - {0})
    for ax in axes[-1]:
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.set_xlabel("edits at once")
    fig.suptitle(
        "Records of CounterFact (one edit: each alone on the clean model), every method with "
        "settings tuned on other facts, 95 % bootstrap intervals",
        fontsize=7,
    )
    legend(fig, axes[0, 0], 8)
    return fig


def ablations(tables: Path) -> Figure:
    """One panel per model: differences against PMET in points."""
    table = read(tables, "ablations")
    names = models(table)
    runs = [run for run in dict.fromkeys(table["run"]) if run != "PMET"]
    fig, axes = panels(7.5, 4.2, 1, len(names), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        own = of(table, model=name)
        plotting.effect_dots(own, ax, ABLATED, runs)
        ax.set_title(f"{name}, {int(own['edits'].iloc[0])} facts at once")
    legend(fig, axes[0, 0], 4)
    return fig


DRAWN: dict[str, tuple[str, Callable[[Path], Figure]]] = {
    "fig_real_trace": ("trace", trace),
    "fig_real_edits": ("edits", edits),
    "fig_real_ablations": ("ablations", ablations),
}
FIGURES = {n: draw for n, (table, draw) in DRAWN.items() if (RESULTS / f"{table}.csv").exists()}
"""Those whose tables are there: the stages of the study run one after the other."""


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        make(draw, name, RESULTS, OUT)
    sys.stdout.write(f"{', '.join(FIGURES)}: {OUT}\n")


if __name__ == "__main__":
    main()
