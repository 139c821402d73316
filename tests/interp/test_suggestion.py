"""Suggested settings: where the trace says, marked as such, and good enough to edit with."""

from __future__ import annotations

import pytest
import torch
from kept import bundled, shared_model

import pmet_lens as pl

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
