"""What `Hparams.fast()` costs in quality: `python tests/benchmarks/fast_preset.py`.

Real facts that SmolLM2-135M recalls are edited at once by PMET (`--method`), with targets of the
published steps and of the fast ones, on the same second moments and prefixes. Scores of both with
95 % intervals, and paired differences. Targets are kept in `out/fast_preset`, ten facts a file: a
run that was cut goes on. `--record` replaces the committed table.
"""

from __future__ import annotations

import argparse
import sys
import time

import pandas as pd
from conftest import RESULTS, markdown, where
from waits import LAYERS

import pmet_lens as pl
from pmet_lens.editing.method import FAST
from pmet_lens.moments.python_text import python_text

MODEL, SHARD, TOKENS = "smollm2-135m", 10, 15_000
SHOWN = ("S", "ES", "PS", "NS", "EA", "PA", "NA", "collateral")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--method", default="PMET", choices=("PMET", "MEMIT"))
    parser.add_argument("--record", action="store_true", help="replace the committed table")
    args = parser.parse_args()
    out = RESULTS.parent / "out"
    model = pl.load(MODEL)
    known = pl.recalled(model)
    facts, others = known[: args.facts], known[args.facts :]
    settings = pl.Hparams(LAYERS).settled(pl.named(args.method), len(facts))
    bench = pl.Bench(
        model, out / "fast_preset", python_text(), TOKENS, lambda _: settings, LAYERS, SHARD
    )
    trials = {"published steps": pl.Trial(args.method), "fast": pl.Trial(args.method, FAST)}
    losses = {}
    for name, trial in trials.items():
        start = time.perf_counter()
        found = bench.targets(trial, facts)
        sys.stderr.write(f"{name}: targets in {time.perf_counter() - start:.0f} s\n")
        losses[name] = found.history.groupby("fact")["nll"].last().mean() if found else None
    table = pl.compare(bench, trials, facts, others, "published steps")
    table = table[table["metric"].isin(SHOWN)].set_index(["metric", "run"])

    def cell(row: pd.Series, *names: str) -> str:
        mean, low, high = (row[name] for name in names)
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    rows = []
    for metric in SHOWN:
        one, other = (table.loc[(metric, name)] for name in trials)
        row = {"metric": metric, "published steps": cell(one, "mean", "ci_low", "ci_high")}
        row["fast"] = cell(other, "mean", "ci_low", "ci_high")
        row["difference"] = cell(other, "difference", "difference_low", "difference_high")
        rows.append(row)
    note = (
        f"SmolLM2-135M, {args.method}, {len(facts)} real facts that it recalls, at once; "
        f"collateral: the {len(others)} others. Per cent, 95 % bootstrap intervals over facts, "
        f"differences paired. Mean loss of the targets (nats): "
        + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
        + f". {where()}."
    )
    name = f"fast_preset_{args.method.lower()}.md"
    for folder in [out, *([RESULTS] if args.record else [])]:
        (folder / name).write_text(f"{markdown(pd.DataFrame(rows))}\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
