"""`make figures`: the main job on the bundled models, from analysis to figures and tables.

Per model: targets → edits (one at a time and 100 at once, with PMET, PMET with
linear spread and MEMIT) → evaluation with 95 % intervals → `figures/out/`. With `--record` also
300 edits at once (about three minutes more), and everything replaces `figures/results/`, which the
pages quote; without it the rows of 300 edits are the recorded ones, and say so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import common
import manifest
import pandas as pd
import quotes
import torch
from common import (
    EDITED,
    HERE,
    OUT,
    Progress,
    legend,
    panels,
    provenance,
    submit,
    workers,
)
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import experiments, plotting

METRICS = ["S", "ES", "PS", "NS", "EA", "PA", "NA", "collateral"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="all sizes, and keep the results")
    parser.add_argument("--quick", action="store_true", help="few facts, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with workers(len(EDITED)) as pool:
        begin(pool, args.out, args.record, args.quick)()


def begin(
    pool: Executor, out: Path = OUT, keep: bool = False, quick: bool = False
) -> Callable[[], None]:
    """Hands the work out; what is returned waits for it and writes tables and figures."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    few, many = (10, 10) if quick else (100, 300 if keep else 100)
    found = submit(pool, list(EDITED), partial(run_model, (few, many)))

    def finish() -> None:
        table = pd.concat([one.result() for one in found], ignore_index=True)
        if not keep:
            table = pd.concat([table, recorded(few)], ignore_index=True)
        table.to_csv(out / "main.csv", index=False)
        used = {"fig_main": common.make(draw, "fig_main", out, out)}
        manifest.write("make.py", out, used, computed=True)
        text = report(table, (time.perf_counter() - start) / 60)
        (out / "main.md").write_text(text, encoding="utf-8")
        sys.stdout.write(f"\n{text}\nFigures and tables: {out}\n")
        if keep:
            record(table, text, out)

    return finish


def recorded(measured: int) -> pd.DataFrame:
    """The committed rows of more edits at once than were measured now, marked as such."""
    path = HERE / "results" / "main.csv"
    if not path.exists():
        return pd.DataFrame()
    # "NA" is the name of a metric here.
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    table = table[table["edits"] > max(measured, 100)]
    return table.assign(run=table["run"] + " (recorded)")


def record(table: pd.DataFrame, text: str, out: Path) -> None:
    """Replace the committed results, and the table on the page that quotes it."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    table.round(2).to_csv(results / "main.csv", index=False)
    (results / "main.md").write_text(text, encoding="utf-8")
    shutil.copy(out / "fig_main.png", results / "fig_main.png")
    used = {"fig_main": ["main.csv"]}
    manifest.write("make.py", results, used, computed=True, into=manifest.RECORDED)
    quotes.fill()


def run_model(sizes: tuple[int, int], name: str, place: int) -> pd.DataFrame:
    """All results of one bundled model."""
    few, many = sizes
    progress = Progress(5, place)
    model, facts = pl.load(name), pl.counterfact(n=many)
    world = pl.knowns()  # every fact of the world
    progress.stage(f"{name}: second moments and the unedited model")
    contexts = pl.sample_contexts(model)
    layers = sorted({n for m in ("PMET", "MEMIT") for n in pl.HPARAMS[name][m].layers})
    how: Any = {"projections": ("mlp",), "dtype": torch.float32}
    moments = pl.second_moments(model, pl.texts(), layers, **how)
    others = experiments.others_of(world, facts[:few])
    tables = {("unedited", few): experiments.measure(model, facts[:few], None, others)}
    progress.done()

    found = {}
    for method_name in ("PMET", "MEMIT"):
        progress.stage(f"{name}: {method_name} targets of {many} facts")
        method = pl.METHODS[method_name]
        found[method_name] = pl.optimise(
            model, facts, method, pl.hparams_for(model, method), contexts
        )
        progress.done()

    progress.stage(f"{name}: one edit at a time")
    tables["PMET", 1] = pl.summarise(
        experiments.one_at_a_time(
            model,
            facts[:few],
            moments,
            pl.PMET,
            pl.hparams_for(model, pl.PMET),
            contexts,
            found["PMET"][:few],
        )
    )
    progress.done()

    progress.stage(f"{name}: mass edits")
    runs = [
        ("PMET", few),
        ("PMET, linear spread", few),
        ("MEMIT", few),
        ("PMET", many),
        ("MEMIT", many),
    ]
    for run, n in dict.fromkeys(runs):
        method = pl.ABLATIONS["linear spread"] if "linear" in run else pl.METHODS[run]
        chosen = found["MEMIT" if run == "MEMIT" else "PMET"][:n]
        hp = pl.hparams_for(model, method)
        edit = pl.edit(model, facts[:n], moments, method, hp, contexts, chosen)
        others = experiments.others_of(world, facts[:n])
        tables[run, n] = experiments.measure(model, facts[:n], edit, others)
    progress.done()
    progress.bar.close()
    return _tidy(name, tables)


def _tidy(name: str, tables: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    frames = [
        t.reset_index().assign(model=name, run=run, edits=n) for (run, n), t in tables.items()
    ]
    columns = ["model", "edits", "run", "metric", "mean", "ci_low", "ci_high", "n"]
    return pd.concat(frames, ignore_index=True)[columns]


def draw(tables: Path) -> Figure:
    """One panel per model: every metric of the runs of the smaller number of edits at once."""
    table = common.read(tables, "main")
    n = int(table.loc[table["run"] == "unedited", "edits"].iloc[0])
    fig, axes = panels(7, 2.8, 1, len(EDITED), sharey=True)
    for ax, (name, kind) in zip(axes[0], EDITED.items(), strict=True):
        plotting.metric_bars(common.of(table, model=name, edits=n), ax)
        ax.set_title(f"{n} edits at once, {kind}")
    axes[0, 1].set_ylabel("")
    legend(fig, axes[0, 0], 4)
    return fig


def report(table: pd.DataFrame, minutes: float) -> str:
    """The results as Markdown, with what is needed to read them."""
    cells = table.assign(
        text=[
            f"{m:.1f} [{low:.1f}, {high:.1f}]"
            for m, low, high in zip(table["mean"], table["ci_low"], table["ci_high"], strict=True)
        ]
    )
    wide = cells.pivot_table(
        index=["model", "edits", "run"],
        columns="metric",
        values="text",
        aggfunc="first",
        sort=False,
    )
    wide = wide.reindex(columns=[m for m in METRICS if m in wide.columns]).fillna("")
    lines = ["| " + " | ".join(["model", "edits", "run", *wide.columns]) + " |"]
    lines.append("|" + "---|" * (3 + len(wide.columns)))
    for index, row in wide.iterrows():
        lines.append("| " + " | ".join([*map(str, index), *row]) + " |")  # type: ignore[misc]
    note = f"Per cent, higher is better, 95 % bootstrap intervals over facts. {provenance(minutes)}"
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main()
