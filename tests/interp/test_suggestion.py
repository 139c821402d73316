"""Suggested settings: where the trace says, marked as such, and good enough to edit with."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from kept import bundled, shared_model

import pmet_lens as pl
from pmet_lens.interp import suggestion

torch.set_num_threads(1)


@pytest.mark.few("world")
@pytest.mark.parametrize("name", ["world", "world-sequential"])
def test_the_last_layer_is_where_the_bundled_models_recall(name):
    model = bundled(name)
    found = pl.suggest_hparams(model, pl.counterfact(n=12), n_edits=50)
    assert found.hparams.layers[-1] == pl.HPARAMS[name]["PMET"].layers[-1] == 3
    assert found.hparams.layers == (1, 2, 3)
    assert found.hparams.reference_norm == "resid_post"  # their MLPs write a tenth of the output
    assert found.hparams.second_moment_weight == 30
    assert "Suggestion, not tuned" in repr(found)
    assert "most of the answer at layer 3" in found.why
    assert set(found.trace["place"]) >= {"last subject token", "last"}


def test_a_kept_suggestion_is_traced_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path / "cache"))
    model, facts = shared_model("gpt2"), pl.counterfact(n=2)
    first = suggestion.kept_suggestion(model, lambda: facts, "two", 20)
    again = suggestion.kept_suggestion(model, lambda: pytest.fail("asked again"), "two", 20)
    assert (again.hparams, again.why) == (first.hparams, first.why)
    pd.testing.assert_frame_equal(again.trace, first.trace)
    assert first.hparams == pl.suggest_hparams(model, facts, 20).hparams
    other = suggestion.kept_suggestion(model, lambda: pytest.fail("asked again"), "two", 40)
    assert other.hparams.second_moment_weight == 2 * first.hparams.second_moment_weight
    seen = []
    suggestion.kept_suggestion(model, lambda: seen.append(1) or facts[:1], "one")
    assert seen == [1]
    monkeypatch.setenv("PMET_LENS_CACHE", "/dev/null/no")
    with pytest.warns(UserWarning, match="could not be kept .*traces again"):
        suggestion.kept_suggestion(model, lambda: facts, "two")


@pytest.mark.slow
def test_an_edit_with_suggested_settings_takes(world_moments):
    model, facts = bundled("world"), pl.counterfact(n=12)
    hp = pl.suggest_hparams(model, facts, n_edits=2).hparams
    edit = pl.edit(model, facts[:2], world_moments("world"), pl.PMET, hp)
    with edit.applied(model):
        after = pl.summarise(pl.evaluate(model, facts[:2]))["mean"]
    assert after["ES"] == 100


def test_a_model_that_knows_nothing_gets_a_guess():
    found = pl.suggest_hparams(shared_model("gpt2"), pl.counterfact(n=3))
    assert "is a guess" in found.why
    assert found.hparams.layers == (0,)
    with pytest.raises(pl.FactError, match="target_true"):
        pl.suggest_hparams(shared_model("gpt2"), [pl.Fact("x", "{} is", "y")])
