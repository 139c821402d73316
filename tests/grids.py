"""Grids of a few facts on a tiny random model, for the tests of the engines."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_hf, tiny_tokenizer

import pmet_lens as pl

FACTS = tuple(pl.counterfact(n=6))
OTHERS = tuple(pl.knowns()[-20:])
HP = pl.Hparams(layers=(1, 2), n_steps=4).settled()
CUT = pl.Cut(targets=2, answers=3, others=8, tokens=500)
"""3 shards of targets, 3 of the text, 2 of the answers."""


def saved_model(folder: Path, seed: int = 0) -> str:
    """A directory with a tiny random GPT-2 in float64."""
    tiny_hf("gpt2", torch.float64, seed, positions=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    words = [
        "the",
        "tower",
        "of",
        "a",
        "city",
        "plays",
        "in",
        "French",
        "while",
        "its",
        "mother",
        "stands",
        "at",
        "the",
        "harbour",
    ]
    lines = [" ".join(words[i % 7 : 5 + (i * i) % 11]) + f" of {i}." for i in range(900)]
    (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def tiny_run(model: str, **changes: object) -> pl.Run:
    """PMET on six facts, cut into small shards."""
    texts = Path(model) / "texts.txt"  # the text about the world takes seconds to begin
    own = {"texts": str(texts)} if texts.exists() else {}
    own |= {"facts": FACTS, "hparams": HP, "n_tokens": 1500, "cut": CUT, "dtype": "float64"}
    return pl.Run(model, **{**own, **changes})


def tiny_grid(model: str) -> list[pl.Run]:
    """Two methods, and the model as it is."""
    unedited = tiny_run(model, method=None, hparams=None)
    memit = tiny_run(model, method="MEMIT", metrics=("answers", "collateral"), others=OTHERS)
    return [tiny_run(model), memit, unedited]
