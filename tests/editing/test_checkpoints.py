"""Edits in a row, watched: the first, the last and all facts so far, and when the model breaks."""

from __future__ import annotations

import math
import warnings

import pandas as pd
import pytest
from cases import CONTEXTS, FACTS, HP, bits, some_moments, unchanged
from matplotlib.figure import Figure
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens import plotting
from pmet_lens.models.model import Model, Site

SITES = [Site(1, "mlp"), Site(2, "mlp")]
TEXTS = ["Mira Tolan plays the sport of tennis.", "The tower of Ilmar stands in the city."]
PLAIN = {"texts": TEXTS, "others": ()}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("gpt2")


def measured(table: pd.DataFrame, edits: int, facts: str) -> pd.Series:
    return table[(table["edits"] == edits) & (table["facts"] == facts)].set_index("metric")["mean"]


def test_a_checkpoint_is_what_evaluate_says_of_the_model_as_edited_so_far(model):
    watch, before, seen = pl.Checkpoints(every=1, n=1, **PLAIN), bits(model), {}

    def remember(done, _):
        for name, facts in (("first", FACTS[:1]), ("last", FACTS[done - 1 : done]),
                            ("all", FACTS[:done])):  # fmt: skip
            seen[done, name] = pl.summarise(pl.evaluate(model, facts))["mean"]
        seen[done, "model"] = pl.general_ability(model, texts=TEXTS, prompts=(), others=())["mean"]
        assert watch.table["edits"].max() == done  # there before `on_batch`, which can save it

    pl.edit_sequentially(
        model, FACTS, some_moments(model), pl.MEMIT, HP, CONTEXTS, batch_size=1,
        on_batch=remember, checkpoints=watch,
    )  # fmt: skip
    assert unchanged(model, before)
    assert sorted(watch.table["edits"].unique()) == [0, 1, 2, 3]
    for (done, name), wanted in seen.items():
        found = measured(watch.table, done, name)
        pd.testing.assert_series_equal(found.reindex(wanted.index), wanted, check_dtype=False)
    norms = watch.table[watch.table["metric"] == "weight_norm"]["mean"].tolist()
    assert norms[0] == 1
    assert norms[-1] != 1
    assert measured(watch.table, 0, "model").index.tolist() == ["perplexity", "weight_norm"]
    assert not watch.table["collapsed"].any()


@pytest.mark.parametrize(
    ("every", "ends", "wanted"),
    [
        (2, (1, 2, 3), {0, 2, 3}),
        (2, (2, 3), {0, 2, 3}),
        (100, (1, 2, 3), {0, 3}),
        ((1, 3), (1, 2, 3), {0, 1, 3}),
        ((2,), (1, 3), {0, 3}),  # in the batch that reaches it
        ([1], (1, 2, 3), {0, 1, 3}),
    ],
)
def test_it_looks_when_it_is_time(model, every, ends, wanted):
    watch = pl.Checkpoints(every, **PLAIN)
    look = watch.begin(model, FACTS, SITES)
    for done in ends:
        look(done)
    assert {*watch.table["edits"]} == wanted


def test_of_many_facts_a_few_are_asked(model):
    facts = [pl.Fact(f"Kel{i}", "{} is in", "Ostria", "Vell") for i in range(11)]
    watch = pl.Checkpoints(n=2, most=4, **PLAIN)
    watch.begin(model, facts, SITES)(11)
    own = watch.table[watch.table["metric"] == "ES"].set_index("facts")["n"]
    assert own.to_dict() == {"first": 2, "last": 2, "all": 4}


def test_free_answers_are_asked_where_they_are_wanted(model):
    watch = pl.Checkpoints(free=pl.Asking(limit=3), **PLAIN)
    watch.begin(model, FACTS, SITES)(3)
    assert {"EF", "EX"} <= {*watch.table["metric"]}


def test_it_warns_once_when_a_weight_has_grown(model):
    watch = pl.Checkpoints(every=1, growth=1.5, texts=(), others=())
    with model.restored(SITES):
        look = watch.begin(model, FACTS, SITES)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            look(1)
        model.weight(SITES[1]).mul_(2)
        with pytest.warns(UserWarning, match=r"After 2 of 3 facts a written weight has 2\.0 times"):
            look(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            look(3)
    table = watch.table
    assert not table["collapsed"].any()  # as far as anybody can tell
    assert "perplexity" not in {*table["metric"]}


def plant_perplexity(monkeypatch, *values: float) -> None:
    """One after the other."""
    found = iter(values)

    def planted(*_, **__):
        row = [next(found), 1.0, 2.0, 5]
        names = ["mean", "ci_low", "ci_high", "n"]
        return pd.DataFrame([row], columns=names, index=pd.Index(["perplexity"], name="metric"))

    monkeypatch.setattr("pmet_lens.evaluation.ability.general_ability", planted)


@pytest.mark.parametrize("worse", [3.5, math.nan, math.inf])
def test_it_warns_when_the_text_becomes_unlikely(model, worse, monkeypatch):
    plant_perplexity(monkeypatch, 10.0, 29.0, 10 * worse)
    watch = pl.Checkpoints(every=1)
    look = watch.begin(model, FACTS, SITES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(1)
    with pytest.warns(
        UserWarning, match=r"After 2 of 3 facts perplexity is .* and was 10 .limit 3"
    ):
        look(2)


def test_nobody_edits_the_facts_that_are_recalled(model):
    facts = [f for f in pl.real_facts(40) if f.relation == "capital"]
    watch = pl.Checkpoints(texts=(), every=1)
    look = watch.begin(model, facts, SITES)
    assert 100 < len(look.others) <= 200
    assert not {(f.subject, f.relation) for f in facts} & {
        (f.subject, f.relation) for f in look.others
    }


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"every": 0}, "whole numbers of facts"),
        ({"every": ()}, "whole numbers of facts"),
        ({"n": 0}, "whole numbers of facts"),
        ({"collapse": 1.0}, "multiples above 1"),
        ({"growth": 0.5}, "multiples above 1"),
    ],
)
def test_what_checkpoints_take(wrong, words):
    with pytest.raises(pl.FactError, match=words):
        pl.Checkpoints(**wrong)


def test_retention_is_drawn_per_method_with_a_cross_where_it_broke(model, monkeypatch):
    plant_perplexity(monkeypatch, 10.0, 20.0, 40.0)
    watch = pl.Checkpoints(every=1, **PLAIN)
    look = watch.begin(model, FACTS, SITES)
    look(1)
    with pytest.warns(UserWarning, match="collapses"):
        look(2)
    both = pd.concat([watch.table.assign(run=run) for run in ("MEMIT", "PMET")])
    ax = Figure().subplots()
    plotting.retention_lines(both, ax, "ES")
    names = [f"{run}, {facts}" for run in ("MEMIT", "PMET") for facts in ("first", "all", "last")]
    assert ax.get_legend_handles_labels()[1] == names
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert [*lines["MEMIT, first"].get_xdata()] == [1, 2]
    crosses = [line.get_xdata() for line in ax.get_lines() if line.get_marker() == "x"]
    assert {*crosses[0]} == {2}
    ax = Figure().subplots()
    plotting.retention_lines(watch.table, ax, "perplexity")
    assert [*ax.get_lines()[0].get_xdata()] == [0, 1, 2]
