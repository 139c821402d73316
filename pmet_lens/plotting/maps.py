"""Tables of the explorer to matplotlib figures, drawn without touching anybody's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from pmet_lens.plotting.plots import COMPONENT_NAMES

MEASURES: Mapping[str, str] = {
    "probability": "probability of the answer",
    "rank": "rank of the answer",
    "recovered": "share of the answer recovered",
    "weight": "attention on the subject",
}
"""Columns that can be drawn as a map, and what they are called."""
LOSSES: Mapping[str, str] = {
    "loss": "#0072B2",
    "nll": "#D55E00",
    "kl": "#009E73",
    "decay": "#CC79A7",
}
WRITTEN = 16  # layers or rows up to which the numbers are written into a map
BEFORE, AFTER = "#7f7f7f", "#0072B2"


def restyle(figure: Figure, ink: str = "black") -> None:
    """Small type, no box around the axes, and every line and letter outside the data in `ink`."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text.get_gid() != "cell":
            text.set_color(ink)
    for ax in figure.axes:
        ax.tick_params(colors=ink, labelsize=8)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_fontsize(8)
        ax.title.set_fontsize(9)
        for side, spine in ax.spines.items():
            spine.set_color(ink)
            if side in ("top", "right"):
                spine.set_visible(False)
        ax.patch.set_alpha(0)


def token_map(table: pd.DataFrame, figure: Figure, measure: str) -> None:
    """Layers from left to right, rows from top to bottom, one panel per value of `panel`. Columns
    panel, row (text of the row), order (of the rows), layer, and `measure` (`MEASURES`)."""
    panels = list(dict.fromkeys(table["panel"]))
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    worst = float(table[measure].max()) if measure == "rank" else 1.0
    for ax, panel in zip(axes, panels, strict=True):
        own = table.loc[table["panel"] == panel]
        wide = own.pivot(index="order", columns="layer", values=measure)
        _cells(ax, wide.to_numpy(dtype=float), measure, worst)
        step = 1 if len(wide.columns) <= WRITTEN else 4
        ax.set_xticks(range(0, len(wide.columns), step), [str(n) for n in wide.columns[::step]])
        names = dict(zip(own["order"], own["row"], strict=True))
        ax.set_yticks(range(len(wide)), [names[n] for n in wide.index])
        ax.set_xlabel("layer")
        ax.set_title(panel)
        ax.tick_params(length=0)
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), label=MEASURES[measure], shrink=0.9)
    if measure == "rank":
        powers = range(int(np.log10(worst)) + 1)
        bar.set_ticks([-n for n in powers], labels=[f"{10**n:,}" for n in powers])


def _cells(ax: Axes, values: np.ndarray, measure: str, worst: float) -> None:
    """The map itself, with the numbers written in where there is room."""
    shade = -np.log10(values) if measure == "rank" else values
    low, high = (-np.log10(max(worst, 10.0)), 0.0) if measure == "rank" else (0.0, 1.0)
    ax.imshow(shade, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    if max(values.shape) > WRITTEN:
        return
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = f"{value:.0f}" if measure == "rank" else f"{value:.2f}".replace("0.", ".", 1)
            text = "" if text in (".00", "-.00") else text
            colour = "black" if shade[y, x] > low + 0.55 * (high - low) else "white"
            ax.text(x, y, text, ha="center", va="center", fontsize=6, color=colour, gid="cell")


def loss_curve(history: pd.DataFrame, figure: Figure, n_steps: int | None = None) -> None:
    """Losses over the optimisation steps: columns step and any of loss, nll, kl, decay (nats)."""
    ax = figure.subplots()
    for name, colour in LOSSES.items():
        if name in history:
            width = 2.0 if name == "loss" else 1.0
            ax.plot(history["step"], history[name], color=colour, lw=width, label=name)
    last = int(history["step"].max()) if len(history) else 1
    ax.set_xlim(0, max(1, last, (n_steps or 1) - 1))
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("optimisation step")
    ax.set_ylabel("nats")
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def answer_bars(table: pd.DataFrame, figure: Figure) -> None:
    """`Session.ask`: the likeliest tokens without and with the edits, side by side."""
    axes = figure.subplots(1, 2, sharex=True)
    names = {"before": "without edits", "after": "with the edits that are on"}
    for ax, (model, colour) in zip(axes, (("before", BEFORE), ("after", AFTER)), strict=True):
        own = table.loc[table["model"] == model]
        ax.barh(range(len(own)), own["probability"], color=colour)
        ax.set_yticks(range(len(own)), [repr(t.strip()) for t in own["token"]])
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.set_xlabel("probability")
        ax.set_title(names[model])


def prompt_shifts(table: pd.DataFrame, figure: Figure) -> None:
    """`Session.answers`: the new answer's probability on every prompt, before and after."""
    ax = figure.subplots()
    y = np.arange(len(table))
    ax.hlines(y, table["p_before"], table["p_after"], color=BEFORE, lw=1.5)
    ax.plot(table["p_before"], y, "o", color=BEFORE, ms=5, label="before")
    ax.plot(table["p_after"], y, "o", color=AFTER, ms=6, label="after")
    ax.set_yticks(
        y, [f"{k}: {_short(p)}" for k, p in zip(table["kind"], table["prompt"], strict=True)]
    )
    ax.invert_yaxis()
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("probability of the new answer")
    figure.legend(frameon=False, fontsize=8, loc="outside upper right", ncols=2)


def variant_bars(table: pd.DataFrame, figure: Figure) -> None:
    """`compared`: the edited prompt, its paraphrases and its neighbours under each method."""
    shown = (
        ("p_new", "P(new answer)"),
        ("paraphrases", "paraphrases, %"),
        ("neighbours", "neighbours kept, %"),
    )
    axes = figure.subplots(1, len(shown), sharey=True)
    for ax, (column, name) in zip(axes, shown, strict=True):
        ax.barh(range(len(table)), table[column], color=AFTER)
        ax.set_xlim(0, 1 if column == "p_new" else 100)
        ax.set_xlabel(name)
    axes[0].set_yticks(range(len(table)), list(table.index))
    axes[0].invert_yaxis()


def lens_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`lens_tokens` as `token_map` takes it: a panel per component and a row per token, or, of one
    token, a row per component."""
    name = table["stream"].map(lambda s: COMPONENT_NAMES.get(s, s))
    if position is not None:
        own = table.loc[table["position"] == position].assign(row=name)
        order = {row: i for i, row in enumerate(dict.fromkeys(own["row"]))}
        return own.assign(panel=_token(own), order=own["row"].map(order))
    return table.assign(panel=name, row=table["token"].map(_visible), order=table["position"])


def trace_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`trace_tokens` as `token_map` takes it: a row per token, or the row of one."""
    own = table if position is None else table.loc[table["position"] == position]
    name = own["stream"].map(lambda s: f"{COMPONENT_NAMES.get(s, s)} restored")
    return own.assign(panel=name, row=own["token"].map(_visible), order=own["position"])


def attention_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`subject_attention` as `token_map` takes it: a row per looking token with the mean of the
    heads, or, of one token, a row per head."""
    if position is not None:
        own = table.loc[table["position"] == position]
        row = own["head"].map(lambda head: f"head {head}")
        return own.assign(panel=f"looking: {_token(own)}", row=row, order=own["head"])
    mean = table.groupby(["layer", "position", "token"])["weight"].mean()
    own = pd.DataFrame(mean).reset_index()
    row = own["token"].map(_visible)
    return own.assign(panel="mean over heads, per looking token", row=row, order=own["position"])


def _token(own: pd.DataFrame) -> str:
    return f"at “{_visible(str(own['token'].iloc[0]))}”" if len(own) else ""


def _visible(token: str) -> str:
    return token.strip() or repr(token)[1:-1]


def _short(text: str, most: int = 36) -> str:
    """The end of a text, which is what differs between prompts."""
    return text if len(text) <= most else f"… {text[-most:].partition(' ')[2]}"


def rows_of(table: pd.DataFrame, columns: Sequence[str]) -> list[list[object]]:
    """The rows of a table as lists, for `markup.table`."""
    return [[row[column] for column in columns] for row in table.to_dict("records")]
