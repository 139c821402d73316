"""Tables of the explorer to matplotlib figures, drawn without touching anybody's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from pmet_lens.evaluation.metrics import where
from pmet_lens.plotting.plots import COMPONENT_NAMES, number_map

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
        rows = where(table, panel=panel)
        wide = rows.pivot(index="order", columns="layer", values=measure)
        names = dict(zip(rows["order"], rows["row"], strict=True))
        named = wide.astype(float).set_axis([names[n] for n in wide.index])
        _cells(ax, named, measure, worst)
        ax.set_xlabel("layer")
        ax.set_title(panel)
    bar = figure.colorbar(axes[0].images[0], ax=list(axes), label=MEASURES[measure], shrink=0.9)
    if measure == "rank":
        powers = range(int(np.log10(worst)) + 1)
        bar.set_ticks([-n for n in powers], labels=[f"{10**n:,}" for n in powers])


def _cells(ax: Axes, wide: pd.DataFrame, measure: str, worst: float) -> None:
    """The map of one panel, with the numbers written in where there is room."""
    low, high, write = 0.0, 1.0, _share
    if measure == "rank":
        wide = wide.transform(lambda rank: -np.log10(rank))
        low, high, write = -float(np.log10(max(worst, 10.0))), 0.0, _rank
    step = 1 if wide.shape[1] <= WRITTEN else 4
    written = write if max(wide.shape) <= WRITTEN else None
    number_map(wide, ax, low, high, written, bright=0.55, step=step, gid="cell")


def _rank(shade: float) -> str:
    return f"{10**-shade:.0f}"


def _share(value: float) -> str:
    text = f"{value:.2f}".replace("0.", ".", 1)
    return "" if text in (".00", "-.00") else text


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
    ax.set(xlabel="optimisation step", ylabel="nats")
    ax.legend(frameon=False, fontsize=8, loc="upper right")


def answer_bars(table: pd.DataFrame, figure: Figure) -> None:
    """`Session.ask`: the likeliest tokens without and with the edits, side by side."""
    axes = figure.subplots(1, 2, sharex=True)
    names = {"before": "without edits", "after": "with the edits that are on"}
    for ax, (model, colour) in zip(axes, (("before", BEFORE), ("after", AFTER)), strict=True):
        rows = where(table, model=model)
        ax.barh(range(len(rows)), rows["probability"], color=colour)
        ax.set_yticks(range(len(rows)), [repr(t.strip()) for t in rows["token"]])
        ax.invert_yaxis()
        ax.set(xlim=(0, 1), xlabel="probability", title=names[model])


def prompt_shifts(table: pd.DataFrame, figure: Figure) -> None:
    """`Session.answers`: the new answer's probability on every prompt, before and after."""
    ax = figure.subplots()
    y = np.arange(len(table))
    ax.hlines(y, table["p_before"], table["p_after"], color=BEFORE, lw=1.5)
    ax.plot(table["p_before"], y, "o", color=BEFORE, ms=5, label="before")
    ax.plot(table["p_after"], y, "o", color=AFTER, ms=6, label="after")
    prompts = zip(table["kind"], table["prompt"], strict=True)
    ax.set_yticks(y, [f"{kind}: {_short(prompt)}" for kind, prompt in prompts])
    ax.invert_yaxis()
    ax.set(xlim=(-0.02, 1.02), xlabel="probability of the new answer")
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
        ax.set(xlim=(0, 1 if column == "p_new" else 100), xlabel=name)
    axes[0].set_yticks(range(len(table)), list(table.index))
    axes[0].invert_yaxis()


def changed_bars(table: pd.DataFrame, figure: Figure) -> None:
    """`effects`: how many answers each edit changed, per kind of prompt."""
    names = {"fact": "the fact", "follows": "follows", "stays": "has to stay", "other": "other"}
    kinds = [kind for kind in names if kind in set(table["kind"])]
    edits = list(dict.fromkeys(table["edit"]))
    axes = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for ax, kind in zip(axes, kinds, strict=True):
        rows = where(table, kind=kind)
        counts = [int(where(rows, edit=edit)["changed"].sum()) for edit in edits]
        ax.barh(range(len(edits)), counts, color=AFTER)
        ax.set(xlim=(0, len(rows) // len(edits)), xlabel=f"{names[kind]}: changed")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes[0].set_yticks(range(len(edits)), edits)
    axes[0].invert_yaxis()


def lens_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`lens_tokens` as `token_map` takes it: a panel per component and a row per token, or, of one
    token, a row per component."""
    name = table["stream"].map(lambda s: COMPONENT_NAMES.get(s, s))
    if position is None:
        return table.assign(panel=name, row=table["token"].map(_visible), order=table["position"])
    rows = where(table.assign(row=name), position=position)
    order = {row: i for i, row in enumerate(dict.fromkeys(rows["row"]))}
    return rows.assign(panel=_token(rows), order=rows["row"].map(order))


def trace_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`trace_tokens` as `token_map` takes it: a row per token, or the row of one."""
    rows = table if position is None else where(table, position=position)
    name = rows["stream"].map(lambda s: f"{COMPONENT_NAMES.get(s, s)} restored")
    return rows.assign(panel=name, row=rows["token"].map(_visible), order=rows["position"])


def attention_panels(table: pd.DataFrame, position: int | None = None) -> pd.DataFrame:
    """`subject_attention` as `token_map` takes it: a row per looking token with the mean of the
    heads, or, of one token, a row per head."""
    if position is not None:
        rows = where(table, position=position)
        row = rows["head"].map(lambda head: f"head {head}")
        return rows.assign(panel=f"looking: {_token(rows)}", row=row, order=rows["head"])
    mean = table.groupby(["layer", "position", "token"])["weight"].mean()
    rows = pd.DataFrame(mean).reset_index()
    row = rows["token"].map(_visible)
    return rows.assign(panel="mean over heads, per looking token", row=row, order=rows["position"])


def _token(rows: pd.DataFrame) -> str:
    return f"at “{_visible(str(rows['token'].iloc[0]))}”" if len(rows) else ""


def _visible(token: str) -> str:
    return token.strip() or repr(token)[1:-1]


def _short(text: str, most: int = 36) -> str:
    """The end of a text, which is what differs between prompts."""
    return text if len(text) <= most else f"… {text[-most:].partition(' ')[2]}"


def rows_of(table: pd.DataFrame, columns: Sequence[str]) -> list[list[object]]:
    """The rows of a table as lists, for `markup.table`."""
    return [[row[column] for column in columns] for row in table.to_dict("records")]
