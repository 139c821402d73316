"""GPT-J-6B's shapes with random weights: what the paper's main row costs on one GPU.

`python tests/benchmarks/gptj_shapes.py` measures targets, second moments, solve and evaluation per
second, the plain procedure beside them in the same run, the effect of bf16 on the targets, and the
peak memory; writes `out/gptj_shapes.md`, with `--record` also `results/`. `--tiny --device cpu`
tries all of it at a small shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import plain
import subjects
import torch
from conftest import RESULTS, markdown, number, wait, where

import pmet_lens as pl
from pmet_lens.editing import targets
from pmet_lens.editing.solvers import Dense, Ridge
from pmet_lens.plans import costs

ROUNDS = 5


def gptj(device: torch.device, dtype: torch.dtype, tiny: bool) -> pl.Model:
    """The configuration of EleutherAI/gpt-j-6b, built and filled on the device."""
    from transformers import GPTJConfig, GPTJForCausalLM

    shape = {"n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}
    if tiny:
        shape = {"n_embd": 64, "n_layer": 12, "n_head": 4, "vocab_size": 2048, "rotary_dim": 8}
        shape |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            hf = GPTJForCausalLM(GPTJConfig(**shape)).eval()
    finally:
        torch.set_default_dtype(before)
    return pl.load(hf, pl.load("world").tokenizer, name="gpt-j-6b")


def median(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Seconds."""
    times = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--facts", type=int, default=500)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "There is no GPU here; `--device cpu --tiny` tries the script.\n")
    n = 8 if args.tiny else args.facts
    model = gptj(device, torch.float32 if args.tiny else torch.bfloat16, args.tiny)
    hp = pl.Hparams(
        layers=(3, 4, 5, 6, 7, 8), n_steps=3 if args.tiny else 30, stop_loss=0.0, kl_stop=0.0
    )
    contexts = pl.sample_contexts(pl.load("world"))
    facts = (pl.counterfact() * (1 + n // 750))[:n]
    rows: list[dict[str, str]] = []

    def row(what: str, slow: float, fast: float, unit: str, load: str) -> None:
        told = {"what": what, "plain": f"{number(slow)} {unit}", "here": f"{number(fast)} {unit}"}
        rows.append({**told, "ratio": f"{fast / slow:.1f}", "the paper's load": load})

    print(costs.estimate(model, facts, pl.PMET, hp, contexts, n_facts=10_000))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    one = subjects.plainly(model, hp, contexts)
    slow = 1 / median(lambda: one(facts[0]), device, 3)
    took = median(lambda: targets.optimise(model, facts, pl.PMET, hp, contexts), device, 1)
    row("targets", slow, n / took, "per second", f"10,000 in {10_000 * took / n / 60:.1f} min")

    texts = [f.text + " " + (f.target_true or "") for f in pl.counterfact()] * 20
    tokens = 500 if args.tiny else 16_384
    sites = [pl.Site(layer, "mlp") for layer in hp.layers]
    batch = plain.padded(
        [model.tokenizer(text)["input_ids"] for text in texts[:50]], model.tokenizer.pad_token_id
    )
    modules = [subjects.module(model, site) for site in sites]
    slow = median(
        lambda: [plain.moment(model.hf, m, [batch], torch.float32) for m in modules], device
    )
    found: dict[pl.Site, pl.Moment] = {}

    def moments() -> None:
        found.clear()
        found.update(
            pl.second_moments(
                model, texts, hp.layers, projections=("mlp",), n_tokens=tokens,
                batch_tokens=16_384, dtype=torch.float32,
            )
        )  # fmt: skip

    took = median(moments, device, 1)
    load = f"163,840 in {163_840 / tokens * took / 60:.1f} min"
    row("second moments", int(batch[1].sum()) / slow, tokens / took, "tokens per second", load)

    d_in = model.d_in(sites[0])
    C = torch.eye(d_in, dtype=torch.float64, device=device) + 0.01
    K = torch.randn(100, d_in, dtype=torch.float64, device=device)
    R = torch.randn(100, model.d_model, dtype=torch.float64, device=device)
    factor = Ridge(6000.0).factorise(Dense(C))
    factor.factors(K, R)
    slow = median(lambda: plain.solve(C, K, R, 6000.0), device, 3)
    fast = median(lambda: factor.factors(K, R), device)
    row(f"solve of 100 facts, d_in {d_in:,}, factor kept", 1 / slow, 1 / fast, "per second", "")

    few = facts[: 8 if args.tiny else 200]
    slow = median(lambda: plain.record(model.hf, model.tokenizer, few[0]), device)
    took = median(lambda: pl.evaluate(model, few), device, 3)
    load = f"10,000 in {10_000 * took / len(few) / 60:.1f} min"
    row("evaluation", 1 / slow, len(few) / took, "records per second", load)

    exact = gptj(device, torch.float32, args.tiny)
    some = facts[:8]
    full = targets.optimise(exact, some, pl.PMET, replace(hp, n_steps=10), contexts)
    half = targets.optimise(model, some, pl.PMET, replace(hp, n_steps=10), contexts)
    off = [
        float((full.delta(s) - half.delta(s).to(full.delta(s))).norm() / full.delta(s).norm())
        for s in full.values
    ]
    note = "Random weights of GPT-J-6B's shapes, so no fact stops early. "
    note += "The deltas of 8 facts after 10 steps in bf16 differ from those in float32 by "
    note += " and ".join(f"{100 * x:.0f} %" for x in off) + ". "
    if device.type == "cuda":
        note += f"Peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB. "
    folders = [RESULTS.parent / "out", *([RESULTS] if args.record else [])]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        text = markdown(pd.DataFrame(rows)) + f"\n{note}{where()}.\n"
        Path(folder / "gptj_shapes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
