"""What `pl.plan` says, and what was so: three grids planned, run and timed; and, counted only, what
10,000 edits on GPT-J-6B, GPT-NeoX-20B and Llama-3 cost on 1, 8 and 64 GPUs.

`python figures/plan.py` writes `figures/out/plan.md` and its CSVs, with `--record` also
`figures/results/`. Some minutes on two cores, most of them the three grids. `--facts FILE --texts
FILE` plans and runs 1,000 edits at once of SmolLM2-135M instead, whose row joins those of before.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from common import HERE, OUT, provenance

import pmet_lens as pl
from pmet_lens import data, experiments
from pmet_lens.plans import Sizes, clock

PEAK, SHARE = 989e12, 0.3
"""bfloat16 FLOP/s of an H100 (SXM) by its data sheet, and the share of it reached: 227 PFLOP of
targets in 757 s with GPT-J's shapes (`tests/benchmarks/results/gptj_shapes.md`) are 30 %."""
SOLVER, SOLVER_SHARE = 67e12, 0.5
"""The same of float64 (tensor cores), for second moments, factors and solves; assumed."""
DISK = 1e9
"""Bytes per second assumed of a shared disk."""
CARD = 80e9
"""Bytes of memory of such a card."""
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """Of a large model, as published."""

    layers: int
    d_model: int
    vocabulary: int
    d_mlp: int
    kv: float = 1.0
    """Heads of keys and values per head of queries."""
    gated: bool = False
    """Whether the MLP has a third matrix (SwiGLU)."""

    @property
    def mlp(self) -> int:
        """Parameters of a block's MLP."""
        return (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return round((2 + 2 * self.kv) * self.d_model**2) + self.mlp


LARGE = {
    "gpt-j-6b": Shape(28, 4096, 50400, 16384),
    "gpt-neox-20b": Shape(44, 6144, 50432, 24576),
    "llama-3-8b": Shape(32, 4096, 128256, 14336, 0.25, True),
    "llama-3-70b": Shape(80, 8192, 128256, 28672, 0.125, True),
}
REAL, REAL_LAYERS, EDITS = "smollm2-135m", (2, 3, 4, 5, 6, 7), 1_000
"""The real model that is planned and run, its critical layers, and facts at once."""
Grids = dict[str, tuple[list[pl.Run], str, int]]
"""Name → runs, engine, workers."""
LAYERS = {"llama-3-8b": (4, 5, 6, 7, 8), "llama-3-70b": (10, 11, 12, 13, 14)}
"""Of the Llamas, for which there are no released settings of PMET; those of the larger one are a
guess, a sixth of the way up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    parser.add_argument("--large-only", action="store_true", help="count, and run nothing")
    parser.add_argument("--facts", type=Path, help="records to edit SmolLM2-135M with")
    parser.add_argument("--texts", type=Path, help="text of its second moments, one a line")
    args = parser.parse_args()
    if (args.facts is None) != (args.texts is None):
        parser.error("--facts and --texts go together")
    real = args.facts is not None
    if not real:
        torch.set_num_threads(1)
    start = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    if real:
        of_real(args.facts, args.texts).to_csv(OUT / "plan.csv", index=False)
    elif not args.large_only:
        compared(grids()).to_csv(OUT / "plan.csv", index=False)
    counted().to_csv(OUT / "plan_large.csv", index=False)
    made = provenance((time.perf_counter() - start) / 60)
    if args.large_only:
        made = f"What is counted: {made} The grids above were run before."
    if real:
        made = f"The row of {REAL}, and what is counted: {made} The other grids were run before."
    text = page(OUT, made)
    (OUT / "plan.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    if args.record:
        for name in ("plan.csv", "plan_large.csv", "plan.md"):
            with data.whole(HERE / "results" / name) as part:
                part.write_bytes((OUT / name).read_bytes())


def grids() -> Grids:
    """Those of the bundled models."""
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


def of_real(facts: Path, texts: Path) -> pd.DataFrame:
    """The row of 1,000 edits at once of a real model, with the committed ones of the others."""
    model = pl.load(REAL)
    records = pl.editable(model, pl.read_facts(facts))[:EDITS]
    run = pl.Run(
        REAL,
        tuple(records),
        pl.PMET,
        pl.Hparams(REAL_LAYERS).settled(pl.PMET, len(records)).fast(),
        texts=str(texts),
        n_tokens=16_000,
    )
    name = f"{len(records):,} edits at once of {REAL}, fast steps"
    new = compared({name: ([run], "serial", 1)})
    old = pd.read_csv(HERE / "results" / "plan.csv")
    return pd.concat([old[~old["grid"].str.contains(REAL)], new], ignore_index=True)


def compared(grids: Grids) -> pd.DataFrame:
    """Every grid planned, then run in an empty folder."""
    rows = []
    for name, (grid, engine, workers) in grids.items():
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
        hparams = pl.Hparams(LAYERS[name]).settled(pl.PMET) if name in LAYERS else None
        run = pl.Run(name, facts, pl.PMET, hparams, n_tokens=10_000_000, cut=pl.Cut(tokens=625_000))
        d = shape.d_model
        sizes = Sizes(
            blocks=(shape.block,) * shape.layers,
            last_mlp=shape.mlp,
            embedding=shape.vocabulary * d,
            d_model=d,
            d_in={"attn": d, "mlp": shape.d_mlp},
            weights=2 * (shape.block * shape.layers + 2 * shape.vocabulary * d),
        )
        told = pl.plan([run], rates=seconds, stand_in=(small(name, shape), sizes))
        own = told.table.set_index("kind")
        row = {"model": name, "edits": len(facts), "PFLOP": round(told.operations / 1e15, 1)}
        for kind in ("part", "targets", "edit", "answers"):
            row[f"PFLOP_{kind}"] = round(own.loc[kind, "operations"] / 1e15, 2)
        row["cards"] = cards = math.ceil(told.memory / CARD)
        for n in GPUS:
            hours = told.seconds(n // cards) / 3600 if n >= cards else math.nan
            row[f"hours_{n}_gpus"] = round(hours, 2)
        row["memory_GB"] = round(told.memory / 1e9, 1)
        row["disk_GB"] = round(told.disk / 1e9, 1)
        row["disk_most_GB"] = round(told.disk_most / 1e9, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def small(name: str, shape: Shape) -> pl.Model:
    """A model of the same family and depth, narrow, with the bundled tokenizer."""
    import transformers as hf

    torch.manual_seed(0)  # what its blocks allow is tried out, and rounds
    tokenizer = pl.load("world").tokenizer
    own = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    wide = {"hidden_size": 32, "num_hidden_layers": shape.layers, "num_attention_heads": 4}
    wide |= {"intermediate_size": 128}
    if name == "gpt-j-6b":
        own |= {"n_embd": 32, "n_layer": shape.layers, "n_head": 4, "rotary_dim": 4}
        made = hf.GPTJForCausalLM(hf.GPTJConfig(**own))
    elif shape.gated:
        made = hf.LlamaForCausalLM(hf.LlamaConfig(**own, **wide))
    else:
        made = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**own, **wide))
    return pl.load(made.to(torch.bfloat16).eval(), tokenizer, name=name)


def page(folder: Path, made: str) -> str:
    """Both tables with what has to be known about them."""
    text = "# What `pl.plan` says\n\n"
    if (folder / "plan.csv").exists():
        text += "Grids on the bundled models and one real one, each planned with a short probe, "
        text += "then run in an empty folder; seconds and MB. With Ray the workers themselves "
        text += "probe, all at the same time, and the time they take to start is in the estimate. "
        text += "A plan is of an empty folder, and of a machine as busy as while it was probed.\n\n"
        text += markdown(pd.read_csv(folder / "plan.csv")) + "\n"
    large = pd.read_csv(folder / "plan_large.csv")
    text += "## 10,000 edits on large models: counted, not measured\n\n"
    text += "PMET with the published settings, 10 million tokens for the second moments, every "
    text += "fact to its last step (facts that stop early make it cheaper), answers asked as in "
    text += "CounterFact. Tokens are those of the bundled records under the bundled tokenizer; "
    text += "sizes are the published ones (Llama's critical layers are a guess). The hours are "
    text += f"**not measured**: they take {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s (bfloat16, the "
    text += "data sheet of an H100) for forward and backward passes, which is what one H100 "
    text += "reached with GPT-J's shapes (`tests/benchmarks/results/gptj_shapes.md`), and assume "
    text += f"{SOLVER_SHARE:.0%} of {SOLVER / 1e12:.0f} TFLOP/s (float64) for second moments, "
    text += f"factors and solves, and {DISK / 1e9:.0f} GB/s of disk. One edit of all facts is "
    text += "solved by one worker while the others wait; that, and the sums of the second "
    text += "moments, is why 64 GPUs are not 64 times as fast as one. "
    text += "Memory is what a worker needs at most, generously; the column *cards* tells how many "
    text += "of 80 GB a worker is spread over (`device_map`), one after the other, so that a "
    text += "machine of n cards has n / cards workers: what breaks first is the memory of a card, "
    text += "then, with many workers, the one that solves while the others wait.\n\n"
    text += markdown(large)
    for row in large.to_dict("records"):
        fit = [n for n in GPUS if n >= row["cards"]]
        told = ", ".join(f"{clock(3600 * row[f'hours_{n}_gpus'])} on {n}" for n in fit)
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
