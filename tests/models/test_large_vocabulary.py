"""Logits are made only where they are read, and a large vocabulary makes smaller batches with the
same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import tiny_batch, tiny_model

import pmet_lens as pl
from pmet_lens.editing import objective
from pmet_lens.models import generation, likelihood, tokens
from pmet_lens.models.tokens import Prompt

VOCABULARY = 1531  # a width that no other matrix of the model has
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", relation="a"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Kel", "French", relation="b"),
    pl.Fact("Ilmar", "The tower of {} stands in", "Ostria", "Vell", relation="a"),
    pl.Fact("Ilmar", "The mother tongue of {} is", "French", "Kel", relation="b"),
]
TEXTS = ["The tower of Ilmar stands in the harbour city.", "Mira Tolan plays tennis."]
PROMPTS = ["The tower of Ilmar", "Mira Tolan", "The capital of Ostria is", "Kel"]
HPARAMS = pl.Hparams((1, 2), n_steps=3, second_moment_weight=1.0)


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def model(request) -> pl.Model:
    return tiny_model(request.param, torch.float64, vocab_size=VOCABULARY, window=40)


@contextmanager
def unembedded() -> Iterator[list[int]]:
    """How many positions each pass brings to the unembedding."""
    seen: list[int] = []

    def spy(module: Any, _: Any, out: Any) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == VOCABULARY:
            seen.append(out.shape[:-1].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(spy)
    try:
        yield seen
    finally:
        handle.remove()


def edit(model: pl.Model) -> pl.Edit:
    moments = {pl.Site(n, "mlp"): torch.eye(model.d_in(pl.Site(n, "mlp"))) for n in (1, 2)}
    return pl.edit(model, FACTS, moments, "PMET", HPARAMS, ["{}"], check=False)


def ability(model: pl.Model) -> pd.DataFrame:
    return pl.general_ability(model, edit(model), texts=TEXTS, prompts=PROMPTS, others=FACTS)


def gain(model: pl.Model) -> pd.DataFrame:
    targets = pl.optimise(model, FACTS, "PMET", HPARAMS, ["{}"])
    return pl.answer_gain(model, FACTS, targets, points=2)


STEPS: dict[str, Callable[[pl.Model], Any]] = {
    "evaluate": lambda m: pl.evaluate(m, FACTS),
    "recall": lambda m: pl.recall(m, FACTS),
    "ask": lambda m: pl.ask(m, PROMPTS, 3),
    "general_ability": ability,
    "causal_trace": lambda m: pl.causal_trace(m, FACTS, samples=2, layers=(1,)),
    "edit": lambda m: edit(m).targets.values["mlp_out"],
    "answer_gain": gain,
    "generate": lambda m: generation.generate_batch(m, PROMPTS, range(4), 20),
    "answers": lambda m: generation.answers(m, PROMPTS),
}


def answer_tokens(model: pl.Model, answer: str) -> int:
    rows = [Prompt(f.prompt, f.subject, getattr(f, answer)) for f in FACTS]
    return int(tokens.encode(model, rows).scored.sum())


@pytest.mark.few("gpt2")
def test_logits_are_made_only_where_they_are_read(model):
    true, new = (answer_tokens(model, answer) for answer in ("target_true", "target_new"))
    words = sum(len(model.tokenizer(text)["input_ids"]) - 1 for text in TEXTS)
    rows, per_fact = objective.prompts(model, FACTS, ["{}"])
    step = int(objective.read_by(rows, per_fact).sum())
    assert step == new + len(FACTS)
    # The clean distribution, then the steps; one of the pass that keeps keys and values.
    optimised = (1 + HPARAMS.n_steps) * step + 1
    most = {
        "evaluate": true + new,
        "recall": true,
        "ask": len(PROMPTS),
        "general_ability": optimised + words + 2 * len(PROMPTS) + true,
        "causal_trace": 2 * true * (2 + len(pl.causal_trace(model, FACTS, layers=(1,)))),
        "edit": optimised,
        "answer_gain": optimised + 5 * new,
        "generate": 20 * len(PROMPTS),
        "answers": 6 * len(PROMPTS),
    }
    for name, run in STEPS.items():
        run(model)  # what is made once is tried out on a batch of its own
        with unembedded() as seen:
            run(model)
        assert 0 < sum(seen) <= most[name], name
    with unembedded() as seen:
        pl.second_moments(model, TEXTS, [1])
    assert set(seen) <= {1}
    with unembedded() as seen:
        pl.sample_contexts(model)
    assert max(seen) <= len(generation.SEEDS)  # all prefixes at once, one token of each
    with unembedded() as seen:
        pl.lens(model, FACTS)
        pl.probe(model, FACTS)
        pl.attention_patterns(model, FACTS)
        pl.component_similarity(model, FACTS)
        pl.second_moments(model, TEXTS, model.n_layers - 1)
    assert set(seen) <= {1}


def test_a_pass_to_the_end_gives_the_stream_there(model):
    ids, mask = tiny_batch()
    seen: list[torch.Tensor] = []
    hooks = [(model.stream_hook(model.n_layers - 1, "resid_post"), seen.append)]
    with unembedded() as made, torch.no_grad():
        end = model.forward(ids, mask, hooks=hooks, stop_at_layer=model.n_layers)
    assert made == [1]
    assert end.shape == (*ids.shape, model.d_model)
    assert torch.equal(end, seen[0])


# Gemma's norms compute in float32 in any dtype, so batches matter to rounding there.
@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_a_large_vocabulary_makes_smaller_batches_with_the_same_results(model, monkeypatch):
    whole = {name: run(model) for name, run in STEPS.items()}
    many = 8  # more than any fact reads by itself
    monkeypatch.setattr(likelihood, "LOGITS", many * VOCABULARY)
    assert likelihood.readable(model) == many
    for name, run in STEPS.items():
        with unembedded() as seen:
            found = run(model)
        assert 0 < max(seen) <= many, name
        if isinstance(found, pd.DataFrame):
            pd.testing.assert_frame_equal(found, whole[name], rtol=1e-9, atol=1e-9)
        elif isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, whole[name], rtol=1e-9, atol=1e-9)
        else:
            assert found == whole[name]


def test_what_is_read_fits_the_device_too(model):
    assert likelihood.readable(model) == likelihood.LOGITS // VOCABULARY
    assert likelihood.readable(model, 7) == 7
    free = 20_000_000_000
    fitting = likelihood.readable(model, free=free)
    assert likelihood.readable(model) < fitting < likelihood.LOGITS_ELSEWHERE // VOCABULARY
    assert 4 * (4 * fitting * VOCABULARY) <= free / 4  # logits, log P, and both gradients
    assert likelihood.readable(model, free=0) == likelihood.readable(model)
