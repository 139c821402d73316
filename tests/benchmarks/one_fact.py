"""Why one fact by the published steps takes what it takes: `python tests/benchmarks/one_fact.py`.

On SmolLM2-135M: the operations of a step, counted; how fast matrix products of as many rows as a
step has run here, and products of many rows; the seconds that the products of all steps take at
that rate; and what an edit took, products and all else. `--record` replaces the committed table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from typing import Any

import pandas as pd
import torch
from conftest import RESULTS, markdown, number, where
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from waits import LAYERS

import pmet_lens as pl

MANY = 1_024
"""Rows of a product that is large enough for the machine's best rate."""


def rate(model: pl.Model, rows: int) -> float:
    """Operations per second of the products of an MLP on so many rows. Each product takes the
    weights of another layer, as a step does, so that none of them is in the cache by luck."""
    weights = [model.weight(pl.Site(layer, "mlp")).clone() for layer in range(model.n_layers)]
    d_in, d_out = weights[0].shape
    a = torch.randn(rows, d_in, dtype=model.dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            torch.mm(a, weight)
        times.append(time.perf_counter() - start)
    return 2 * rows * d_in * d_out * len(weights) / statistics.median(times)


def rows_of_a_step(model: pl.Model, fact: pl.Fact, hparams: pl.Hparams) -> int:
    """The rows that most products with weights have while targets are found."""
    seen: Counter[int] = Counter()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear):
            seen[args[0][..., 0].numel()] += 1

    with register_module_forward_pre_hook(see):
        pl.optimise(model, [fact], pl.PMET, hparams)
    return seen.most_common(1)[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="replace the committed table")
    args = parser.parse_args()
    model = pl.load("smollm2-135m")
    facts, hparams = pl.recalled(model, n=4), pl.Hparams(LAYERS)
    moments = pl.own_moments(model, LAYERS, text="python")
    pl.sample_contexts(model)  # which a session samples once
    counted = pl.estimate(model, facts[:1], "PMET", hparams)
    tokens = rows_of_a_step(model, facts[0], hparams)
    few, many = rate(model, tokens), rate(model, MANY)
    times = []
    for fact in facts[1:]:
        start = time.perf_counter()
        pl.edit(model, fact, moments, "PMET", hparams)
        times.append(time.perf_counter() - start)
    found = {
        "operations of a step (GFLOP)": counted.step / 1e9,
        "layers above the edited ones": model.n_layers - 1 - LAYERS[-1],
        "rows of its products": tokens,
        "rate of such products (GFLOP/s)": few / 1e9,
        f"rate of {MANY:,} rows (GFLOP/s)": many / 1e9,
        f"products of {hparams.n_steps} steps at that rate (s)": hparams.n_steps
        * counted.step
        / few,
        "an edit (s)": statistics.median(times),
    }
    frame = pd.DataFrame({"what": list(found), "here": [number(v) for v in found.values()]})
    note = f"One fact of smollm2-135m, PMET, published steps; the edit: median of {len(times)}."
    for folder in [RESULTS.parent / "out", *([RESULTS] if args.record else [])]:
        folder.mkdir(exist_ok=True)
        text = f"{markdown(frame)}\n{note} {where()}.\n"
        (folder / "one_fact.md").write_text(text, encoding="utf-8")
    sys.stdout.write(markdown(frame))


if __name__ == "__main__":
    main()
