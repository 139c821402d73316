"""The study on real models as pictures, from its committed tables.

Where the models recall, component by component; every method over the number of facts that are
edited at once, each with its own settings; what each part of PMET is worth. `redraw.py` draws them
with all others; by itself: `python figures/real_figures.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import fig_causal_trace
import fig_scaling
import pandas as pd
import real_rows
from common import HERE, OUT, legend, make, of, panels, read
from matplotlib.figure import Figure

from pmet_lens import plotting

RESULTS = HERE / "results" / "real"
METRICS = ("S", "PS", "NS", "EA", "EF", "collateral")
ABLATED = ("ES", "PS", "NS", "EA")
TRADED = (("PS", "NS"), ("EA", "collateral"))
"""What is won, upwards, and what an edit should leave, to the right."""


def models(table: pd.DataFrame) -> list[str]:
    """The larger model last."""
    return sorted(table["model"].unique(), reverse=True)


def trace(tables: Path) -> Figure:
    """One row per component, one column per model."""
    table = read(tables, "trace")
    return fig_causal_trace.grid(table, {name: name for name in models(table)}, 2)


def edits(tables: Path) -> Figure:
    """One row per model, one panel per metric, one line per method; dotted: unedited."""
    table = of(read(tables, "edits"), benchmark="facts")
    of_methods = table["run"] != real_rows.ALONE
    table = table[of_methods & (table["run"] == table["run"].map(real_rows.method_of))]
    edited, before = table[table["edits"] > 0], table[table["edits"] == 0]
    names = models(table)
    metrics = [metric for metric in METRICS if metric in set(edited["metric"])]
    fig, axes = fig_scaling.grid(edited, {name: name for name in names}, metrics)
    for row, name in zip(axes, names, strict=True):
        for ax, metric in zip(row, metrics, strict=True):
            for value in of(before, model=name, metric=metric)["mean"]:
                ax.axhline(value, color="#444444", ls=":", lw=1, label="unedited")
    sizes = sorted(edited["edits"].unique())
    axes[-1, -1].set_xticks(sizes, [str(n) for n in sizes])  # all panels share them
    for ax in axes[-1]:
        ax.tick_params(axis="x", labelrotation=45)
    fig.suptitle(
        "One edit: each fact alone on the clean model. EF: free answers. Every method with "
        "settings tuned on other facts, 95 % bootstrap intervals",
        fontsize=7,
    )
    legend(fig, axes[0, 0], 8)
    return fig


def ablations(tables: Path) -> Figure:
    """One panel per model: differences against PMET in points."""
    table = read(tables, "ablations")
    table = table[table["run"] == table["run"].map(real_rows.method_of)]
    names = models(table)
    runs = [run for run in dict.fromkeys(table["run"]) if run != "PMET"]
    fig, axes = panels(7.5, 4.2, 1, len(names), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        own = of(table, model=name)
        plotting.effect_dots(own, ax, ABLATED, runs)
        ax.set_title(f"{name}, {int(own['edits'].iloc[0])} facts at once")
    legend(fig, axes[0, 0], 4)
    return fig


def said_by_steps(table: pd.DataFrame) -> pd.DataFrame:
    """With the fast steps of every run in its name, and published ones in none."""
    published = table["run"].str.endswith(real_rows.PUBLISHED)
    fast = ~published if published.any() else table["run"].str.endswith(real_rows.FAST)
    names = table["run"].map(real_rows.method_of)
    return table.assign(run=names.where(~fast, names + real_rows.FAST))


def strength(tables: Path) -> Figure:
    """One row per model: what is won against what is spared, one line per method and kind of steps
    from the least to the most that holds it back."""
    table = read(tables, "strength")
    names = models(table)
    fig, axes = panels(7.5, 3.0 * len(names), len(names), len(TRADED))
    for row, name in zip(axes, names, strict=True):
        own = said_by_steps(of(table, model=name))
        for ax, (won, spared) in zip(row, TRADED, strict=True):
            plotting.trade_lines(own, ax, spared, won, "factor")
            ax.set_xlim(int(of(table, metric=spared)["ci_low"].min()) // 10 * 10, 102)
        row[0].set_title(f"{name}, {int(own['edits'].iloc[0])} facts at once", fontsize=8)
    legend(fig, max(axes.flat, key=lambda ax: len(ax.get_legend_handles_labels()[1])), 5)
    fig.suptitle(
        "Each line: a method with 0.1, 0.3, 1 (large), 3, 10 and 30 times the strength that was "
        "found\nbest by S on other facts. Up: reaches more. Right: harms less. 95 % intervals",
        fontsize=7,
    )
    return fig


DRAWN: dict[str, tuple[str, Callable[[Path], Figure]]] = {
    "fig_real_trace": ("trace", trace),
    "fig_real_edits": ("edits", edits),
    "fig_real_ablations": ("ablations", ablations),
    "fig_real_strength": ("strength", strength),
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
