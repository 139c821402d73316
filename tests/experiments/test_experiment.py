"""Sequential editing watched: what is kept, what breaks, and the model as it was found."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from kept import bundled

import pmet_lens as pl
from pmet_lens.evaluation import ability
from pmet_lens.experiments import measurements

FACTS = pl.counterfact(n=6)


@pytest.fixture(scope="module")
def world():
    return bundled("world")


@pytest.fixture(scope="module")
def moments(world_moments):
    return world_moments("world")


def run(model, moments, hparams, **options):
    how = {"batch_size": 3, "contexts": ["{}"], **options}
    return measurements.sequential(model, FACTS, moments, pl.MEMIT, hparams, **how)


def test_a_healthy_sequence_keeps_facts_and_text(world, moments, monkeypatch):
    few = partial(ability.general_ability, n_texts=50)
    monkeypatch.setattr(measurements.ability, "general_ability", few)
    before = {k: v.clone() for k, v in world.hf.state_dict().items()}
    seen = []
    table = run(
        world, moments, pl.HPARAMS["world"]["MEMIT"], protect=True,
        on_fact=lambda *done: seen.append(done),
    )  # fmt: skip
    assert seen == [(0, 6), (3, 6), (6, 6)]
    assert list(table["edits"].unique()) == [0, 3, 6]
    assert not table["collapsed"].any()
    wide = table.pivot(index="edits", columns="metric", values="mean")
    assert wide.loc[6, "ES"] >= 80
    assert wide.loc[0, "weight_norm"] == 1
    assert 1 < wide.loc[3, "weight_norm"] < wide.loc[6, "weight_norm"]
    assert math.isnan(wide.loc[0, "ES"])
    assert wide.loc[0, "perplexity"] < wide.loc[6, "perplexity"] < 3 * wide.loc[0, "perplexity"]
    assert table.set_index(["edits", "metric"]).loc[(6, "ES"), "n"] == 6
    after = world.hf.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_a_broken_model_is_reported_from_then_on(world, moments):
    """Deltas of any length and no second moment to speak of: the text goes with the edits."""
    hp = pl.HPARAMS["world"]["MEMIT"]
    wild = replace(
        hp, clamp=1e6, lr=60.0, kl_weight=0.0, weight_decay=0.0, second_moment_weight=1e-9,
        stop_loss=0.0,
    )  # fmt: skip
    table = run(world, moments, wild)
    flags = table.groupby("edits")["collapsed"].first()
    assert not flags[0]
    assert flags[6]
    text = table[table["metric"] == "perplexity"].set_index("edits")["mean"]
    assert flags.equals((text > 3 * text[0]).cummax().rename("collapsed"))
