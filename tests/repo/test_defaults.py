"""What is taken where nothing is given fits the model, or says what to give."""

from __future__ import annotations

import itertools

import pytest
from kept import bundled, shared_model
from tiny import tiny_hf, tiny_model

import pmet_lens as pl
from pmet_lens import cli
from pmet_lens.evaluation import ability
from pmet_lens.models.loading import of_the_world

FITS = r"about the bundled world, which 'llama' knows nothing of.*pl\.texts\(path\).*sampled_texts"


def test_a_model_of_the_world_is_told_by_its_vocabulary(tmp_path):
    model = bundled("world-sequential")
    assert of_the_world(model)
    assert not of_the_world(shared_model())
    model.hf.save_pretrained(tmp_path / "own")
    model.tokenizer.save_pretrained(tmp_path / "own")
    assert of_the_world(pl.load(tmp_path / "own"))
    strange = tiny_hf("gpt2", vocab_size=len(model.tokenizer))
    assert of_the_world(pl.load(strange, model.tokenizer, name="x"))


def test_the_worlds_text_is_refused_for_another_model(tmp_path):
    model = shared_model("llama")
    with pytest.raises(pl.MomentError, match=FITS):
        pl.second_moments(model, pl.texts(), [1])
    with pytest.raises(pl.MomentError, match=FITS):
        pl.kept_moments(tmp_path / "m.safetensors", model, pl.texts(), [1])
    with pytest.raises(pl.MomentError, match=FITS):
        pl.Bench(model, tmp_path)
    some = list(itertools.islice(pl.texts(), 50))  # whoever asks for it by hand gets it
    assert pl.second_moments(model, some, [1], n_tokens=100)
    assert pl.second_moments(bundled("world"), pl.texts(), [1], n_tokens=100)


def test_a_run_on_another_model_is_told_so(tmp_path):
    from grids import saved_model, tiny_run

    path = saved_model(tmp_path / "model")
    (tmp_path / "model" / "texts.txt").unlink()
    with pytest.raises(Exception, match="about the bundled world, which 'model' knows nothing of"):
        pl.run([tiny_run(path)], tmp_path / "runs")


def test_sampled_texts_are_the_models_own_and_follow_from_the_seed():
    model = tiny_model("llama")
    some = list(itertools.islice(pl.sampled_texts(model, length=12, batch_tokens=48), 10))
    assert some == list(itertools.islice(pl.sampled_texts(model, length=12, batch_tokens=48), 10))
    other = list(itertools.islice(pl.sampled_texts(model, 1, length=12, batch_tokens=48), 10))
    assert not set(some) & set(other)
    assert [text[:2] for text in some[:3]] == ["Th", "In", "A" + some[2][1:2]]
    assert pl.second_moments(model, pl.sampled_texts(model, length=12), [1], n_tokens=200)
    model.tokenizer.eos_token = None
    with pytest.raises(pl.ModelError, match="no end-of-text token"):
        next(pl.sampled_texts(model))


def test_ability_is_measured_on_what_the_model_may_know():
    model = shared_model("llama")
    fact = pl.real_facts(1)[0]
    moments = pl.second_moments(model, list(itertools.islice(pl.texts(), 100)), [1], n_tokens=1000)
    hparams = pl.Hparams(layers=(1,), n_steps=2)
    edit = pl.edit(model, [fact], moments, "PMET", hparams, ["{}"])
    table = pl.general_ability(model, edit, n_texts=5)
    others = ability.others_of(pl.real_facts(), [fact])
    assert len(others) == len(pl.real_facts()) - 1
    said = [f"{f.text} {f.target_true}." for f in others[:5]]
    prompts = [f.text for f in others if f.subject != fact.subject][:200]
    want = pl.general_ability(model, edit, texts=said, prompts=prompts, others=others, n_texts=5)
    assert table.equals(want)


def test_recalled_facts_are_those_the_model_says():
    model = bundled("world")
    known = pl.recalled(model, n=30)
    assert len(known) == 30
    assert {fact.relation for fact in known} <= {fact.relation for fact in pl.knowns()}
    assert pl.recall(model, known)["correct"].all()
    assert pl.recalled(model, pl.real_facts(20)) == [
        fact
        for fact, right in zip(
            pl.real_facts(20), pl.recall(model, pl.real_facts(20))["correct"], strict=True
        )
        if right
    ]
    assert pl.recalled(shared_model("llama", positions=96)) == []  # of the real facts


def test_the_command_takes_facts_that_fit(monkeypatch):
    asked = []
    monkeypatch.setattr(pl, "recalled", lambda model, n: asked.append(n) or [])
    cli._facts(None, 3, shared_model())
    cli._facts(None, 3, bundled("world"))
    assert asked == [3]
    texts = cli._texts("sampled", shared_model("llama"))
    assert next(texts).startswith("Th")
