"""What many tests need and none changes: models, made once in a process."""

from __future__ import annotations

from functools import cache

import torch
from cases import bits, unchanged
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.models.model import Model


def shared_model(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, seed: int = 0, **config: int
) -> Model:
    """`tiny_model` for tests that leave it as it was."""
    return _as_it_was(*_tiny(family, dtype, seed, **config))


def bundled(name: str) -> Model:
    """The same of a bundled model."""
    return _as_it_was(*_loaded(name))


def _as_it_was(model: Model, before: dict[str, torch.Tensor], words: str) -> Model:
    intact = unchanged(model, before) and words == _words(model)
    assert intact, f"a test before this one left {model.name!r} changed"
    return model


def _words(model: Model) -> str:
    return f"{model.name} {model.tokenizer!r}"


@cache
def _tiny(*which: object, **config: int) -> tuple[Model, dict[str, torch.Tensor], str]:
    model = tiny_model(*which, **config)
    return model, bits(model), _words(model)


@cache
def _loaded(name: str) -> tuple[Model, dict[str, torch.Tensor], str]:
    model = pl.load(name)
    return model, bits(model), _words(model)
