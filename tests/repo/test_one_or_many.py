"""One fact or a list, a method or its name, inside inference mode: used, or refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import refused, tiny_hf, tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.editing.edits import Edit
from pmet_lens.experiments.trials import Trial
from pmet_lens.models import loading

FACTS = [
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Kel", "French", relation="P1"),
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", relation="P2"),
    pl.Fact("Ilmar", "The tower of {} stands in", "Ostria", "Vell", relation="P3"),
]
LAYERS = (1, 2)
HP = pl.Hparams(LAYERS, n_steps=3, second_moment_weight=1.0)
ONE = replace(HP, layers=(2,))


@pytest.fixture(scope="module")
def model() -> pl.Model:
    return tiny_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def moments(model: pl.Model) -> dict[pl.Site, torch.Tensor]:
    sites = [pl.Site(n, p) for n in LAYERS for p in ("attn", "mlp")]
    return {s: torch.eye(model.d_in(s), dtype=torch.float64) for s in sites}


def same(a: Edit, b: Edit) -> bool:
    return all(torch.equal(a.deltas[s], b.deltas[s]) for s in {**a.deltas, **b.deltas})


def made(model, moments, facts, *args, **more) -> Edit:
    return pl.edit(model, facts, moments, *args, contexts=["{}"], check=False, **more)


# -- one fact or several --------------------------------------------------------------------------

LOOKS: dict[str, Any] = {
    "causal_trace": lambda m, f: pl.causal_trace(m, f, samples=1),
    "lens": pl.lens,
    "attention_patterns": pl.attention_patterns,
    "component_similarity": pl.component_similarity,
    "evaluate": pl.evaluate,
    "recall": pl.recall,
    "probe": lambda m, f: pl.probe(m, f).to_frame(),
    "suggest_hparams": lambda m, f: pl.suggest_hparams(m, f).trace,
}
SINGLE: dict[str, Any] = {
    "subject_attention": pl.subject_attention,
    "trace_tokens": lambda m, f: pl.trace_tokens(m, f, samples=1),
    "lens_tokens": pl.lens_tokens,
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_facts_takes_one_too(model, name: str) -> None:
    pd.testing.assert_frame_equal(LOOKS[name](model, FACTS[0]), LOOKS[name](model, FACTS[:1]))


@pytest.mark.parametrize("name", SINGLE)
def test_a_look_at_one_fact_takes_several(model, name: str) -> None:
    found = SINGLE[name](model, FACTS)
    assert list(found.columns[:2]) == ["fact", "subject"]
    for number, fact in enumerate(FACTS):
        alone = SINGLE[name](model, fact)
        rows = found[found["fact"] == number]
        assert set(rows["subject"]) == {fact.subject}
        rows = rows.drop(columns=["fact", "subject"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, alone, check_exact=False, rtol=1e-9)
    with pytest.raises(pl.FactError, match="no facts"):
        SINGLE[name](model, [])


def test_an_edit_takes_one_fact(model, moments) -> None:
    listed = made(model, moments, FACTS[:1], "PMET", HP)
    assert same(made(model, moments, FACTS[0], "PMET", HP), listed)
    targets = pl.optimise(model, FACTS[0], "PMET", HP, ["{}"])
    assert torch.equal(targets.values["mlp_out"], listed.targets.values["mlp_out"])  # type: ignore[union-attr]
    assert pl.answer_gain(model, FACTS[0], targets).equals(
        pl.answer_gain(model, FACTS[:1], targets)
    )
    assert pl.drift(model, FACTS[0], listed).equals(pl.drift(model, FACTS[:1], listed))
    assert pl.estimate(model, FACTS[0], "PMET", HP) == pl.estimate(model, FACTS[:1], "PMET", HP)
    fine = pl.FineTuneHparams(layer=1, n_steps=2)
    alone = made(model, None, FACTS[0], "FT-W", fine)
    assert same(alone, made(model, None, FACTS[:1], "FT-W", fine))


@pytest.mark.parametrize("wrong", ["a subject", 3, [1, 2], [("a", "{} is", "b")], None])
def test_what_is_no_fact_is_refused_in_words(model, wrong: Any) -> None:
    from pmet_lens.data.facts import listed

    with pytest.raises(pl.FactError, match=r"must be a Fact or a list of them"):
        listed(wrong)


# -- a method or its name -------------------------------------------------------------------------


def test_a_name_stands_for_its_method(model, moments) -> None:
    steps = pl.edit_sequentially(model, FACTS, moments, "MEMIT", HP, ["{}"], batch_size=2)
    value = pl.edit_sequentially(model, FACTS, moments, pl.MEMIT, HP, ["{}"], batch_size=2)
    assert all(same(a, b) for a, b in zip(steps, value, strict=True))
    a, b = (pl.optimise(model, FACTS, m, HP, ["{}"]) for m in ("w/o δ^a", pl.ABLATIONS["w/o δ^a"]))
    assert torch.equal(a.values["mlp_out"], b.values["mlp_out"])
    assert Trial("MEMIT") == Trial(pl.MEMIT)
    assert Trial("no_attn_delta").method == pl.ABLATIONS["w/o δ^a"]
    world = pl.load("world")
    assert pl.hparams_for(world, "MEMIT") == pl.hparams_for(world, pl.MEMIT)
    for call in (
        lambda m: pl.edit_sequentially(model, FACTS, moments, m, HP, ["{}"], batch_size=2),
        lambda m: pl.optimise(model, FACTS, m, HP, ["{}"]),
        lambda m: pl.hparams_for(world, m),
        Trial,
    ):
        with pytest.raises(pl.SettingsError, match="no method or ablation 'PMETT'"):
            call("PMETT")


def test_a_gradient_method_where_none_can_be_used_is_refused_in_words(model, moments) -> None:
    with pytest.raises(pl.SettingsError, match="does not edit in batches"):
        pl.edit_sequentially(model, FACTS, moments, "FT-W", batch_size=1)
    with pytest.raises(pl.SettingsError, match="without targets"):
        pl.optimise(model, FACTS, "MEND")
    with pytest.raises(pl.SettingsError, match="knows its settings itself"):
        pl.hparams_for(model, "FT-W")


# -- used, or refused in words --------------------------------------------------------------------


def test_one_fact_at_a_time_uses_or_refuses_what_is_given(model, moments) -> None:
    plain = made(model, moments, FACTS, "ROME", ONE)
    steps: list[int] = []
    heard = made(model, moments, FACTS, "ROME", ONE, on_step=lambda step, _: steps.append(step))
    assert steps == [0, 1, 2] * 3
    assert same(plain, heard)
    kept: dict[pl.Site, Any] = {}
    assert same(plain, made(model, moments, FACTS, "ROME", ONE, factorised=kept))
    assert set(kept) == {pl.Site(2, "mlp")}
    keys = {pl.Site(2, "mlp"): torch.randn(4, 128, dtype=torch.float64)}
    guarded = made(model, moments, FACTS, "ROME", ONE, earlier=keys)
    assert not same(plain, guarded)
    one = made(model, moments, FACTS[0], "ROME", ONE, earlier=keys)
    for site, (left, right) in guarded.factors.items():
        torch.testing.assert_close(left[:, :1], one.factors[site][0])
        torch.testing.assert_close(right[:1], one.factors[site][1])
    targets = pl.optimise(model, FACTS, "ROME", ONE, ["{}"])
    with pytest.raises(pl.SettingsError, match=r"targets= cannot be used.*1 are edited at once"):
        made(model, moments, FACTS, "ROME", ONE, targets=targets)
    single = made(model, moments, FACTS[0], "ROME", ONE, targets=targets[:1])
    alone = made(model, moments, FACTS[0], "ROME", ONE)
    for site, delta in alone.deltas.items():
        torch.testing.assert_close(single.deltas[site], delta)


def test_a_gradient_method_refuses_what_it_does_not_read(model, moments) -> None:
    fine = pl.FineTuneHparams(layer=1, n_steps=2)
    targets = pl.optimise(model, FACTS, "PMET", HP, ["{}"])
    for given in ({"targets": targets}, {"factorised": {}}, {"earlier": {}}):
        with pytest.raises(pl.SettingsError, match=f"{next(iter(given))}= cannot be used here"):
            made(model, None, FACTS, "FT-W", fine, **given)


def test_protecting_edits_keeps_no_factors(model, moments) -> None:
    more: dict[str, Any] = {"batch_size": 1, "protect": True, "factorised": {}}
    with pytest.raises(pl.SettingsError, match="every batch has its own system"):
        pl.edit_sequentially(model, FACTS, moments, "MEMIT", HP, ["{}"], **more)


# -- inference mode -------------------------------------------------------------------------------


def test_editing_works_inside_inference_mode(model, moments) -> None:
    fine = pl.FineTuneHparams(layer=1, n_steps=2)
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}

    def edits(model: pl.Model) -> list[Edit]:
        found = [made(model, moments, FACTS, "PMET", HP), made(model, moments, FACTS, "FT-W", fine)]
        found += pl.edit_sequentially(model, FACTS, moments, "MEMIT", HP, ["{}"], batch_size=2)
        return found

    outside, hf = edits(model), tiny_hf("gpt2", torch.float64)
    with torch.inference_mode():
        fresh = loading.load(hf, tiny_tokenizer())  # loaded inside, too
        inside = edits(fresh)
        targets = pl.optimise(fresh, FACTS, "PMET", HP, ["{}"])
        gain = pl.answer_gain(fresh, FACTS, targets)
        with inside[0].applied(fresh):
            pl.evaluate(fresh, FACTS)
        pl.second_moments(fresh, ["The tower of Ilmar."], [1], projections=("mlp",))
    assert all(same(a, b) for a, b in zip(outside, inside, strict=True))
    assert gain.equals(pl.answer_gain(model, FACTS, targets))
    assert all(same(a, b) for a, b in zip(edits(fresh), outside, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in fresh.hf.state_dict().items())


def test_weights_made_inside_inference_mode_are_refused_in_words() -> None:
    with torch.inference_mode():
        hf = tiny_hf("gpt2")
    with refused("made inside torch.inference_mode"):
        loading.load(hf, tiny_tokenizer())
