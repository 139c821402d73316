"""What a session on a real model waits for, at the sizes that people use.

`python tests/benchmarks/session.py` measures every row once or more on SmolLM2-135M, two on
Gemma-3-270M, and one optimisation step at the shape of Llama-3.2-1B in bfloat16; each model in a
process of its own, and the row is written to `out/session.md` as soon as it is there (`--record`:
also to `results/`). `--only WORD` takes the rows whose name holds the word, `--tiny` one step at a
tiny shape. Models that are not fetched are left out, in words.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from conftest import RESULTS, markdown, number, where
from waits import LAYERS, peak

import pmet_lens as pl
from pmet_lens.data.downloads import cache
from pmet_lens.moments.python_text import python_text

TOKENS = 15_000
"""About ten per dimension of a key of SmolLM2 (1,536)."""
SMOLLM2, GEMMA, BILLION = "smollm2-135m", "gemma-3-270m", "Llama-3.2-1B, random, bfloat16"
Work = Callable[[int], object]
"""A row, for the number of its round."""
Row = tuple[str, str, Work, int]
"""What is waited for, what was wanted of it, the work, and how many rounds."""


def smollm2() -> Iterator[Row]:
    """The rows of SmolLM2, each with what the ones before it made."""
    model = pl.load(SMOLLM2)
    known = pl.recalled(model)
    facts, hparams = known[:20], pl.Hparams(LAYERS)
    kept: dict[str, Any] = {}

    def prefixes(round_: int) -> None:
        kept["contexts"] = pl.sample_contexts(model, seed=round_)

    def moments(_: int) -> None:
        texts = python_text()
        how: dict[str, Any] = {"projections": ("mlp",), "n_tokens": TOKENS}
        kept["moments"] = pl.second_moments(model, texts, LAYERS, **how)

    def edit(some: list[pl.Fact], how: pl.Hparams = hparams) -> None:
        pl.edit(model, some, kept["moments"], "PMET", how, kept["contexts"])

    yield "sample context prefixes", "≤ 2 s", prefixes, 3
    yield f"second moments of {TOKENS:,} tokens, six layers", "", moments, 1
    yield "edit one fact, PMET", "≤ 4 s", lambda i: edit(known[20 + i : 21 + i]), 2
    yield "edit one fact, PMET, fast", "", lambda i: edit(known[20 + i : 21 + i], hparams.fast()), 2
    yield "edit 20 facts at once, PMET", "counted", lambda _: edit(facts), 1
    yield "edit 20 facts at once, PMET, fast", "", lambda _: edit(facts, hparams.fast()), 1
    yield "be told settings, from 24 facts", "≤ 45 s", lambda _: pl.suggest_hparams(
        model, known[:24]
    ), 1  # fmt: skip
    yield "causal trace of 10 facts, every place and layer", "", lambda _: pl.causal_trace(
        model, known[:10]
    ), 1  # fmt: skip
    yield "lens on 8 facts, all streams and layers", "≤ 3 s", lambda _: pl.lens(model, known[:8]), 3
    yield "component similarity, 50 facts", "counted", lambda _: pl.component_similarity(
        model, known[:50]
    ), 1  # fmt: skip
    yield "general ability, texts, prompts and facts by default", "≤ 30 s", lambda _: (
        pl.general_ability(model)
    ), 1  # fmt: skip
    yield "evaluate 50 facts", "counted", lambda _: pl.evaluate(model, known[:50]), 1
    yield "ask 50 facts", "counted", lambda _: pl.recall(model, known[:50]), 3
    yield "variance split, all facts it recalls", "counted", lambda _: pl.variance_split(
        model, known
    ), 1  # fmt: skip
    yield "patch components between 40 pairs", "counted", lambda _: pl.transfer(
        model, known, n_pairs=40
    ), 1  # fmt: skip
    yield "write 54 tokens", "≤ 1.1 × transformers", lambda i: pl.generate(
        model, "The capital of France is", length=54, seed=i
    ), 5  # fmt: skip
    ids = model.tokenizer("The capital of France is", return_tensors="pt")
    yield "the same by transformers' generate", "", lambda _: model.hf.generate(
        **ids, do_sample=True, top_k=5, max_new_tokens=49, min_new_tokens=49
    ), 5  # fmt: skip


def gemma() -> Iterator[Row]:
    """The rows that were slow on Gemma."""
    model = pl.load(GEMMA)
    known = pl.recalled(model, n=10)
    yield "Gemma: causal trace of 10 facts, every place and layer", "≤ 30 s", lambda _: (
        pl.causal_trace(model, known)
    ), 1  # fmt: skip
    yield "Gemma: lens on 8 facts, all streams and layers", "≤ 8 s", lambda _: pl.lens(
        model, known[:8]
    ), 3  # fmt: skip


def billion(tiny: bool = False) -> Iterator[Row]:
    """One step of one fact, all prefixes, and the write into one layer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    shape |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    if tiny:
        shape |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048}
    config = LlamaConfig(**shape, head_dim=64, tie_word_embeddings=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        hf = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model = pl.load(hf, pl.load("world").tokenizer, name=BILLION)
    hparams = pl.Hparams((2,), n_steps=1, stop_loss=0.0, kl_stop=0.0)
    n = 3 * shape["intermediate_size"]
    kept: dict[str, Any] = {}

    def moments(_: int) -> None:
        how: dict[str, Any] = {"projections": ("mlp",), "n_tokens": n}
        kept["moments"] = pl.second_moments(model, python_text(), hparams.layers, **how)

    def step(_: int) -> None:
        contexts = pl.sample_contexts(pl.load("world"))
        pl.edit(model, pl.counterfact(n=1), kept["moments"], "PMET", hparams, contexts)

    yield f"Llama-3.2-1B's shape in bfloat16: moments of {n:,} tokens, one layer", "", moments, 1
    yield "the same: edit one fact, one step", "≤ 16 GB", step, 1


MODELS = {SMOLLM2: smollm2, GEMMA: gemma, BILLION: billion}


def measure(model: str, only: str, tiny: bool) -> None:
    """The rows of one model, a line of JSON each on standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    rows = billion(tiny) if model == BILLION else MODELS[model]()
    for what, wanted, work, rounds in rows:
        if only not in what and not what.startswith(("sample", "second", "Llama")):
            continue  # those that others need are always made
        peak(reset=True)
        times = []
        for round_ in range(rounds):
            start = time.perf_counter()
            work(round_)
            times.append(time.perf_counter() - start)
        row = {"what": what, "here": f"{number(statistics.median(times))} s"}
        row |= {"rounds": rounds, "wanted": wanted, "memory": f"{number(peak() / 1024)} GB"}
        answers.write(json.dumps(row) + "\n")
        answers.flush()


def first_answers() -> Iterator[dict[str, Any]]:
    """From `pl.load` to an edited answer, with a cache of nothing but the model, and again."""
    script = Path(__file__).with_name("first_answer.py")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(cache() / "models" / SMOLLM2, Path(folder) / "models" / SMOLLM2)
        env = {**os.environ, "PMET_LENS_CACHE": folder}
        walks = (("first", "≤ 60 s", ""), ("second", "≤ 20 s", ""), ("third", "", "--fast"))
        for what, wanted, how in walks:
            command = [sys.executable, str(script), *how.split()]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            row = {"what": f"from load to an edited answer, the {what} time on this model"}
            row["what"] += ", fast" if how else ""
            row |= {"here": f"{number(found['all'])} s", "rounds": 1, "wanted": wanted}
            yield row | {"memory": f"{number(found['peak, GiB'])} GB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    parser.add_argument("--tiny", action="store_true", help="the last model at a tiny shape, alone")
    parser.add_argument("--record", action="store_true", help="replace the committed table")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        return measure(args.model, args.only, args.tiny)
    here = pl.available_models().set_index("name")["here"]
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        text = markdown(pd.DataFrame(rows)) + f"\n{where()}.\n"
        for folder in [RESULTS.parent / "out", *([RESULTS] if args.record else [])]:
            folder.mkdir(exist_ok=True)
            (folder / "session.md").write_text(text, encoding="utf-8")
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()

    if here[SMOLLM2] and not args.only and not args.tiny:
        for row in first_answers():
            keep(row)
    for model in (BILLION,) if args.tiny else MODELS:
        if not here.get(model, True):
            sys.stderr.write(f"{model} is not here: pmet-lens models --fetch {model}\n")
            continue
        command = [sys.executable, __file__, "--model", model, "--only", args.only]
        command += ["--tiny"] * args.tiny
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                keep(json.loads(line))
        if process.returncode:
            parser.exit(1, f"{model} stopped with {process.returncode}.\n")


if __name__ == "__main__":
    main()
