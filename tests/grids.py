"""Grids of a few facts on a tiny random model, for the tests of the engines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.data.file_format import file_digest
from pmet_lens.experiments import worker
from pmet_lens.models.model import Model

FACTS = tuple(
    replace(fact, neighbours=fact.neighbours[:2], generation=fact.generation[:1])
    for fact in pl.counterfact(n=6)
)
OTHERS = tuple(pl.knowns()[-20:])
HP = pl.Hparams(layers=(1, 2), n_steps=3).settled()
_WORDS = re.findall(
    r"\w+", "the tower of a city plays in French while its mother stands at the harbour"
)
CUT = pl.Cut(targets=2, answers=3, others=8, tokens=500)
"""3 shards of targets, 3 of the text, 2 of the answers."""


def saved_model(folder: Path, seed: int = 0) -> str:
    """A directory with a tiny random GPT-2 in float64."""
    tiny_hf("gpt2", torch.float64, seed, positions=256).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    lines = [" ".join(_WORDS[i % 7 : 5 + (i * i) % 11]) + f" of {i}." for i in range(900)]
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


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Workers here read a model from its files once: they leave it as it was."""
    kept, load = {}, worker.load

    def kept_load(path: str, **how: object) -> Model:
        weights = Path(path) / "model.safetensors"
        key = (path, repr(how), weights.exists() and file_digest(weights))
        if key not in kept:
            kept[key] = load(path, **how)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "load", kept_load)
        yield
