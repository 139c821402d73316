"""Tables to matplotlib axes. One colour per method everywhere, colour-blind safe (Okabe-Ito)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.analysis import PLACES

STYLE: Mapping[str, object] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
"""For `matplotlib.rc_context`: readable at column width, fonts embedded."""

COLOURS: Mapping[str, str] = {
    "unedited": "#7f7f7f",
    "PMET": "#0072B2",
    "PMET, linear spread": "#56B4E9",
    "linear spread": "#56B4E9",
    "w/o δ^a": "#CC79A7",
    "+ W_O": "#D55E00",
    "TL hidden state, sqrt spread": "#009E73",
    "MEMIT": "#E69F00",
}
PLACE_COLOURS = dict(
    zip(PLACES, ("#56B4E9", "#009E73", "#0072B2", "#999999", "#E69F00"), strict=True)
)


def colour_of(name: str) -> str:
    """The colour of a method; black for one without a colour of its own."""
    return COLOURS.get(name, "#000000")


def metric_bars(
    table: pd.DataFrame, ax: Axes, metrics: Sequence[str] = ("ES", "PS", "NS", "S", "collateral")
) -> Axes:
    """Grouped bars of `experiment.side_by_side`: one group per metric, one bar per run, with 95 %
    intervals; per cent, higher is better."""
    runs = list(dict.fromkeys(table["run"]))
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        own = table[table["run"] == run].set_index("metric").reindex(metrics)
        x = np.arange(len(metrics)) + (i - (len(runs) - 1) / 2) * width
        low = (own["mean"] - own["ci_low"]).clip(lower=0)
        high = (own["ci_high"] - own["mean"]).clip(lower=0)
        error = {"elinewidth": 0.8, "capsize": 1.5}
        ax.bar(
            x, own["mean"], width * 0.92, color=colour_of(run), label=run,
            yerr=np.vstack([low, high]), error_kw=error,
        )  # fmt: skip
    ax.set_xticks(np.arange(len(metrics)), metrics)
    ax.set_ylim(0, 105)
    ax.set_ylabel("per cent (higher is better)")
    return ax


def trace_lines(table: pd.DataFrame, ax: Axes, layer: int | None = None) -> Axes:
    """`analysis.causal_trace`: recovered share over layers, one line per place, 95 % bands;
    `layer` is marked (the last critical one)."""
    for place in PLACES:
        own = table.loc[table["place"] == place].sort_values(by="layer")
        if own.empty:
            continue
        colour = PLACE_COLOURS[place]
        ax.plot(own["layer"], own["recovered"], color=colour, marker="o", ms=2.5, label=place)
        ax.fill_between(own["layer"], own["ci_low"], own["ci_high"], color=colour, alpha=0.2, lw=0)
    if layer is not None:
        ax.axvline(layer, color="#444444", lw=0.8, ls=":")
        ax.annotate("last critical layer", (layer, 1.03), fontsize=6, ha="center", va="bottom")
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.set_xlabel("layer")
    ax.set_ylabel("share of the answer recovered")
    ax.set_ylim(min(-0.05, float(table["ci_low"].min())), 1.1)
    return ax


def losses(history: pd.DataFrame, ax: Axes, label: str = "PMET") -> Axes:
    """`Targets.history`: the loss of each fact over the optimisation, and their mean."""
    for _, own in history.groupby("fact"):
        ax.plot(own["step"], own["loss"], color=colour_of(label), alpha=0.25, lw=0.6)
    mean = history.groupby("step", as_index=False).agg({"loss": "mean"})
    ax.plot(mean["step"], mean["loss"], color=colour_of(label), lw=1.8, label=f"{label}, mean")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss (nats)")
    return ax


def before_after(before: pd.DataFrame, after: pd.DataFrame, ax: Axes) -> Axes:
    """Two `evaluate` frames of the same facts: per kind of prompt the margin (probability of the
    wanted answer minus its rival's) before and after, one dot and line per prompt."""
    kinds = list(dict.fromkeys(before["kind"]))
    for x, kind in enumerate(kinds):
        old = before.loc[before["kind"] == kind, "margin"].to_numpy()
        new = after.loc[after["kind"] == kind, "margin"].to_numpy()
        for a, b in zip(old, new, strict=True):
            ax.plot([x - 0.15, x + 0.15], [a, b], color="#bbbbbb", lw=0.8, zorder=1)
        ends = ((x - 0.15, old, "unedited", "before"), (x + 0.15, new, "PMET", "after"))
        for at, values, name, label in ends:
            own = label if x == 0 else None
            ax.scatter([at] * len(values), values, s=18, color=colour_of(name), label=own, zorder=2)
    ax.axhline(0, color="#444444", lw=0.8)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set_ylim(-1.05, 1.05)
    ax.set_ylabel("P(wanted) − P(rival)")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax
