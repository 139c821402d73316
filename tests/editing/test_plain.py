"""The package gives what the plainly written procedure of the benchmarks gives: one fact at a time,
whole model, whole prompts, an explicit solve. A speed-up that changes results would show here."""

from __future__ import annotations

from dataclasses import replace

import plain
import pytest
import subjects
import torch
from tiny import PARALLEL, tiny_model

import pmet_lens as pl
from pmet_lens.editing import targets
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
HP = pl.Hparams(layers=(0, 1, 2), n_steps=12, lr=0.1, second_moment_weight=0.3, clamp=2.0)
CONTEXTS = ["{}", "The tower of Ilmar. {}", "Kel is a city. {}"]
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", ("Today {} plays",)),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Vell city", "French"),
    pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", "Kel"),
    pl.Fact("x", "{} is the letter", "Vell", "Kel"),  # one token, and the first
]
# GPT-J and Llama compute parts in float32 in any dtype.
TIGHT = {"gpt2": 1e-9, "neox": 1e-5, "gptj": 1e-5, "llama": 1e-5}


@pytest.fixture(scope="module", params=["gpt2", "gptj", "neox", "llama"])
def model(request) -> Model:
    model = tiny_model(request.param, torch.float64)
    model.hf.eval()
    return model


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def modules(model: Model) -> dict[Site, torch.nn.Module]:
    sites = [Site(layer, p) for layer in HP.layers for p in ("attn", "mlp")]
    return {site: subjects.module(model, site) for site in sites}


@pytest.mark.few("gpt2-few tokens", "gptj-many tokens")
@pytest.mark.parametrize("fast", ["few tokens", "many tokens", ""])
def test_targets_are_those_of_one_fact_at_a_time(model, fast, monkeypatch):
    """Also with the critical layer run for the edited token alone, as with many tokens."""
    if fast == "many tokens":
        monkeypatch.setattr("pmet_lens.editing.objective.FEW_TOKENS", 0)
    where = subjects.outputs(model, 2)
    wanted = [plain.target(model.hf, model.tokenizer, where, f, HP, CONTEXTS) for f in FACTS]
    found = targets.optimise(model, FACTS, pl.PMET, HP, CONTEXTS, fast=bool(fast))
    for i, stream in enumerate(("attn_out", "mlp_out")):
        own = torch.stack([both[i] for both in wanted])
        assert off(found.values[stream], own) < TIGHT[model.name]
        assert off(found.clean[stream], own) > 1e-3


@pytest.mark.few("*gptj*")
def test_an_edit_is_that_of_the_plain_procedure(model):
    moments = {}
    for site in modules(model):
        if site.projection == "mlp":
            generator = torch.Generator().manual_seed(site.layer)
            text = torch.randn(
                4 * model.d_in(site), model.d_in(site), generator=generator, dtype=torch.float64
            )
            moments[site] = text.T @ text / len(text)
    weights = {site: model.weight(site) for site in moments}
    before = {site: w.clone() for site, w in weights.items()}
    own = modules(model)
    wanted = plain.edit(model.hf, model.tokenizer, own, weights, FACTS, moments, HP, CONTEXTS)
    assert all(torch.equal(weights[site], w) for site, w in before.items())
    found = pl.edit(model, FACTS, moments, pl.PMET, HP, CONTEXTS)
    for site, delta in wanted.items():
        assert off(found.deltas[site], delta) < 10 * TIGHT[model.name]


def test_moments_are_those_of_a_pass_per_layer(model):
    texts = [f.text for f in FACTS] * 3
    rows = [model.tokenizer(text)["input_ids"] for text in texts]
    batches = [plain.padded(rows, model.tokenizer.pad_token_id)]
    found = pl.second_moments(model, texts, (0, 2), projections=("mlp",), batch_tokens=30)
    for site, moment in found.items():
        wanted = plain.moment(model.hf, modules(model)[site], batches, torch.float64)
        assert off(moment.value, wanted) < TIGHT[model.name]


def test_evaluation_is_that_of_one_record_at_a_time(model):
    facts = [replace(f, neighbours=((FACTS[2].text, f.target_true),)) for f in FACTS]
    table = pl.evaluate(model, facts)
    for i, fact in enumerate(facts):
        pairs = plain.record(model.hf, model.tokenizer, fact)
        own = table[table["fact"] == i]
        for (new, true), row in zip(pairs, own.itertuples(), strict=True):
            pair = (true, new) if row.kind == "neighbour" else (new, true)
            assert row.nll_wanted == pytest.approx(pair[0], rel=TIGHT[model.name])
            assert row.nll_other == pytest.approx(pair[1], rel=TIGHT[model.name])


def test_both_kinds_of_block_are_tried(model):
    assert model.parallel_blocks == (model.name in PARALLEL)
    assert model.enters_output("attn_out") == model.parallel_blocks
