"""What every fact came to in the study on real models, without its words, so that a method which is
measured later, or elsewhere, can be compared with the others pair by pair.

One file per model in `figures/results/real/rows`: the rows of all pieces of edits and ablations
under the name of their piece, and beside it the identity of what they are of (facts, others, kind
of targets). Pieces of another identity are not mixed in; they replace what is there.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pmet_lens import data

KINDS = ("rows", "free", "ability", "others", "zsre", "ablation", "held", "spared")
"""Kinds of pieces that are kept."""
FAST, PUBLISHED = ", fast steps", ", published steps"
"""What stands behind the name of a run whose targets take those where the others take the other."""
ALONE = "w/o δ^a"
"""PMET without δ^a, with PMET's settings, which is measured as the methods are, too."""
COLUMNS = (
    "fact", "kind", "index", "benchmark", "implication", "success", "correct", "margin",
    "token_accuracy", "contains", "exact", "talks_on", "metric", "mean", "ci_low", "ci_high", "n",
)  # fmt: skip
"""What `pl.summarise` and `pl.paired` read; the last five are of pieces that are summaries."""
Pieces = dict[str, pd.DataFrame]


def method_of(run: str) -> str:
    """The name of a run without its steps."""
    return run.removesuffix(FAST).removesuffix(PUBLISHED)


def by_steps(name: str) -> list[str]:
    """A name with each kind of steps that may stand behind it."""
    return [name, name + FAST, name + PUBLISHED]


def path_of(results: Path, model: str) -> Path:
    return results / "rows" / f"{model}.csv.xz"


def stored(results: Path, model: str, identity: str) -> Pieces:
    """The pieces that are kept of this model and identity."""
    path = path_of(results, model)
    if not path.exists() or _identity(path).read_text(encoding="utf-8") != identity:
        return {}
    table = pd.read_csv(path, low_memory=False)
    return {
        str(name): own.drop(columns="piece").dropna(axis=1, how="all").reset_index(drop=True)
        for name, own in table.groupby("piece", sort=False)
    }


def store(results: Path, model: str, identity: str, pieces: Pieces) -> None:
    """Keep these pieces, and no others, of the model."""
    kept = [
        table[[c for c in COLUMNS if c in table]].assign(piece=name)
        for name, table in sorted(pieces.items())
        if name.split(" ")[0] in KINDS
    ]
    if kept:
        path = path_of(results, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        with data.whole(path) as part:
            whole = pd.concat(kept, ignore_index=True)
            whole.to_csv(part, index=False, float_format="%.4g", compression="xz")
        with data.whole(_identity(path)) as part:
            part.write_text(identity, encoding="utf-8")


def _identity(path: Path) -> Path:
    return path.with_name(path.name.replace(".csv.xz", ".txt"))
