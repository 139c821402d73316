"""PMET and MEMIT on a real model: `python figures/real.py` (SmolLM2-135M-Instruct, fetched once).

Twenty of `pl.real_facts()` that the model recalls, edited at once. Second moments come from a text
file (`--texts`, one text a line), else from text that the model samples itself, once
(`pl.own_moments`). Writes the table and the picture to `figures/out/real_model`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from common import OUT, Progress, legend, panels, provenance, save

import pmet_lens as pl
from pmet_lens import plotting

MODEL = "smollm2-135m"
FACTS = 20
LAYERS = (2, 3, 4, 5, 6, 7)
"""Of the trace's plateau, layers 0 to 12 (0.56 to 0.70 of the answer comes back at the last subject
token); `pl.suggest_hparams(model, pl.recalled(model, n=24))` takes its highest point, 4 to 9."""
HPARAMS = {
    "PMET": pl.Hparams(layers=LAYERS, second_moment_weight=20.0),
    # MEMIT's published settings for GPT-J but for λ, which is for few facts here.
    "MEMIT": pl.Hparams(
        layers=LAYERS,
        n_steps=25,
        lr=0.5,
        clamp=0.75,
        weight_decay=0.5,
        kl_weight=0.0625,
        easing=1.0,
        second_moment_weight=20.0,
    ),
}
N_TOKENS = 16_000
"""About ten per dimension of a key (1,536)."""
SHOWN = ["ES", "PS", "NS", "EA", "PA", "NA"]


def study(path: str | None) -> pd.DataFrame:
    """One row per method and metric: method, metric, mean, ci_low, ci_high, n."""
    bar = Progress(5)

    def stage(text: str, run: Any) -> Any:
        bar.stage(text)
        found = run()
        bar.done()
        return found

    model = stage("model", lambda: pl.load(MODEL))
    facts = stage("facts it knows", lambda: pl.recalled(model, n=FACTS))
    contexts = pl.sample_contexts(model)
    how: dict[str, Any] = {"projections": ("mlp",), "n_tokens": N_TOKENS}
    moments = stage(
        "second moments",
        lambda: (
            pl.own_moments(model, LAYERS, **how)
            if path is None
            else pl.second_moments(model, pl.texts(path), LAYERS, **how)
        ),
    )
    tables = {"unedited": pl.summarise(pl.evaluate(model, facts))}
    for method, hparams in HPARAMS.items():

        def run(method: str = method, hparams: pl.Hparams = hparams) -> pd.DataFrame:
            edit = pl.edit(model, facts, moments, method, hparams, contexts)
            with edit.applied(model):
                return pl.summarise(pl.evaluate(model, facts))

        tables[method] = stage(method, run)
    return pd.concat(tables, names=["method"]).reset_index()


def page(table: pd.DataFrame, made: str) -> str:
    """The scores with their intervals, as Markdown; `made`: how and when."""
    numbers = table[["mean", "ci_low", "ci_high"]].itertuples(index=False)
    cells = table.assign(
        text=[f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in numbers]
    )
    wide = cells.pivot(index="method", columns="metric", values="text")
    shown = wide.loc[table["method"].unique(), ["S", *SHOWN, "portability"]]
    rows = [["method", *shown.columns], ["---"] * (1 + len(shown.columns)), *shown.itertuples()]
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    what = (
        f"{MODEL}, {FACTS} real facts at once, per cent with 95 % bootstrap intervals over facts."
    )
    return "\n".join([what, "", *lines, "", made, ""])


def draw(table: pd.DataFrame) -> Any:
    """Bars of the scores per method, with their intervals."""
    fig, axes = panels(6.4, 3.0, 1, 1)
    ax = axes[0, 0]
    methods = list(dict.fromkeys(table["method"]))
    for i, method in enumerate(methods):
        rows = table[table["method"] == method].set_index("metric").loc[SHOWN]
        place = [k + (i - 1) * 0.27 for k in range(len(SHOWN))]
        ends = [rows["mean"] - rows["ci_low"], rows["ci_high"] - rows["mean"]]
        colour = plotting.colour_of(method)
        ax.bar(place, rows["mean"], 0.25, yerr=ends, label=method, color=colour, error_kw={"lw": 1})
    ax.set_xticks(range(len(SHOWN)), SHOWN)
    ax.set_ylabel("%")
    ax.set_title(f"{MODEL}: {FACTS} real facts edited at once")
    legend(fig, ax, len(methods))
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", help="text file for the second moments, one text a line")
    parser.add_argument("--out", type=Path, default=OUT / "real_model")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        table = study(args.texts)
    except pl.ModelError as error:
        parser.exit(2, f"{error}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    table.round(2).to_csv(args.out / "real.csv", index=False)
    made = provenance((time.monotonic() - start) / 60)
    (args.out / "real.md").write_text(page(table, made), encoding="utf-8")
    with mpl.rc_context({**plotting.STYLE, "svg.hashsalt": "real"}):
        save(draw(table), args.out / "fig_real")


if __name__ == "__main__":
    main()
