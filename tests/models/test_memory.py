"""A batch that does not fit is halved, with the same results, and it is said."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny import tiny_hf, tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.editing import objective, targets
from pmet_lens.evaluation import scoring
from pmet_lens.models import memory
from pmet_lens.models.memory import OutOfMemory, halving
from pmet_lens.models.model import Model

torch.set_num_threads(1)
HP = pl.Hparams(layers=(1, 2), n_steps=3, clamp=2.0)
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French"),
    pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", "Kel"),
]


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_halves_come_in_order():
    def run(items):
        if len(items) > 2:
            raise full()
        return sum(items)

    with pytest.warns(UserWarning, match="7 numbers at once do not fit into memory; going on wi"):
        assert halving(range(7), run, "numbers") == [0, 1 + 2, 3 + 4, 5 + 6]


def test_one_that_does_not_fit_is_an_error_and_others_pass():
    def never(_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with (
        pytest.warns(UserWarning, match="2 facts"),
        pytest.raises(OutOfMemory, match="One of the facts alone"),
    ):
        halving([1, 2], never, "facts")

    def other(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving([1, 2], other, "facts")


def test_free_memory_is_asked_where_somebody_knows(monkeypatch):
    assert memory.free(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert memory.free(torch.device("cuda")) == 7


def test_targets_go_on_with_half(monkeypatch):
    model = tiny_model("gpt2", torch.float64)
    wanted = targets.optimise(model, FACTS, pl.PMET, HP, ["{}"])
    before = objective.Objective.__init__

    def small(self, model, rows, per_fact, *more):
        if len(rows) // per_fact > 1:
            raise full()
        before(self, model, rows, per_fact, *more)

    monkeypatch.setattr(objective.Objective, "__init__", small)
    with pytest.warns(UserWarning, match="3 facts at once do not fit"):
        got = targets.optimise(model, FACTS, pl.PMET, HP, ["{}"])
    for stream, value in wanted.values.items():
        assert torch.allclose(got.values[stream], value, rtol=1e-9)
    assert list(got.history["fact"]) == list(wanted.history["fact"])


def test_evaluation_goes_on_with_half(monkeypatch):
    model = tiny_model("gpt2", torch.float64)
    wanted = scoring.evaluate(model, FACTS)
    before = Model.logits_at

    def small(self, ids, mask, at):
        if len(ids) > 2:
            raise full()
        return before(self, ids, mask, at)

    monkeypatch.setattr(Model, "logits_at", small)
    with pytest.warns(UserWarning, match="prompts at once do not fit"):
        got = scoring.evaluate(model, FACTS)
    for column in ("nll_wanted", "nll_other"):
        assert got[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), rel=1e-9)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_model_is_read_without_a_search_for_garbage(wanted, monkeypatch):
    """Whether it ends well or not, the collector is left as it was."""
    seen = []
    hf, tokenizer = tiny_hf("gpt2", torch.float32), tiny_tokenizer()
    made = Model.__init__
    monkeypatch.setattr(
        Model, "__init__", lambda *args: (seen.append(gc.isenabled()), made(*args))[1]
    )
    (gc.enable if wanted else gc.disable)()
    try:
        pl.load(hf, tokenizer)
        assert gc.isenabled() is wanted
        with pytest.raises(pl.ModelError, match="there is no directory"):
            pl.load("./nowhere")
        assert gc.isenabled() is wanted
    finally:
        gc.enable()
    assert seen == [False]
