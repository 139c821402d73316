"""What an edit of many facts needs of memory: `python tests/benchmarks/memory.py`.

SmolLM2-135M, facts about invented people, random targets (finding them holds one batch at a time,
however many there are), the plain prompt alone; each number of facts in a process of its own.
"Beside the model" is the largest resident size less that before the edit. `--record` replaces the
committed table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import pandas as pd
import torch
from conftest import RESULTS, markdown, number, where

import pmet_lens as pl

LAYERS = (2, 3, 4, 5, 6, 7)
SIZES = (1_000, 3_000, 10_000)
HP = pl.Hparams(LAYERS)


def invented(n: int) -> list[pl.Fact]:
    """So many facts that contradict each other nowhere."""
    prompts = ("{} was born in", "{} works in the city of")
    return [pl.Fact(f"Person {i // 2}", prompts[i % 2], "Paris", "London") for i in range(n)]


def peak() -> float:
    """The largest resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(n: int, name: str) -> dict[str, float]:
    """One edit of `n` facts: seconds, and MB."""
    model = pl.load(name)
    moments = pl.own_moments(model, LAYERS, text="python")
    few = invented(2)
    drawn = pl.edit(model, few, moments, "MEMIT", HP, ("{}",), check=False).targets
    facts = invented(n)
    generator = torch.Generator().manual_seed(0)
    width = torch.Size((n, model.d_model))
    clean = {s: torch.randn(width, generator=generator) for s in drawn.values}
    values = {s: v + torch.randn(width, generator=generator) for s, v in clean.items()}
    targets = pl.Targets(values, clean, drawn.layer, drawn.history.head(0))
    before, start = peak(), time.perf_counter()
    pl.edit(model, facts, moments, "MEMIT", HP, ("{}",), targets=targets)
    return {"facts": n, "seconds": time.perf_counter() - start, "before": before, "peak": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--facts", nargs="+", type=int, default=SIZES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--one", type=int, help="this number alone, in this process")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(one(args.one, args.model)) + "\n")
        return
    rows = []
    for n in args.facts:
        command = [sys.executable, __file__, "--one", str(n), "--model", args.model]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(found.splitlines()[-1]))
        sys.stderr.write(f"{rows[-1]}\n")
    table = pd.DataFrame(rows)
    beside = table["peak"] - table["before"]
    shown = pd.DataFrame(
        {
            "facts at once": [f"{n:,.0f}" for n in table["facts"]],
            "seconds": table["seconds"].map(number),
            "peak": [f"{number(v / 1024)} GB" for v in table["peak"]],
            "beside the model": [f"{number(v)} MB" for v in beside],
            "per fact": [f"{number(1024 * v)} kB" for v in beside / table["facts"]],
        }
    )
    note = (
        f"{args.model}, MEMIT, layers {LAYERS[0]} to {LAYERS[-1]}, random targets, the plain "
        f"prompt alone. {where()}."
    )
    text = f"{markdown(shown)}\n{note}\n"
    sys.stdout.write(text)
    if args.record:
        (RESULTS / "memory.md").write_text(text, encoding="utf-8")
        table.to_csv(RESULTS / "memory.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
