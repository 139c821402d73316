"""What would mend PMET on a real sequential model: `python figures/variants.py --model MODEL`.

PMET and MEMIT beside the candidates of `pl.VARIANTS` (δ^a written too, other solvers, δ^a faded
out, targets refreshed), each tuned with the same budget on the same held-out facts, then
on the same other facts, 20 and 100 at once: paired differences to MEMIT, and to PMET. Everything is
kept in `figures/out/variants/MODEL`; a run that was cut goes on. A variant *dominates* where no
metric is worse than that of both beyond its interval, and one is better. `--record` replaces the
committed tables.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import real
import tune
from common import HERE, OUT, provenance

import pmet_lens as pl

BASELINES = ("MEMIT", "PMET")
SIZES = (20, 100)
JUDGED = ("ES", "PS", "NS", "EA", "PA", "NA", "collateral")


class Study(tune.Study):
    """The facts and the bench of `tune.py`; PMET's settings are the first guess of every one."""

    def methods(self) -> dict[str, pl.Trial]:
        names = [*BASELINES, *(self.args.variants or pl.VARIANTS)]
        return {name: pl.Trial(name) for name in names}

    def _guess(self, method: object) -> pl.Hparams:
        """The layers given and what is released for PMET, also where a solver is another's."""
        if not self.layers:
            raise pl.SettingsError("no layers given")
        kind = pl.MEMIT if method == pl.MEMIT else pl.PMET
        return self.hasty(pl.Hparams(self.layers).settled(kind, self.args.tuned_on))

    def all(self) -> pd.DataFrame:
        """Every variant at every number of facts, against each of the two baselines."""
        if self.args.model.startswith("world"):
            known = self.bench.settings
            self.bench.settings = lambda m: known(m if m == pl.MEMIT else pl.PMET)
        tables = [self.compared(self.facts[:n]).assign(edits=n) for n in self.args.sizes]
        return pd.concat(tables, ignore_index=True)

    def compared(self, facts: list[pl.Fact]) -> pd.DataFrame:
        """One number of facts at once; what was tuned is there, as are its targets."""

        def tell(name: str, tuned: pl.Tuned) -> None:
            sys.stderr.write(f"{len(facts)} at once, {name}: {tuned!r}\n")

        return pl.compare(
            self.bench, self.methods(), facts, self.others, BASELINES, tune_on=self.held_out,
            budget=self.args.budget, goal=self.args.goal, front=True, on_tuned=tell,
        )  # fmt: skip


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Per variant and number of facts: metrics in which it is better and worse than each baseline
    beyond the interval, and whether it dominates both."""
    own = table[table["metric"].isin(JUDGED) & ~table["run"].isin(BASELINES)]
    rows = []
    for (run, edits), part in own.groupby(["run", "edits"], sort=False):
        row: dict[str, object] = {"run": run, "edits": edits}
        better, worse = 0, 0
        for baseline, of in part.groupby("against", sort=False):
            up = of.loc[of["difference_low"] > 0, "metric"]
            down = of.loc[of["difference_high"] < 0, "metric"]
            row |= {
                f"better than {baseline}": " ".join(up),
                f"worse than {baseline}": " ".join(down),
            }
            better, worse = better + bool(len(up)), worse + len(down)
        rows.append(row | {"dominates": better == len(BASELINES) and worse == 0})
    return pd.DataFrame(rows)


def page(table: pd.DataFrame, told: pd.DataFrame, made: str) -> str:
    """Means, the difference in S to both baselines, and the verdicts, as Markdown."""
    lines = [["facts", "variant", "S", *JUDGED, "S against MEMIT", "S against PMET", "dominates"]]
    for (edits, run), part in table.groupby(["edits", "run"], sort=False):
        mean = part[part["against"] == BASELINES[0]].set_index("metric")["mean"]
        gaps = []
        for baseline in BASELINES:
            row = part[(part["against"] == baseline) & (part["metric"] == "S")].iloc[0]
            low, high = row["difference_low"], row["difference_high"]
            gaps.append("" if pd.isna(low) else f"{row['difference']:+.1f} [{low:.1f}, {high:.1f}]")
        mine = told[(told["run"] == run) & (told["edits"] == edits)]
        yes = "" if mine.empty else "yes" if bool(mine["dominates"].iloc[0]) else "no"
        cells = [f"{mean[m]:.1f}" if m in mean else "" for m in ("S", *JUDGED)]
        lines.append([str(edits), str(run), *cells, *gaps, yes])
    lines.insert(1, ["---"] * len(lines[0]))
    first = table.iloc[0]
    head = (
        f"{first['model']}, every method tuned with {int(first['budget'])} targets on "
        f"{first['tuned_on']} other facts{tune.steps(first)}; per cent, differences paired over "
        "facts with 95 % intervals."
    )
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines), "", made, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    tune.options(parser)
    parser.add_argument("--variants", nargs="+", help="names of pl.VARIANTS; default: all")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="facts at once")
    parser.add_argument("--out", type=Path, default=OUT / "variants")
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    args = parser.parse_args()
    args.facts, bundled = max(args.sizes), args.model.startswith("world")
    args.tokens = args.tokens or (100_000 if bundled else real.N_TOKENS)
    start = time.monotonic()
    try:
        study = Study(args)
        table = study.all()
    except (pl.ModelError, pl.DataError, pl.FactError, pl.SettingsError) as error:
        parser.exit(2, f"{error}\n")
    table = table.assign(model=Path(args.model).name, tuned_on=len(study.held_out), fast=args.fast)
    told = verdicts(table)
    study.keep("compared", table)
    study.keep("verdicts", told)
    made = provenance((time.monotonic() - start) / 60, study.model.device)
    (study.folder / "variants.md").write_text(page(table, told, made), encoding="utf-8")
    if args.record:
        results = HERE / "results" / "variants"
        tune.merge(study.folder, results, ("compared", "verdicts"), "variants.md")


if __name__ == "__main__":
    main()
