"""Every figure again from the committed tables, in seconds: `python figures/redraw.py`.

Figures (PDF, SVG, PNG) and the tables they are drawn from (CSV) go to `figures/out/recorded`; with
`--record` the committed PNGs are replaced, after a change of the drawing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import free_answers
import manifest
import mass_edit
import one_edit
import real_figures
import study
import tune
from common import HERE, OUT, make
from make import draw as draw_main
from paper_tables import FIGURES as PAPER

FIGURES = {
    "": {"fig_main": draw_main, **study.FIGURES},
    "paper": PAPER,
    "mass_edit": {"fig_mass_edit": mass_edit.draw},
    "real": real_figures.FIGURES,
    "real_model": {"fig_one_edit": one_edit.draw},
    **({"tune": tune.FIGURES} if (tune.RESULTS / "compared.csv").exists() else {}),
    **{
        f"free_answers/{tables.parent.name}": {"fig_free_answers": free_answers.draw}
        for tables in sorted(free_answers.RESULTS.glob("*/gap.csv"))
    },
}
"""Folder in `figures/results` -> the figures that are drawn from its tables."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="replace the committed PNGs")
    parser.add_argument("--out", type=Path, default=OUT / "recorded")
    args = parser.parse_args()
    used: dict[str, list[str]] = {}
    for folder in FIGURES:
        used |= redraw(folder, args.out, args.record)
    manifest.write("redraw.py", args.out, used, computed=False)
    if args.record:
        results = HERE / "results"
        manifest.write("redraw.py", results, used, computed=False, into=manifest.RECORDED)
    sys.stdout.write(f"Figures of the committed tables: {args.out}\n")


def redraw(folder: str, out: Path, record: bool) -> dict[str, list[str]]:
    """The figures of one folder: name -> the tables it was drawn from."""
    tables, out = HERE / "results" / folder, out / folder
    out.mkdir(parents=True, exist_ok=True)
    used = {}
    for name, draw in FIGURES[folder].items():
        read = make(draw, name, tables, out)
        for table in read:
            shutil.copy(tables / table, out / table)
        if record:
            shutil.copy(out / f"{name}.png", tables / f"{name}.png")
        used[f"{folder}/{name}".lstrip("/")] = [f"{folder}/{t}".lstrip("/") for t in read]
    return used


if __name__ == "__main__":
    main()
