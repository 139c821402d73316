"""Ctrl-C, wherever it comes, leaves the model whole: weights, hooks, blocks, what learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import CONTEXTS, FACTS, HP, bits, some_moments, unchanged
from kept import shared_model
from tiny import N_LAYERS
from torch.nn.modules import module

import pmet_lens as pl
from pmet_lens.editing import keys
from pmet_lens.editing.solvers import Ridge

torch.set_num_threads(1)
TIMES = 3
"""Interrupts of each kind of work, from its first module to its last."""
KNOWN = [pl.Fact(f.subject, f.prompt, None, f.target_new, relation="P1") for f in FACTS]


@pytest.fixture(scope="module")
def model() -> pl.Model:
    return shared_model("llama", positions=96)


@contextmanager
def interrupted(at: int | None) -> Iterator[list[int]]:
    """A block in which the `at`-th module that is run is not; counts them."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt

    handle = module.register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def edited(model: pl.Model) -> pl.Edit:
    return pl.edit(model, FACTS, some_moments(model), "PMET", HP, CONTEXTS)


def with_an_edit_on(model: pl.Model) -> None:
    with edited(model).applied(model):
        pl.general_ability(model, texts=["Kel is open"], prompts=["Kel is"], others=KNOWN)


WORK: dict[str, Callable[[pl.Model], object]] = {
    "edit": edited,
    "edits": lambda model: pl.edit_sequentially(
        model, FACTS, some_moments(model), "MEMIT", HP, CONTEXTS
    ),
    "an edit on": with_an_edit_on,
    "moments": lambda model: pl.second_moments(model, ["Kel is open"], [1], n_tokens=3),
    "text": lambda model: next(pl.sampled_texts(model, length=6, batch_tokens=60)),
    "trace": lambda model: pl.causal_trace(model, KNOWN, layers=[1]),
    "lens": lambda model: pl.lens(model, KNOWN, layers=[1]),
}


@pytest.mark.parametrize("work", WORK)
def test_ctrl_c_in_any_forward_pass(model, work):
    WORK[work](model)  # shortened models are made and kept
    before = bits(model)
    with interrupted(None) as calls:
        WORK[work](model)
    for at in torch.linspace(1, calls[0], TIMES).long().tolist():
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            WORK[work](model)
        assert unchanged(model, before), at
        assert not len(model.live_edits)
        assert all(p.requires_grad for p in model.hf.parameters())
        assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())
        assert len(model.bridge.blocks) == len(model._plain.model.model.layers) == N_LAYERS
    said = pl.evaluate(model, FACTS)
    assert said.equals(pl.evaluate(shared_model("llama", positions=96), FACTS))


@pytest.mark.parametrize("where", [(keys.Reader, "both"), (Ridge, "factorise")])
def test_ctrl_c_between_two_layers_that_are_written(model, monkeypatch, where):
    before, real, calls = bits(model), getattr(*where), []

    def second(*args):
        calls.append(1)
        if len(calls) == 2:
            assert not unchanged(model, before)  # the first layer has its change
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(*where, second)
    with pytest.raises(KeyboardInterrupt):
        edited(model)
    assert unchanged(model, before)
