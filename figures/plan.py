"""What `pl.plan` says, and what was so: three grids planned, run and timed; and, counted only, what
10,000 edits on GPT-J-6B and GPT-NeoX-20B cost on 1, 8 and 64 GPUs.

`python figures/plan.py` writes `figures/out/plan.md` and its CSVs, with `--record` also
`figures/results/`. Some minutes on two cores, most of them the three grids.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from common import HERE, OUT, provenance

import pmet_lens as pl
from pmet_lens import data, experiments
from pmet_lens.plans import Sizes, clock

PEAK, SHARE = 312e12, 0.3
"""bfloat16 FLOP/s of an A100 by its data sheet, and the share of it assumed to be reached."""
SOLVER, SOLVER_SHARE = 19.5e12, 0.5
"""The same of float64 (tensor cores), for second moments, factors and solves."""
DISK = 1e9
"""Bytes per second assumed of a shared disk."""
GPUS = (1, 8, 64)
LARGE = {
    "gpt-j-6b": {"layers": 28, "d_model": 4096, "vocab": 50400, "kind": "gptj"},
    "gpt-neox-20b": {"layers": 44, "d_model": 6144, "vocab": 50432, "kind": "neox"},
}
"""Published shapes; both have blocks of 12 d² parameters and keys of 4 d."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    parser.add_argument("--large-only", action="store_true", help="count, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    if not args.large_only:
        compared().to_csv(OUT / "plan.csv", index=False)
    counted().to_csv(OUT / "plan_large.csv", index=False)
    text = page(OUT, provenance((time.perf_counter() - start) / 60))
    (OUT / "plan.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if args.record:
        for name in ("plan.csv", "plan_large.csv", "plan.md"):
            with data.whole(HERE / "results" / name) as part:
                part.write_bytes((OUT / name).read_bytes())


def grids() -> dict[str, tuple[list[pl.Run], str, int]]:
    """Name → runs, engine, workers."""
    facts = tuple(pl.counterfact(n=60))
    others = tuple(experiments.others_of(pl.knowns(), facts)[:500])
    both, own = ("answers", "collateral"), {"n_tokens": 50_000}
    methods = [
        pl.Run("world", facts, m, metrics=both, others=others, **own)
        for m in ("PMET", "MEMIT", None)
    ]
    known = pl.HPARAMS["world-sequential"]["PMET"]
    weights = [
        pl.Run(
            "world-sequential",
            facts[:40],
            n_tokens=20_000,
            hparams=replace(known, second_moment_weight=weight),
            name=f"λ = {weight:g}",
        )
        for weight in (10.0, 100.0, 1000.0)
    ]
    loads = [
        pl.Run("world", tuple(pl.counterfact(n=n)), m, cut=pl.Cut(25, 50, tokens=10_000), **own)
        for n in (25, 100)
        for m in ("PMET", "AlphaEdit", "FT-W")
    ]
    return {
        "methods on world": (methods, "serial", 1),
        "λ on world-sequential": (weights, "serial", 1),
        "loads on world": (loads, "ray", 2),
    }


def compared() -> pd.DataFrame:
    """Every grid planned, then run in an empty folder."""
    rows = []
    for name, (grid, engine, workers) in grids().items():
        begin = time.perf_counter()
        told = pl.plan(grid, workers=workers, engine=engine)
        probed = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            pl.run(grid, folder, engine, workers=workers if engine == "ray" else None)
            took = time.perf_counter() - begin
            results = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        rows.append(
            {
                "grid": name,
                "runs": len(grid),
                "engine": engine,
                "workers": workers,
                "probe_s": round(probed, 1),
                "estimate_s": round(told.seconds(), 1),
                "real_s": round(took, 1),
                "real_over_estimate": round(took / told.seconds(), 2),
                "disk_estimate_MB": round(told.disk / 1e6, 1),
                "disk_real_MB": round(results / 1e6, 1),
                "memory_MB": round(told.memory / 1e6),
                "TFLOP": round(told.operations / 1e12, 2),
            }
        )
    return pd.DataFrame(rows)


def seconds(kind: str, operations: float, exact: float) -> float:
    """Of a shard on one GPU, assumed: nothing here was measured."""
    disk = 10 * operations / DISK if kind == "moments" else 0.0  # 8 bytes a number, and written
    return disk + (operations - exact) / (PEAK * SHARE) + exact / (SOLVER * SOLVER_SHARE)


def counted() -> pd.DataFrame:
    """10,000 edits at once by PMET with the published settings, counted on a model of the same
    depth and a small width, with the tokens of the bundled records."""
    known = pl.counterfact()
    facts = tuple(
        replace(f, subject=f"{f.subject} {i}", case_id=None) if i else f
        for i in range(14)
        for f in known
    )[:10_000]
    rows = []
    for name, shape in LARGE.items():
        run = pl.Run(name, facts, pl.PMET, n_tokens=10_000_000, cut=pl.Cut(tokens=625_000))
        d, layers = shape["d_model"], shape["layers"]
        sizes = Sizes(
            blocks=(12 * d * d,) * layers,
            last_mlp=8 * d * d,
            embedding=shape["vocab"] * d,
            d_model=d,
            d_in={"attn": d, "mlp": 4 * d},
            weights=2 * (12 * d * d * layers + 2 * shape["vocab"] * d),
        )
        told = pl.plan([run], rates=seconds, stand_in=(small(name, shape), sizes))
        own = told.table.set_index("kind")
        row = {"model": name, "edits": len(facts), "PFLOP": round(told.operations / 1e15, 1)}
        for kind in ("part", "targets", "edit", "answers"):
            row[f"PFLOP_{kind}"] = round(own.loc[kind, "operations"] / 1e15, 2)
        for n in GPUS:
            row[f"hours_{n}_gpus"] = round(told.seconds(n) / 3600, 2)
        row["memory_GB"] = round(told.memory / 1e9, 1)
        row["disk_GB"] = round(told.disk / 1e9, 1)
        row["disk_most_GB"] = round(told.disk_most / 1e9, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def small(name: str, shape: dict) -> pl.Model:
    """A model of the same family and depth, narrow, with the bundled tokenizer."""
    import transformers as hf

    tokenizer = pl.load("world").tokenizer
    own = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    if shape["kind"] == "gptj":
        own |= {"n_embd": 32, "n_layer": shape["layers"], "n_head": 4, "rotary_dim": 4}
        made = hf.GPTJForCausalLM(hf.GPTJConfig(**own))
    else:
        own |= {"hidden_size": 32, "num_hidden_layers": shape["layers"], "intermediate_size": 128}
        made = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**own, num_attention_heads=4))
    return pl.load(made.to(torch.bfloat16).eval(), tokenizer, name=name)


def page(folder: Path, made: str) -> str:
    """Both tables with what has to be known about them."""
    text = "# What `pl.plan` says\n\n"
    if (folder / "plan.csv").exists():
        text += "Three grids on the bundled models, each planned with a short probe, then run in "
        text += (
            "an empty folder; seconds and MB. With Ray the workers themselves probe, all at the "
        )
        text += "same time, and the time they take to start is in the estimate. A plan is of an "
        text += "empty folder, and of a machine as busy as while it was probed.\n\n"
        text += markdown(pd.read_csv(folder / "plan.csv")) + "\n"
    large = pd.read_csv(folder / "plan_large.csv")
    text += "## 10,000 edits on large models: counted, not measured\n\n"
    text += "PMET with the published settings, 10 million tokens for the second moments, every "
    text += "fact to its last step (facts that stop early make it cheaper), answers asked as in "
    text += "CounterFact. Tokens are those of the bundled records under the bundled tokenizer; "
    text += "sizes are the published ones. The hours are **not measured**: they assume "
    text += f"{SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s (bfloat16, the data sheet of an A100) for "
    text += f"forward and backward passes, {SOLVER_SHARE:.0%} of {SOLVER / 1e12:.1f} TFLOP/s "
    text += f"(float64) for second moments, factors and solves, and {DISK / 1e9:.0f} GB/s of "
    text += "disk. One edit of all facts is solved by one worker while the others wait; that, "
    text += "and the sums of the second moments, is why 64 GPUs are not 64 times as fast as one. "
    text += "Memory is what a worker needs at most, generously: more than 80 GB asks for two such "
    text += "GPUs per worker (`device_map`), which the hours leave out.\n\n"
    text += markdown(large)
    for row in large.to_dict("records"):
        told = ", ".join(f"{clock(3600 * row[f'hours_{n}_gpus'])} on {n}" for n in GPUS)
        text += f"\n{row['model']}: {told} (counted).\n"
    return text + f"\n{made}\n"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, columns and rows as they are."""
    columns = [str(c) for c in table.columns]
    lines = [columns, ["---"] * len(columns), *(map(str, r) for r in table.to_numpy().tolist())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
