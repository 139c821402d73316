"""The tables and figures of `make paper` from its result tables, for the README and for readers."""

from __future__ import annotations

from pathlib import Path

import fig_ablations
import fig_scaling
import fig_sequential
import fig_sweeps
import pandas as pd
from common import EDITED, of, read

import pmet_lens as pl

FIGURES = {
    "fig_scaling": fig_scaling.draw,
    "fig_ablations": fig_ablations.draw,
    "fig_sweeps": fig_sweeps.draw,
    "fig_sequential": fig_sequential.draw,
}
COLUMNS = {
    "counterfact": [
        "S",
        "ES",
        "PS",
        "NS",
        "EA",
        "PA",
        "NA",
        "GE",
        "RS",
        "collateral",
        "perplexity",
        "KL",
    ],
    "zsre": ["score", "efficacy", "paraphrase", "specificity", "collateral", "perplexity", "KL"],
}
PAPER = {
    "w/o δ^a": "worse",
    "+ W_O": "little",
    "linear spread": "worse",
    "MEMIT": "worse",
}
"""What PMET's abstract and ablation section say of leaving a part out (arXiv 2308.08742)."""


def main_table(tables: Path) -> str:
    """Every method at the larger loads, per benchmark, as Markdown."""
    table = read(tables, "scaling")
    lines: list[str] = []
    for benchmark, title in (("counterfact", "CounterFact"), ("zsre", "zsRE")):
        own = of(table, benchmark=benchmark)
        sizes = main_sizes(own)
        lines += [f"**{title}**", "", *_markdown(own[own["edits"].isin(sizes)], benchmark), ""]
    note = (tables / "provenance.txt").read_text(encoding="utf-8").strip()
    missing = (
        "ROME stops at 100. EMMET cannot edit 750 CounterFact records: some subjects have two, "
        "whose prompts give the same key, and an exact solver cannot give one key two values."
    )
    return "\n".join([*lines, missing, "", f"95 % bootstrap intervals over facts. {note}", ""])


def main_sizes(table: pd.DataFrame) -> list[int]:
    """The numbers of edits from 100 on, or the largest of a quick run."""
    edits = sorted(table["edits"].unique())
    return [n for n in edits if n >= 100] or edits[-1:]


def _markdown(table: pd.DataFrame, benchmark: str) -> list[str]:
    columns = [m for m in COLUMNS[benchmark] if m in set(table["metric"])]
    lines = ["| " + " | ".join(["model", "edits (per MLP unit)", "method", *columns]) + " |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for name in EDITED:
        for n in sorted(table["edits"].unique()):
            for run in ("unedited", *pl.METHODS):
                own = of(table, model=name, edits=n, run=run).set_index("metric")
                if own.empty:
                    continue
                cells = [cell(own.loc[m]) if m in own.index else "" for m in columns]
                head = [name, f"{n} ({own['load'].iloc[0]:.2f})", run]
                lines.append("| " + " | ".join([*head, *cells]) + " |")
    return lines


def cell(row: pd.Series) -> str:
    """A mean with its interval; small numbers with more digits."""
    digits = 2 if row.name in ("KL", "perplexity") else 1
    mean, low, high = (f"{row[k]:.{digits}f}" for k in ("mean", "ci_low", "ci_high"))
    return f"{mean} [{low}, {high}]"


def ablation_table(tables: Path) -> str:
    """Size and sign of every effect, and whether it agrees with the paper, as Markdown."""
    table = read(tables, "ablations")
    metrics = ("S", "ES", "PS", "NS", "collateral")
    lines = ["| model | variation | " + " | ".join(metrics) + " | the paper says | here |"]
    lines.append("|" + "---|" * (len(metrics) + 4))
    for name in EDITED:
        own = of(table, model=name)
        for run in dict.fromkeys(own["run"]):
            rows = of(own, run=run).set_index("metric")
            if rows["difference"].isna().all():
                cells = [f"{rows.loc[m, 'mean']:.1f}" for m in metrics]
                lines.append(f"| {name} | {run} (the values) | {' | '.join(cells)} | | |")
                continue
            cells = [_effect(rows.loc[m]) for m in metrics]
            says, verdict = PAPER.get(run, ""), agreement(rows, PAPER.get(run, ""))
            lines.append(f"| {name} | {run} | {' | '.join(cells)} | {says} | {verdict} |")
    n = int(table["edits"].iloc[0])
    note = (
        f"{n} facts at once, the same in every row; differences against PMET in points, paired "
        "95 % bootstrap intervals; bold: the interval leaves out 0. The last column compares S."
    )
    return "\n".join([*lines, "", note, ""])


def _effect(row: pd.Series) -> str:
    low, high = row["difference_low"], row["difference_high"]
    text = f"{row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def agreement(rows: pd.DataFrame, says: str) -> str:
    """Whether the effect on S is as the paper says; in doubt, not told."""
    if not says:
        return ""
    difference, low, high = (
        rows.loc["S", k] for k in ("difference", "difference_low", "difference_high")
    )
    if says == "little":
        return "agrees" if max(abs(low), abs(high)) < 3 else f"{difference:+.1f}: not little"
    if high < 0:
        return "agrees"
    return "the opposite" if low > 0 else "not told apart from 0"
