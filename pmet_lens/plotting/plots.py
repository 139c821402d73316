"""Tables to matplotlib axes. One colour per method everywhere, colour-blind safe (Okabe-Ito)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.evaluation.metrics import where
from pmet_lens.interp.attention import PAIRS
from pmet_lens.interp.causal_trace import PLACES
from pmet_lens.interp.patching import KINDS

STYLE: Mapping[str, object] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,  # dashes and full lines differ at a glance
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
"""For `matplotlib.rc_context`: readable at column width; fonts embedded in PDF (TrueType), drawn as
outlines in SVG, so that a figure looks the same everywhere."""

COLOURS: Mapping[str, str] = {
    "unedited": "#7f7f7f",
    "PMET": "#0072B2",
    "PMET, linear spread": "#56B4E9",
    "linear spread": "#56B4E9",
    "w/o δ^a": "#CC79A7",
    "+ W_O": "#D55E00",
    "TL hidden state, sqrt spread": "#009E73",
    "MEMIT": "#E69F00",
    "ROME": "#CC3311",
    "EMMET": "#AA4499",
    "AlphaEdit": "#117733",
    "FT-W": "#999933",
    "FT+L": "#88CCEE",
    "MEND": "#000000",
}
PLACE_COLOURS = dict(
    zip(PLACES, ("#56B4E9", "#009E73", "#0072B2", "#999999", "#E69F00"), strict=True)
)

# Of another palette (Tol's muted): a component is never taken for a method.
COMPONENT_COLOURS: Mapping[str, str] = {
    "MHSA": "#882255",
    "attn_out": "#882255",
    "attn_added": "#882255",
    "FFN": "#44AA99",
    "mlp_out": "#44AA99",
    "mlp_added": "#44AA99",
    "resid_pre": "#999933",
    "resid_mid": "#DDCC77",
    "resid_post": "#332288",
}
COMPONENT_NAMES: Mapping[str, str] = {
    "attn_out": "MHSA",
    "attn_added": "MHSA",
    "mlp_out": "FFN",
    "mlp_added": "FFN",
}


def colour_of(name: str) -> str:
    """The colour of a method; black for one that has none."""
    return COLOURS.get(name, "#000000")


def components(table: pd.DataFrame) -> dict[str, str]:
    """The streams of a table (column stream) that are the output of MHSA or FFN, and which of the
    two: one of each, unless the table holds an output before and behind a post-norm."""
    there = set(table["stream"])
    return {stream: name for stream, name in COMPONENT_NAMES.items() if stream in there}


# What the plots are made of.


def band(
    table: pd.DataFrame, ax: Axes, y: str, x: str = "layer", *, alpha: float = 0.18, **line: Any
) -> None:
    """A line with its 95 % interval (columns ci_low, ci_high) as a band; `line` is for `Axes.plot`.
    An empty table draws nothing."""
    if table.empty:
        return
    table = table.sort_values(by=x)
    ax.plot(table[x], table[y], **{"lw": 1.2, "marker": "o", "ms": 2, **line})
    colour = line["color"]
    ax.fill_between(table[x], table["ci_low"], table["ci_high"], color=colour, alpha=alpha, lw=0)


def errors(
    table: pd.DataFrame, value: str, low: str = "ci_low", high: str = "ci_high"
) -> np.ndarray:
    """`[2, row]`: how far the interval reaches below and above the value."""
    return np.vstack([table[value] - table[low], table[high] - table[value]]).clip(0)


def bars(
    table: pd.DataFrame, ax: Axes, x: np.ndarray, value: str, width: float, **bar: Any
) -> None:
    """Bars with their 95 % intervals; `bar` is for `Axes.bar`."""
    style = {"elinewidth": 0.8, "capsize": 1.5}
    ax.bar(x, table[value], width, yerr=errors(table, value), error_kw=style, **bar)


def number_map(
    wide: pd.DataFrame,
    ax: Axes,
    low: float,
    high: float,
    write: Callable[[float], str] | None,
    *,
    bright: float = 0.5,
    step: int = 1,
    gid: str | None = None,
) -> None:
    """A table as a coloured map with its index and columns (every `step`) as ticks, and in each
    cell what `write` makes of its value, black from the share `bright` of the colours on."""
    ax.imshow(wide, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    ax.set_xticks(range(0, wide.shape[1], step), [str(c) for c in wide.columns[::step]])
    ax.set_yticks(range(len(wide)), [str(name) for name in wide.index])
    ax.tick_params(length=0)
    if write is None:
        return
    for (y, x), value in np.ndenumerate(wide.to_numpy()):
        if not np.isnan(value):
            colour = "black" if value > low + bright * (high - low) else "white"
            cell = ax.text(x, y, write(value), ha="center", va="center", fontsize=6, color=colour)
            cell.set_gid(gid)


def _layers(ax: Axes, table: pd.DataFrame) -> Axes:
    layers = sorted(table["layer"].dropna().unique())
    ax.set_xticks(layers[:: max(1, len(layers) // 8)])
    ax.set_xlabel("layer")
    return ax


# The tables of the package, one function each.


def metric_bars(
    table: pd.DataFrame, ax: Axes, metrics: Sequence[str] = ("ES", "PS", "NS", "S", "collateral")
) -> Axes:
    """Grouped bars of `experiment.side_by_side`: one group per metric, one bar per run, with 95 %
    intervals; per cent, higher is better."""
    runs = list(dict.fromkeys(table["run"]))
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        rows = where(table, run=run).set_index("metric").reindex(metrics)
        x = np.arange(len(metrics)) + (i - (len(runs) - 1) / 2) * width
        bars(rows, ax, x, "mean", 0.92 * width, color=colour_of(run), label=run)
    ax.set_xticks(np.arange(len(metrics)), metrics)
    ax.set(ylim=(0, 105), ylabel="per cent (higher is better)")
    return ax


def trace_lines(table: pd.DataFrame, ax: Axes, layer: int | None = None) -> Axes:
    """`causal_trace`: recovered share over layers, one line per place, 95 % bands; `layer` is
    marked (the last critical one)."""
    for place, colour in PLACE_COLOURS.items():
        rows = where(table, place=place)
        band(rows, ax, "recovered", color=colour, alpha=0.2, lw=None, ms=2.5, label=place)
    if layer is not None:
        ax.axvline(layer, color="#444444", lw=0.8, ls=":")
        ax.annotate("last critical layer", (layer, 1.03), fontsize=6, ha="center", va="bottom")
    layers = sorted(table["layer"].unique())
    ax.set_xticks(layers[:: 1 + len(layers) // 16])
    ax.set(xlabel="layer", ylabel="share of the answer recovered")
    ax.set_ylim(min(-0.05, float(table["ci_low"].min())), 1.1)
    return ax


def losses(history: pd.DataFrame, ax: Axes, label: str = "PMET") -> Axes:
    """`Targets.history`: the loss of each fact over the optimisation, and their mean."""
    for _, rows in history.groupby("fact"):
        ax.plot(rows["step"], rows["loss"], color=colour_of(label), alpha=0.25, lw=0.6)
    mean = history.groupby("step", as_index=False).agg({"loss": "mean"})
    ax.plot(mean["step"], mean["loss"], color=colour_of(label), lw=1.8, label=f"{label}, mean")
    ax.set(yscale="log", xlabel="step", ylabel="loss (nats)")
    return ax


def before_after(before: pd.DataFrame, after: pd.DataFrame, ax: Axes) -> Axes:
    """Two `evaluate` frames of the same facts: per kind of prompt the margin (probability of the
    wanted answer minus its rival's) before and after, one dot and line per prompt."""
    kinds = list(dict.fromkeys(before["kind"]))
    for x, kind in enumerate(kinds):
        old, new = (where(table, kind=kind)["margin"].to_numpy() for table in (before, after))
        for pair in zip(old, new, strict=True):
            ax.plot([x - 0.15, x + 0.15], pair, color="#bbbbbb", lw=0.8, zorder=1)
        ends = ((x - 0.15, old, "unedited", "before"), (x + 0.15, new, "PMET", "after"))
        for at, values, name, legend in ends:
            label = legend if x == 0 else None
            ax.scatter([at] * len(values), values, 18, color=colour_of(name), label=label, zorder=2)
    ax.axhline(0, color="#444444", lw=0.8)
    ax.set_xticks(range(len(kinds)), kinds)
    ax.set(ylim=(-1.05, 1.05), ylabel="P(wanted) − P(rival)")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def similarity_lines(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """`component_similarity` at the last token: one line per component over the layers, 95 %
    bands; dashed: at the last subject token."""
    positions = (("last", "-", ""), ("last_subject", "--", ", last subject token"))
    for component in ("MHSA", "FFN"):
        for position, style, more in positions:
            rows = where(table, component=component, position=position, measure=measure)
            colour, label = COMPONENT_COLOURS[component], component + more
            band(rows, ax, "mean", color=colour, ls=style, label=label)
    ax.axhline(0, color="#bbbbbb", lw=0.6, zorder=0)
    ax.set_ylabel(f"{measure}, input and output")
    return _layers(ax, table)


def share_lines(table: pd.DataFrame, ax: Axes) -> Axes:
    """`variance_split`: share explained by the subject (full lines) and by the relation in other
    phrasings (dashed), per component over the layers, 95 % bands."""
    for stream, component in components(table).items():
        for factor, style in (("subject", "-"), ("relation, other phrasing", "--")):
            rows = where(table, stream=stream, factor=factor)
            colour, label = COMPONENT_COLOURS[stream], f"{component}: {factor.split(',')[0]}"
            band(rows, ax, "share", color=colour, ls=style, label=label)
    ax.axhline(0, color="#bbbbbb", lw=0.6, zorder=0)
    ax.set_ylabel("share of variance")
    return _layers(ax, table)


def transfer_bars(table: pd.DataFrame, ax: Axes) -> Axes:
    """`patch`, all layers at once: how often the answer follows the donor, per component and kind
    of pair, with 95 % intervals."""
    whole = table.loc[table["layer"].isna()]
    streams = components(whole)
    for i, (stream, component) in enumerate(streams.items()):
        rows = where(whole, stream=stream, outcome="donor").set_index("kind").reindex(list(KINDS))
        x = np.arange(len(KINDS)) + (i - (len(streams) - 1) / 2) * 0.76 / len(streams)
        colour, label = COMPONENT_COLOURS[stream], f"{component} swapped"
        bars(rows, ax, x, "share", 0.7 / len(streams), color=colour, label=label)
    ax.set_xticks(range(len(KINDS)), [k.replace(", ", ",\n") for k in KINDS])
    ax.set(ylim=(0, 1.2), yticks=np.linspace(0, 1, 6), ylabel="answer follows the donor")
    return ax


def pattern_lines(table: pd.DataFrame, ax: Axes) -> Axes:
    """`pattern_similarity`: overlap of two facts' attention per kind of pair, 95 % bands."""
    for pair, style in zip(PAIRS, (":", "-", "--"), strict=True):
        rows = where(table, pair=pair)
        band(rows, ax, "mean", color=COMPONENT_COLOURS["MHSA"], ls=style, label=pair)
    ax.set(ylim=(0, 1.05), ylabel="overlap of attention")
    return _layers(ax, table)


def lens_map(table: pd.DataFrame, ax: Axes, streams: Sequence[str]) -> Axes:
    """Mean probability of the answer through the lens (columns stream, layer, mean), as a map of
    stream × layer with the numbers written in."""
    wide = table.pivot(index="stream", columns="layer", values="mean").reindex(list(streams))
    number_map(wide, ax, 0.0, 1.0, lambda p: f"{p:.2f}".removeprefix("0") if p < 0.995 else "1")
    ax.set_xlabel("layer")
    return ax


def delta_lines(table: pd.DataFrame, ax: Axes, quantity: str, colour: str, label: str) -> Axes:
    """One quantity of `Targets.history` over the steps (columns quantity, step, mean, …)."""
    band(where(table, quantity=quantity), ax, "mean", "step", color=colour, ls="-", label=label)
    ax.set_xlabel("step")
    return ax


def drift_lines(table: pd.DataFrame, ax: Axes, position: str = "last") -> Axes:
    """`drift`: relative change of MHSA and FFN output per layer, one line per kind of prompt."""
    styles = {"rewrite": "-", "paraphrase": "--", "neighbour": ":"}
    for stream, component in components(table).items():
        for kind, style in styles.items():
            rows = where(table, stream=stream, position=position, kind=kind)
            colour, label = COMPONENT_COLOURS[stream], f"{component}, {kind}"
            band(rows, ax, "mean", color=colour, ls=style, label=label)
    ax.set_ylabel("relative change")
    return _layers(ax, table)
