"""Tables of methods, loads and ablations to matplotlib axes; colours as in `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.plotting.plots import colour_of

MARKERS: Mapping[str, str] = {
    "PMET": "o",
    "MEMIT": "s",
    "ROME": "v",
    "EMMET": "^",
    "AlphaEdit": "D",
    "FT-W": "P",
    "FT+L": "X",
    "MEND": "*",
}
"""One marker per method, so that lines can be told apart without colour."""
METRIC_COLOURS: Mapping[str, str] = {
    "S": "#332288",
    "ES": "#882255",
    "PS": "#44AA99",
    "NS": "#DDCC77",
    "collateral": "#999999",
}


def load_lines(table: pd.DataFrame, ax: Axes, metric: str) -> Axes:
    """One metric over the number of edits (logarithmic), one line per method (column run), with
    95 % bands. Columns edits, run, metric, mean, ci_low, ci_high."""
    own = table.loc[table["metric"] == metric]
    for run in dict.fromkeys(own["run"]):
        line = own.loc[own["run"] == run].sort_values(by="edits")
        colour, style = colour_of(run), ":" if run == "unedited" else "-"
        marker = MARKERS.get(run, "")
        ax.plot(
            line["edits"], line["mean"], style, color=colour, marker=marker, ms=3, lw=1, label=run
        )
        ax.fill_between(
            line["edits"], line["ci_low"], line["ci_high"], color=colour, alpha=0.12, lw=0
        )
    ax.set_xscale("log")
    edits = sorted(own["edits"].unique())
    told = [n for n in edits if n in {1, 10, 100} and 2 * n < max(edits)] + [max(edits)]
    ax.set_xticks(told, [str(n) for n in told])
    ax.minorticks_off()
    ax.set_xlabel("edits at once")
    ax.set_ylabel(metric)
    return ax


def effect_dots(
    table: pd.DataFrame,
    ax: Axes,
    metrics: Sequence[str] = ("ES", "PS", "NS", "collateral"),
    runs: Sequence[str] | None = None,
) -> Axes:
    """`compare`: what each variation changes against the baseline, in points, with paired 95 %
    intervals. One row per variation, one dot per metric; left of 0 is worse. `runs`: the rows and
    their order, for panels that share them (default: those of the table)."""
    own = table.dropna(subset=["difference"])
    runs = list(dict.fromkeys(own["run"])) if runs is None else list(runs)
    for i, metric in enumerate(metrics):
        rows = own.loc[own["metric"] == metric].set_index("run").reindex(runs)
        y = np.arange(len(runs)) + (i - (len(metrics) - 1) / 2) * 0.18
        error = np.vstack(
            [
                rows["difference"] - rows["difference_low"],
                rows["difference_high"] - rows["difference"],
            ]
        ).clip(0)
        ax.errorbar(
            rows["difference"], y, xerr=error, fmt="o", ms=2.5, lw=0.8, label=metric,
            color=METRIC_COLOURS.get(metric, "#000000"),
        )  # fmt: skip
    ax.axvline(0, color="#444444", lw=0.8)
    for line in range(1, len(runs)):
        ax.axhline(line - 0.5, color="#eeeeee", lw=0.6, zorder=0)
    ax.set_yticks(range(len(runs)), runs)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xlabel("points against PMET (left is worse)")
    return ax


def sweep_lines(
    table: pd.DataFrame,
    ax: Axes,
    x: str,
    metrics: Sequence[str] = ("S", "ES", "PS", "NS", "collateral"),
) -> Axes:
    """Metrics over one setting (column `x`), one line per metric, with 95 % bands."""
    for metric in metrics:
        line = table.loc[table["metric"] == metric].sort_values(by=x)
        colour = METRIC_COLOURS.get(metric, "#000000")
        ax.plot(line[x], line["mean"], marker="o", ms=2.5, lw=1, color=colour, label=metric)
        ax.fill_between(line[x], line["ci_low"], line["ci_high"], color=colour, alpha=0.15, lw=0)
    ax.set_ylim(0, 105)
    ax.set_ylabel("per cent (higher is better)")
    return ax


def layer_map(table: pd.DataFrame, ax: Axes, metric: str = "S") -> Axes:
    """One metric over the last critical layer (columns) and how many there are (rows): columns
    layers ("1 2 3"), last, metric, mean. Empty where layers do not exist or cannot be solved."""
    own = table.loc[table["metric"] == metric]
    count = own["layers"].astype(str).str.split().str.len()
    wide = own.assign(count=count).pivot(index="count", columns="last", values="mean")
    ax.imshow(wide, cmap="cividis", vmin=50, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        if not np.isnan(value):
            colour = "black" if value > 75 else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    ax.set_xticks(range(len(wide.columns)), [str(int(c)) for c in wide.columns])
    ax.set_yticks(range(len(wide)), [str(n) for n in wide.index])
    ax.tick_params(length=0)
    ax.set_xlabel("last critical layer")
    ax.set_ylabel("critical layers")
    return ax


def step_lines(table: pd.DataFrame, ax: Axes, metric: str) -> Axes:
    """`experiment.sequential`: one metric over the edits so far, one line per run, with 95 % bands;
    a protected run is dashed, and a cross marks where the model broke."""
    own = table.loc[table["metric"] == metric]
    for run in dict.fromkeys(own["run"]):
        line = own.loc[own["run"] == run].sort_values(by="edits")
        method, _, rest = run.partition(",")
        colour = colour_of(method)
        marker = MARKERS.get(method, "o")
        style = "--" if rest else "-"
        ax.plot(
            line["edits"], line["mean"], style, color=colour, marker=marker, ms=3, lw=1, label=run
        )
        ax.fill_between(
            line["edits"], line["ci_low"], line["ci_high"], color=colour, alpha=0.12, lw=0
        )
        broken = line.loc[line["collapsed"].astype(bool)].head(1)
        ax.plot(broken["edits"], broken["mean"], "x", color="black", ms=8, mew=1.5)
    ax.set_xlabel("edits so far")
    ax.set_ylabel(metric)
    return ax
