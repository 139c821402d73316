"""Tables of methods, loads and ablations to matplotlib axes; colours as in `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.evaluation.metrics import where
from pmet_lens.plotting.plots import band, colour_of, errors, number_map

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
"""One marker per method, so that lines differ without colour too."""
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
    rows = where(table, metric=metric)
    for run in dict.fromkeys(rows["run"]):
        style = ":" if run == "unedited" else "-"
        _run_line(where(rows, run=run), ax, run, colour_of(run), MARKERS.get(run, ""), style)
    ax.set_xscale("log")
    edits = sorted(rows["edits"].unique())
    ticks = [n for n in edits if n in {1, 10, 100} and 2 * n < max(edits)] + [max(edits)]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.set(xlabel="edits at once", ylabel=metric)
    return ax


def step_lines(table: pd.DataFrame, ax: Axes, metric: str) -> Axes:
    """`experiment.sequential`: one metric over the edits so far, one line per run, with 95 % bands;
    a protected run is dashed, and a cross marks where the model broke."""
    rows = where(table, metric=metric)
    for run in dict.fromkeys(rows["run"]):
        line = where(rows, run=run).sort_values(by="edits")
        method, _, protected = run.partition(",")
        style = "--" if protected else "-"
        _run_line(line, ax, run, colour_of(method), MARKERS.get(method, "o"), style)
        broken = line.loc[line["collapsed"].astype(bool)].head(1)
        ax.plot(broken["edits"], broken["mean"], "x", color="black", ms=8, mew=1.5)
    ax.set(xlabel="edits so far", ylabel=metric)
    return ax


def _run_line(rows: pd.DataFrame, ax: Axes, run: str, colour: str, marker: str, style: str) -> None:
    shape = {"ms": 3, "lw": 1, "alpha": 0.12}
    band(rows, ax, "mean", "edits", color=colour, marker=marker, ls=style, label=run, **shape)


def effect_dots(
    table: pd.DataFrame,
    ax: Axes,
    metrics: Sequence[str] = ("ES", "PS", "NS", "collateral"),
    runs: Sequence[str] | None = None,
) -> Axes:
    """`compare`: what each variation changes against the baseline, in points, with paired 95 %
    intervals. One row per variation, one dot per metric; left of 0 is worse. `runs`: the rows and
    their order, for panels that share them (default: those of the table)."""
    changes = table.dropna(subset=["difference"])
    runs = list(dict.fromkeys(changes["run"])) if runs is None else list(runs)
    for i, metric in enumerate(metrics):
        rows = where(changes, metric=metric).set_index("run").reindex(runs)
        y = np.arange(len(runs)) + (i - (len(metrics) - 1) / 2) * 0.18
        value, colour = rows["difference"], METRIC_COLOURS.get(metric, "#000000")
        error = errors(rows, "difference", "difference_low", "difference_high")
        ax.errorbar(value, y, xerr=error, fmt="o", ms=2.5, lw=0.8, label=metric, color=colour)
    ax.axvline(0, color="#444444", lw=0.8)
    for line in range(1, len(runs)):
        ax.axhline(line - 0.5, color="#eeeeee", lw=0.6, zorder=0)
    ax.set_yticks(range(len(runs)), runs)
    ax.set(ylim=(len(runs) - 0.5, -0.5), xlabel="points against PMET (left is worse)")
    return ax


def sweep_lines(
    table: pd.DataFrame,
    ax: Axes,
    x: str,
    metrics: Sequence[str] = ("S", "ES", "PS", "NS", "collateral"),
) -> Axes:
    """Metrics over one setting (column `x`), one line per metric, with 95 % bands."""
    for metric in metrics:
        rows, colour = where(table, metric=metric), METRIC_COLOURS.get(metric, "#000000")
        band(rows, ax, "mean", x, alpha=0.15, ms=2.5, lw=1, color=colour, label=metric)
    ax.set(ylim=(0, 105), ylabel="per cent (higher is better)")
    return ax


def layer_map(table: pd.DataFrame, ax: Axes, metric: str = "S") -> Axes:
    """One metric over the last critical layer (columns) and how many there are (rows): columns
    layers ("1 2 3"), last, metric, mean. Empty where layers do not exist or cannot be solved."""
    rows = where(table, metric=metric)
    count = rows["layers"].astype(str).str.split().str.len()
    rows = rows.assign(count=count, last=rows["last"].astype(int))
    wide = rows.pivot(index="count", columns="last", values="mean")
    number_map(wide, ax, 50.0, 100.0, lambda value: f"{value:.0f}")
    ax.set(xlabel="last critical layer", ylabel="critical layers")
    return ax


def gap_bars(table: pd.DataFrame, ax: Axes, kind: str = "rewrite") -> Axes:
    """`pl.evaluation_gap`: what is left of a score at each setting, from how benchmarks score (top)
    to what a user sees, with 95 % intervals. A column run: one bar per run at each setting."""
    rows = where(table, kind=kind)
    runs = list(dict.fromkeys(rows["run"])) if "run" in rows else [""]
    settings = list(dict.fromkeys(rows["setting"]))
    height = 0.8 / len(runs)
    for i, run in enumerate(runs):
        own = (where(rows, run=run) if run else rows).set_index("setting").loc[settings]
        y = np.arange(len(settings)) + (i - (len(runs) - 1) / 2) * height
        style = {"elinewidth": 0.8, "capsize": 1.5}
        colour = colour_of(run) if run else METRIC_COLOURS["S"]
        ax.barh(y, own["mean"], height, xerr=errors(own, "mean"), error_kw=style, color=colour,
                label=run or None)  # fmt: skip
    ax.set_yticks(range(len(settings)), settings)
    ax.set(xlim=(0, 105), ylim=(len(settings) - 0.5, -0.5), xlabel=f"{kind} prompts right, %")
    return ax


def retention_lines(table: pd.DataFrame, ax: Axes, metric: str = "ES") -> Axes:
    """`Checkpoints.table`: what is left of the facts edited first (dashed), of all so far (full)
    and of those edited last (dotted), over the edits, with 95 % bands; a cross marks where the
    model collapsed. A column run: one colour and marker per method. A metric of the model
    ("perplexity", "recall", "weight_norm") is one line."""
    rows = where(table, metric=metric)
    for run in dict.fromkeys(rows["run"]) if "run" in rows else ("",):
        own = where(rows, run=run) if run else rows
        colour = colour_of(run) if run else METRIC_COLOURS["S"]
        for name, style in (("first", "--"), ("all", "-"), ("last", ":"), ("model", "-")):
            line = where(own, facts=name).sort_values(by="edits")
            if line.empty:
                continue
            label = ", ".join(filter(None, (run, "" if name == "model" else name)))
            _run_line(line, ax, label, colour, MARKERS.get(run, "o"), style)
            broken = line.loc[line["collapsed"].astype(bool)].head(1)
            ax.plot(broken["edits"], broken["mean"], "x", color="black", ms=8, mew=1.5)
    ax.set(xlabel="edits so far", ylabel=metric)
    return ax
