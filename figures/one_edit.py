"""One fact of a real model edited and undone, as a picture: `python figures/one_edit.py`.

SmolLM2-135M is asked in free words before the edit, with it and after its undo: the edited prompt,
another phrasing, and prompts about other subjects with the same or another answer. Writes
`one_edit.csv` and the picture to `figures/out/real_model`; `--record` replaces the committed ones.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import manifest
import numpy as np
import pandas as pd
import real
from common import HERE, OUT, make, read
from matplotlib.figure import Figure

import pmet_lens as pl

SUBJECT, METHOD, NEIGHBOURS = "Louvre", "MEMIT", 5
STATES = ("before", "with the edit", "undone")
NEW, TRUE, SAME = "#D55E00", "#0072B2", "#555555"
WORDS = 5


def study(subject: str, method: str) -> pd.DataFrame:
    """Columns state, kind, prompt, wanted, other, answer (in free words), contains (whether the
    wanted one stands in it), probability (of the wanted one per token, under teacher forcing), new
    and true (the fact's answers)."""
    model = pl.load(real.MODEL)
    known = {fact.subject: fact for fact in pl.recalled(model)}
    if subject not in known:
        raise pl.FactError(f"{real.MODEL} recalls no real fact about {subject!r}.")
    fact = known[subject]
    moments = pl.own_moments(model, real.LAYERS, text="python")
    edit = pl.edit(model, fact, moments, method, pl.Hparams(real.LAYERS))
    tables = [asked(model, fact, STATES[0])]
    with edit.applied(model):
        tables.append(asked(model, fact, STATES[1]))
    return pd.concat([*tables, asked(model, fact, STATES[2])], ignore_index=True)


def asked(model: pl.Model, fact: pl.Fact, state: str) -> pd.DataFrame:
    rows = pl.evaluate(model, fact, free=pl.Asking(limit=16))
    rows = rows[rows["kind"].isin(["rewrite", "paraphrase", "neighbour"])]
    columns = ["kind", "prompt", "wanted", "other", "answer", "contains"]
    found = rows[columns].assign(state=state, new=fact.target_new, true=fact.target_true)
    return found.assign(probability=np.exp(-rows["nll_wanted"]))


def draw(folder: Path) -> Figure:
    """A row per prompt, a column per state: the first words of the answer, and in colour whether
    it is the new one, the old one or neither."""
    table = read(folder, "one_edit")
    new, true = table["new"].iloc[0], table["true"].iloc[0]
    prompts = list(dict.fromkeys(table["prompt"]))
    prompts = prompts[: 2 + NEIGHBOURS]
    fig = Figure(figsize=(8.0, 0.5 + 0.3 * len(prompts)))
    ax = fig.subplots()
    ax.set(xlim=(0, 10), ylim=(len(prompts) - 0.4, -1.0))
    ax.axis("off")
    places = (4.5, 6.4, 8.3)
    for x, state in zip(places, STATES, strict=True):
        ax.text(x, -0.75, state, weight="bold", va="center")
    for y, prompt in enumerate(prompts):
        kind = table[table["prompt"] == prompt]["kind"].iloc[0]
        ax.text(0, y, f"{prompt} …", va="center", weight="bold" if kind == "rewrite" else "normal")
        for x, state in zip(places, STATES, strict=True):
            row = table[(table["prompt"] == prompt) & (table["state"] == state)].iloc[0]
            words = str(row["answer"]).split()
            text = " ".join(words[:WORDS]) if len(" ".join(words[:WORDS])) < 22 else words[0]
            colour = NEW if new in str(row["answer"]) else TRUE if true in text else SAME
            ax.text(x, y, text, va="center", color=colour)
    ax.axhline(-0.4, color="#999999", lw=0.6)
    ax.axhline(1.5, color="#CCCCCC", lw=0.6)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subject", default=SUBJECT, help="of a real fact that the model recalls")
    parser.add_argument("--method", default=METHOD)
    parser.add_argument("--record", action="store_true", help="replace the committed picture")
    parser.add_argument("--out", type=Path, default=OUT / "real_model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        table = study(args.subject, args.method)
    except (pl.ModelError, pl.FactError) as error:
        parser.exit(2, f"{error}\n")
    table.to_csv(args.out / "one_edit.csv", index=False, float_format="%.4g")
    used = {"fig_one_edit": make(draw, "fig_one_edit", args.out, args.out)}
    if args.record:
        kept = HERE / "results" / "real_model"
        for name in ("one_edit.csv", "fig_one_edit.png"):
            shutil.copy(args.out / name, kept / name)
        placed = {f"real_model/{n}": [f"real_model/{t}" for t in own] for n, own in used.items()}
        manifest.write("one_edit.py", kept.parent, placed, computed=True, into=manifest.RECORDED)
    sys.stdout.write(f"The picture: {args.out / 'fig_one_edit.png'}\n")


if __name__ == "__main__":
    main()
