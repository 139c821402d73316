"""Tables to matplotlib axes. One colour per method everywhere, colour-blind safe (Okabe-Ito)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pmet_lens.interp.attention import PAIRS
from pmet_lens.interp.causal_trace import PLACES
from pmet_lens.interp.patching import KINDS

STYLE: Mapping[str, object] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,  # so that dashes can be told from full lines
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
    "FFN": "#44AA99",
    "mlp_out": "#44AA99",
    "resid_pre": "#999933",
    "resid_mid": "#DDCC77",
    "resid_post": "#332288",
}
COMPONENT_NAMES: Mapping[str, str] = {"attn_out": "MHSA", "mlp_out": "FFN"}


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
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def similarity_lines(table: pd.DataFrame, ax: Axes, measure: str) -> Axes:
    """`component_similarity` at the last token: one line per component over the layers, 95 %
    bands; dashed: at the last subject token."""
    for component in ("MHSA", "FFN"):
        for position, style in (("last", "-"), ("last_subject", "--")):
            own = _where(table, component=component, position=position, measure=measure)
            label = component + (", last subject token" if position == "last_subject" else "")
            _band(own, ax, "mean", COMPONENT_COLOURS[component], style, label)
    ax.axhline(0, color="#bbbbbb", lw=0.6, zorder=0)
    ax.set_ylabel(f"{measure}, input and output")
    return _layers(ax, table)


def share_lines(table: pd.DataFrame, ax: Axes) -> Axes:
    """`variance_split`: share explained by the subject (full lines) and by the relation in other
    phrasings (dashed), per component over the layers, 95 % bands."""
    for stream, component in COMPONENT_NAMES.items():
        for factor, style in (("subject", "-"), ("relation, other phrasing", "--")):
            own = _where(table, stream=stream, factor=factor)
            label = f"{component}: {factor.split(',')[0]}"
            _band(own, ax, "share", COMPONENT_COLOURS[stream], style, label)
    ax.axhline(0, color="#bbbbbb", lw=0.6, zorder=0)
    ax.set_ylabel("share of variance")
    return _layers(ax, table)


def transfer_bars(table: pd.DataFrame, ax: Axes) -> Axes:
    """`transfer`, all layers swapped at once: how often the answer follows the donor, per component
    and kind of pair, with 95 % intervals."""
    whole = table.loc[table["layer"].isna()]
    for i, (stream, component) in enumerate(COMPONENT_NAMES.items()):
        own = _where(whole, stream=stream, outcome="donor").set_index("kind").reindex(list(KINDS))
        x = np.arange(len(KINDS)) + (i - 0.5) * 0.38
        error = np.vstack([own["share"] - own["ci_low"], own["ci_high"] - own["share"]])
        ax.bar(
            x, own["share"], 0.35, color=COMPONENT_COLOURS[stream], label=f"{component} swapped",
            yerr=error.clip(0), error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
    ax.set_xticks(range(len(KINDS)), [k.replace(", ", ",\n") for k in KINDS])
    ax.set_ylim(0, 1.2)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set_ylabel("answer follows the donor")
    return ax


def pattern_lines(table: pd.DataFrame, ax: Axes) -> Axes:
    """`pattern_similarity`: overlap of two facts' attention per kind of pair, 95 % bands."""
    for pair, style in zip(PAIRS, (":", "-", "--"), strict=True):
        _band(_where(table, pair=pair), ax, "mean", COMPONENT_COLOURS["MHSA"], style, pair)
    ax.set_ylim(0, 1.05)
    ax.set_ylabel("overlap of attention")
    return _layers(ax, table)


def lens_map(table: pd.DataFrame, ax: Axes, streams: Sequence[str]) -> Axes:
    """Mean probability of the answer through the lens (columns stream, layer, mean), as a map of
    stream × layer with the numbers written in."""
    wide = table.pivot(index="stream", columns="layer", values="mean").reindex(list(streams))
    ax.imshow(wide, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        colour = "black" if value > 0.5 else "white"
        text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
        ax.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    ax.set_xticks(range(len(wide.columns)), [str(c) for c in wide.columns])
    ax.set_yticks(range(len(wide)), list(wide.index))
    ax.tick_params(length=0)
    ax.set_xlabel("layer")
    return ax


def delta_lines(table: pd.DataFrame, ax: Axes, quantity: str, colour: str, label: str) -> Axes:
    """One quantity of `Targets.history` over the steps (columns quantity, step, mean, …)."""
    _band(_where(table, quantity=quantity), ax, "mean", colour, "-", label, x="step")
    ax.set_xlabel("step")
    return ax


def drift_lines(table: pd.DataFrame, ax: Axes, position: str = "last") -> Axes:
    """`drift`: relative change of MHSA and FFN output per layer, one line per kind of prompt."""
    styles = {"rewrite": "-", "paraphrase": "--", "neighbour": ":"}
    for stream, component in COMPONENT_NAMES.items():
        for kind, style in styles.items():
            own = _where(table, stream=stream, position=position, kind=kind)
            label = f"{component}, {kind}"
            _band(own, ax, "mean", COMPONENT_COLOURS[stream], style, label)
    ax.set_ylabel("relative change")
    return _layers(ax, table)


def _where(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    chosen = np.ones(len(table), dtype=bool)
    for column, value in wanted.items():
        chosen &= (table[column] == value).to_numpy()
    return table.loc[chosen]


def _band(
    own: pd.DataFrame, ax: Axes, y: str, colour: str, style: str, label: str, x: str = "layer"
) -> None:
    if own.empty:
        return
    own = own.sort_values(by=x)
    ax.plot(own[x], own[y], color=colour, ls=style, lw=1.2, marker="o", ms=2, label=label)
    ax.fill_between(own[x], own["ci_low"], own["ci_high"], color=colour, alpha=0.18, lw=0)


def _layers(ax: Axes, table: pd.DataFrame) -> Axes:
    layers = sorted(table["layer"].dropna().unique())
    ax.set_xticks(layers[:: max(1, len(layers) // 8)])
    ax.set_xlabel("layer")
    return ax
