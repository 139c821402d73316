"""One fact or a list, a method or its name, inside inference mode: used, or refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from kept import bundled, shared_model
from tiny import refused, tiny_hf, tiny_tokenizer, unchecked

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
    return shared_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def moments(model: pl.Model) -> dict[pl.Site, torch.Tensor]:
    sites = [pl.Site(n, p) for n in LAYERS for p in ("attn", "mlp")]
    return {s: torch.eye(model.d_in(s), dtype=torch.float64) for s in sites}


def same(a: Edit, b: Edit) -> bool:
    return all(torch.equal(a.deltas[s], b.deltas[s]) for s in {**a.deltas, **b.deltas})


def made(model, moments, facts, *args, **more) -> Edit:
    return pl.edit(model, facts, moments, *args, contexts=["{}"], check=False, **more)


# -- one fact or several -------------------------------------------------------------------------

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


# -- a method or its name ------------------------------------------------------------------------


def test_a_name_stands_for_its_method(model, moments) -> None:
    steps = pl.edit_sequentially(model, FACTS, moments, "MEMIT", HP, ["{}"], batch_size=2)
    value = pl.edit_sequentially(model, FACTS, moments, pl.MEMIT, HP, ["{}"], batch_size=2)
    assert all(same(a, b) for a, b in zip(steps, value, strict=True))
    a, b = (pl.optimise(model, FACTS, m, HP, ["{}"]) for m in ("w/o δ^a", pl.ABLATIONS["w/o δ^a"]))
    assert torch.equal(a.values["mlp_out"], b.values["mlp_out"])
    assert Trial("MEMIT") == Trial(pl.MEMIT)
    assert Trial("no_attn_delta").method == pl.ABLATIONS["w/o δ^a"]
    world = bundled("world")
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


# -- used, or refused in words -------------------------------------------------------------------


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


# -- one name or number where a list is taken ------------------------------------------------------

ONE_NAME: dict[str, tuple[Any, Any]] = {
    "probe": (
        lambda m: pl.probe(m, FACTS, "mlp_out", 1, "last").to_frame(),
        lambda m: pl.probe(m, FACTS, ("mlp_out",), (1,), ("last",)).to_frame(),
    ),
    "lens": (
        lambda m: pl.lens(m, FACTS, "mlp_out", 1, "last"),
        lambda m: pl.lens(m, FACTS, ("mlp_out",), (1,), ("last",)),
    ),
    "lens_tokens": (
        lambda m: pl.lens_tokens(m, FACTS[0], "mlp_out", 1),
        lambda m: pl.lens_tokens(m, FACTS[0], ("mlp_out",), (1,)),
    ),
    "causal_trace": (
        lambda m: pl.causal_trace(m, FACTS, layers=1, places="last", samples=1),
        lambda m: pl.causal_trace(m, FACTS, layers=(1,), places=("last",), samples=1),
    ),
    "trace_tokens": (
        lambda m: pl.trace_tokens(m, FACTS[0], layers=1, samples=1),
        lambda m: pl.trace_tokens(m, FACTS[0], layers=(1,), samples=1),
    ),
    "attention_patterns": (
        lambda m: pl.attention_patterns(m, FACTS, 1),
        lambda m: pl.attention_patterns(m, FACTS, (1,)),
    ),
    "subject_attention": (
        lambda m: pl.subject_attention(m, FACTS[0], 1),
        lambda m: pl.subject_attention(m, FACTS[0], (1,)),
    ),
    "component_similarity": (
        lambda m: pl.component_similarity(m, FACTS, layers=1, positions="last"),
        lambda m: pl.component_similarity(m, FACTS, layers=(1,), positions=("last",)),
    ),
}


@pytest.mark.parametrize("name", ONE_NAME)
def test_one_name_stands_for_a_list_of_one(model, name: str) -> None:
    one, several = ONE_NAME[name]
    pd.testing.assert_frame_equal(one(model), several(model))


def test_one_layer_or_site_stands_for_a_list_of_one(model, moments) -> None:
    found = pl.second_moments(model, ["The tower of Ilmar."], 1, projections="mlp")
    assert set(found) == {pl.Site(1, "mlp")}
    with unchecked():
        assert replace(HP, layers=2) == replace(HP, layers=(2,))  # type: ignore[arg-type]
    edit = made(model, moments, FACTS, "PMET", HP)
    named = {str(site): moment for site, moment in moments.items()}
    assert same(made(model, named, FACTS, "PMET", HP), edit)
    assert same(pl.merged(edit), edit)
    drift = [pl.drift(model, FACTS, edit, s) for s in ("mlp_out", ("mlp_out",))]
    pd.testing.assert_frame_equal(*drift)
    assert edit.targets is not None
    assert torch.equal(edit.targets[1].values["mlp_out"], edit.targets[1:2].values["mlp_out"])


def test_one_run_stands_for_a_grid(tmp_path) -> None:
    one = pl.Run(model="some/model", facts=FACTS, method="PMET", hparams=HP)
    pl.save_grid(one, tmp_path / "g.json")
    assert [run.digest for run in pl.load_grid(tmp_path / "g.json")] == [one.digest]


def test_one_fact_is_examples_and_others_too(model) -> None:
    assert pl.explore(model, FACTS[0]).fact.subject.value == FACTS[0].subject
    assert pl.recalled(model, FACTS[0]) == pl.recalled(model, FACTS[:1])
    of = [
        pl.general_ability(model, texts=["Mira Tolan."], prompts=[], others=o)
        for o in (FACTS[0], FACTS[:1])
    ]
    pd.testing.assert_frame_equal(*of)


def test_a_session_takes_a_method_or_its_name(model, moments) -> None:
    session = pl.Session(model, moments, HP)
    for method, name in ((pl.MEMIT, "MEMIT"), (pl.ABLATIONS["w/o δ^a"], "w/o δ^a")):
        step = session.edit(FACTS[0], method)
        assert step.method == name
        session.undo(step)
        again = session.edit(FACTS[0], name)
        assert same(step.edit, again.edit)
        session.undo(again)
    with pytest.raises(pl.SettingsError, match=r"with Method.* use pl\.edit"):
        session.edit(FACTS[0], replace(pl.MEMIT, spread="sqrt", position="last"))


# -- refused in words ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "contexts": (
        lambda m, c: pl.edit(m, FACTS, c, "PMET", HP, "I am. {}"),
        pl.FactError,
        "contexts takes a list of templates, not 'I am. {}'",
    ),
    "contexts of targets": (
        lambda m, c: pl.optimise(m, FACTS, "PMET", HP, "I am. {}"),
        pl.FactError,
        "contexts takes a list",
    ),
    "contexts, one after the other": (
        lambda m, c: pl.edit_sequentially(m, FACTS, c, "PMET", HP, "I am. {}"),
        pl.FactError,
        "contexts takes a list",
    ),
    "a batch of 2.0": (
        lambda m, c: pl.edit_sequentially(m, FACTS, c, "PMET", HP, ["{}"], 2.0),
        pl.SettingsError,
        "batch_size must be a whole number ≥ 1, not 2.0",
    ),
    "fine-tuning with other settings": (
        lambda m, c: pl.edit(m, FACTS, None, "FT-W", HP),
        pl.SettingsError,
        "takes FineTuneHparams.* not Hparams",
    ),
    "MEND with other settings": (
        lambda m, c: pl.edit(m, FACTS, None, "MEND", HP),
        pl.SettingsError,
        "takes MendHparams.* not Hparams",
    ),
    "layers in letters": (lambda m, c: pl.Hparams("12"), pl.SettingsError, "whole numbers"),
    "half a layer": (lambda m, c: pl.Hparams((1.5,)), pl.SettingsError, "not 1.5"),
    "half a step": (lambda m, c: pl.Hparams(1, n_steps=2.5), pl.SettingsError, "not 2.5"),
    "a site in letters": (lambda m, c: pl.Site("1", "mlp"), pl.ModelError, "no layer '1'"),
    "many prompts for one": (
        lambda m, c: pl.generate(m, ["Kel", "Vell"]),
        pl.FactError,
        "generate takes one prompt, not .*generate_batch",
    ),
    "one seed for many": (
        lambda m, c: pl.generate_batch(m, ["Kel", "Vell"], 0),
        pl.FactError,
        "prompts and seeds are lists",
    ),
    "targets of others": (
        lambda m, c: pl.answer_gain(m, FACTS, pl.optimise(m, FACTS[:2], "PMET", HP, ["{}"])),
        pl.FactError,
        "3 facts do not fit the targets of 2",
    ),
    "an answer nobody knows": (
        lambda m, c: pl.lens(m, FACTS, answer="true"),
        pl.FactError,
        "target_true or target_new, not 'true'",
    ),
    "references for nothing": (
        lambda m, c: pl.evaluate(m, FACTS, references={("P1", "Kel"): ["Kel is a city"]}),
        pl.FactError,
        "pass generate=True",
    ),
    "records in letters": (lambda m, c: pl.counterfact(n="3"), pl.DataError, "not '3'"),
    "fewer records than none": (lambda m, c: pl.counterfact(n=-1), pl.DataError, "not -1"),
    "fewer facts than none": (lambda m, c: pl.real_facts(-1), pl.FactError, "not -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_words(model, moments, name: str) -> None:
    call, error, words = REFUSED[name]
    with refused(words, error):
        call(model, moments)


def test_more_tokens_than_there_are_is_all_of_them(model) -> None:
    assert len(pl.ask(model, "Kel is", 10_000)) == len(model.embedding)
    assert pl.ask(model, []).empty


# -- a part that can be answered is answered -------------------------------------------------------


def test_facts_without_the_answer_are_left_out_and_it_is_said(model) -> None:
    mixed = [pl.Fact("Vell", "{} is", "Kel"), *FACTS]
    steps: dict[str, Any] = {
        "recall": pl.recall,
        "lens": lambda m, f: pl.lens(m, f, "mlp_out", 1, "last"),
        "causal_trace": lambda m, f: pl.causal_trace(m, f, layers=1, samples=1),
        "suggest_hparams": lambda m, f: pl.suggest_hparams(m, f).trace,
    }
    for name, run in steps.items():
        with pytest.warns(UserWarning, match=f"1 of 4 facts have no target_true .* of {name}"):
            found = run(model, mixed)
        wanted = run(model, FACTS)
        if "fact" in found:
            assert set(found["fact"]) == {1, 2, 3}  # their places in the list
            wanted["fact"] += 1
        pd.testing.assert_frame_equal(found, wanted)
        with pytest.raises(pl.FactError, match=f"{name} needs facts with target_true"):
            run(model, mixed[:1])
    with pytest.warns(UserWarning, match="1 of 4 facts"):
        assert pl.recalled(model, mixed) == pl.recalled(model, FACTS)


# -- inference mode ------------------------------------------------------------------------------


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
