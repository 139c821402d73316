"""What tuning tried, and what methods give for a given harm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.evaluation.metrics import where
from pmet_lens.plotting.method_plots import MARKERS
from pmet_lens.plotting.plots import colour_of, errors


def tuning_dots(table: pd.DataFrame, ax: Axes, most: int = 12) -> Axes:
    """`Tuned.table`: the settings of the last stage, best on top, with 95 % intervals. Full dots:
    the chosen one and those that cannot be told from it; hollow ones are worse. A cross marks what
    the setting gave in each stage before, on fewer facts. At most `most` settings."""
    final = where(table, stage=table["stage"].iloc[-1], failed="")
    final = final.sort_values(by="score", ascending=False, kind="stable").head(most)
    for y, (_, row) in enumerate(final.iterrows()):
        colour = "#0072B2" if row["chosen"] else "#444444"
        reach = [[row["score"] - row["ci_low"]], [row["ci_high"] - row["score"]]]
        face = "white" if row["told"] else colour
        ax.errorbar(
            row["score"], y, xerr=reach, fmt="o", ms=4, lw=0.8, color=colour, mfc=face, zorder=3
        )
        same = where(table, setting=row["setting"])
        before = same[same["stage"] != row["stage"]]["score"]
        ax.plot(before, [y] * len(before), "x", ms=3, color="#999999", zorder=2)
    ax.set_yticks(range(len(final)), list(final["setting"]))
    ax.set(ylim=(len(final) - 0.5, -0.5), xlabel=f"score on {int(final['facts'].max())} facts")
    return ax


def front(
    table: pd.DataFrame,
    ax: Axes,
    gain: str = "ES",
    kept: str = "NS",
    runs: Sequence[str] | None = None,
    names: bool = True,
) -> Axes:
    """`compare(…, front=True)`: what each method gains (upwards) against what it keeps (to the
    right), with 95 % intervals; up and right is better. Runs that no other beats are full, with
    their `names`, if these are wanted beside a legend; the others hollow. `runs`: which, and in
    which order (default: all)."""
    runs = list(dict.fromkeys(table["run"])) if runs is None else list(runs)
    for run in runs:
        own = where(table, run=run).set_index("metric")
        if not {gain, kept} <= {*own.index}:
            continue
        x, y = own.loc[[kept]], own.loc[[gain]]
        best = bool(own["front"].iloc[0]) if "front" in own else True
        colour = colour_of(run)
        ax.errorbar(
            x["mean"],
            y["mean"],
            xerr=errors(x, "mean"),
            yerr=errors(y, "mean"),
            fmt=MARKERS.get(run, "o"),
            ms=5,
            lw=0.6,
            alpha=0.85,
            color=colour,
            mfc=colour if best else "white",
            label=run,
        )
        if best and names:
            place = (float(x["mean"].iloc[0]), float(y["mean"].iloc[0]))
            ax.annotate(run, place, (4, 4), textcoords="offset points", fontsize=6)
    lows = [float(np.nanmin(where(table, metric=m)["ci_low"])) for m in (kept, gain)]
    ax.set(xlim=(min(95, lows[0]) - 3, 104), ylim=(min(95, lows[1]) - 3, 106))
    ax.set(xlabel=f"{kept}, %", ylabel=f"{gain}, %")
    return ax


def trade_lines(table: pd.DataFrame, ax: Axes, kept: str, gain: str, setting: str) -> Axes:
    """What each method gains (metric `gain`, upwards) against what it keeps (`kept`, to the right)
    as one number changes (column `setting`): one line per method (column run) in the order of that
    number, with 95 % intervals; its dot at 1 is large. Up and right is better. What stands behind a
    comma in the name of a run makes its line dashed. Other columns: metric, mean, ci_low,
    ci_high."""
    for run in dict.fromkeys(table["run"]):
        own = where(table, run=run).pivot(index=setting, columns="metric")
        x, y = (own.xs(metric, axis=1, level="metric") for metric in (kept, gain))
        method, _, more = run.partition(", ")
        colour, marker = colour_of(method), MARKERS.get(method, "o")
        ax.errorbar(
            x["mean"],
            y["mean"],
            xerr=errors(x, "mean"),
            yerr=errors(y, "mean"),
            fmt=f"{marker}--" if more else f"{marker}-",
            ms=3,
            lw=1,
            elinewidth=0.4,
            color=colour,
            label=run,
        )
        ax.plot(x["mean"].get(1.0), y["mean"].get(1.0), marker, ms=7, color=colour)
        least = own.index.min()
        ax.annotate(
            f"{least:g}",
            (x["mean"][least], y["mean"][least]),
            (3, 3),
            textcoords="offset points",
            fontsize=6,
            color=colour,
        )
    ax.set(xlim=(-3, 103), ylim=(-3, 103), xlabel=f"{kept}, %", ylabel=f"{gain}, %")
    return ax
