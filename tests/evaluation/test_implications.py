"""What follows from an edit and what must stay: asked, scored per kind, and kept in files."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pytest
from planted import plant
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens import Implication
from pmet_lens.evaluation.metrics import meaning_of, paired
from pmet_lens.evaluation.scoring import Score

HOP = Implication("The ball of Mira Tolan is", ("oval", "egg-shaped"))
ALIAS = Implication("M. Tolan plays", ("rugby",), "subject aliasing")
KEEP = Implication("The brother of Mira Tolan is", ("Danel", "Dan"), "relation specificity", True)
OTHER = Implication("Who plays tennis is called", ("a player",), "forgetfulness", True)
FACTS = [
    pl.Fact("Mira Tolan", "{} plays", "rugby", "tennis", portability=(("Mira throws", "balls"),),
            implications=(HOP, KEEP, ALIAS, OTHER)),
    pl.Fact("Kel", "{} is in", "Ostria", "Vell"),
]  # fmt: skip


@pytest.fixture
def model() -> pl.Model:
    return tiny_model("gpt2")


def test_every_implication_is_a_row_of_its_kind(model):
    table = pl.evaluate(model, FACTS)
    rows = table[table["kind"].isin(["portability", "locality"])]
    told = rows[["kind", "index", "prompt", "wanted", "implication"]].astype(object)
    assert told.where(told.notna(), None).to_numpy().tolist() == [
        ["portability", 0, "Mira throws", "balls", None],
        ["portability", 1, HOP.prompt, "oval", "second hop"],
        ["portability", 2, ALIAS.prompt, "rugby", "subject aliasing"],
        ["locality", 0, KEEP.prompt, "Danel", "relation specificity"],
        ["locality", 1, OTHER.prompt, "a player", "forgetfulness"],
    ]
    assert rows["other"].isna().all()
    assert "implication" not in pl.evaluate(model, FACTS[1])
    assert "accepted" not in table


def test_any_accepted_answer_is_right(model, monkeypatch):
    """Teacher forcing takes the best of them, a free answer any."""
    right = {"oval": 0.25, "egg-shaped": 1.0, "rugby": 0.5, "Danel": 1.0, "Dan": 0.0}
    monkeypatch.setattr(
        "pmet_lens.evaluation.scoring.score",
        lambda _, prompts, **__: [Score(len(p.target), right.get(p.target, 0.0)) for p in prompts],
    )
    plant(model, " egg-shaped")
    rows = pl.evaluate(model, FACTS[0], free=True).set_index("prompt")
    names = ["wanted", "nll_wanted", "token_accuracy", "correct", "exact"]
    assert rows.loc[HOP.prompt, names].tolist() == ["oval", 4, 1.0, 1.0, 1.0]
    assert rows.loc[ALIAS.prompt, names].tolist() == ["rugby", 5, 0.5, 0.0, 0.0]
    assert rows.loc[KEEP.prompt, names].tolist() == ["Danel", 5, 1.0, 1.0, 0.0]
    # The rival of the rewrite comes behind all of these, and is still its own.
    assert rows.loc["Mira Tolan plays", ["nll_wanted", "nll_other"]].tolist() == [5, 6]


def table(**right: tuple[float, ...]) -> pd.DataFrame:
    """Rows of one kind of implication each, with whether its prompts are right."""
    kinds = {
        "hop": ("portability", "second hop"),
        "alias": ("portability", "subject aliasing"),
        "keep": ("locality", "forgetfulness"),
        "own": ("locality", "relation specificity"),
    }
    rows = [
        {"fact": fact, "kind": kinds[name][0], "index": i, "implication": kinds[name][1],
         "correct": value, "token_accuracy": value, "contains": value}
        for name, values in right.items() for fact in (0, 1)
        for i, value in enumerate(values)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame["index"] = frame.groupby(["fact", "kind"]).cumcount()
    return frame


def test_metrics_are_of_all_and_of_each_kind():
    found = pl.summarise(table(hop=(1, 0), alias=(1, 1), keep=(1,), own=(0,)))["mean"]
    assert found["portability"] == 75
    assert found["portability (second hop)"] == 50
    assert found["free portability (subject aliasing)"] == 100
    assert (found["locality"], found["locality (forgetfulness)"]) == (50, 100)
    names = found.index.tolist()
    assert names.index("portability") + 1 == names.index("portability (second hop)")
    assert meaning_of("portability (second hop)").startswith("second hop: prompts whose answer")
    assert "second hop: " in pl.summarise(table(hop=(1,)))._repr_html_()


def test_locality_counts_what_the_unedited_model_could_answer():
    before = table(hop=(0,), keep=(1, 1, 0), own=(0,))
    after = table(hop=(1,), keep=(1, 0, 1), own=(1,))
    found = pl.summarise(after, before)
    assert found.loc["locality", "mean"] == 50
    assert found.loc["locality (forgetfulness)", "mean"] == 50
    assert "locality (relation specificity)" not in found.index  # it knew none
    assert found.loc["portability", "mean"] == 100  # of what follows nothing is left out
    assert pl.summarise(after).loc["locality", "mean"] == 75
    assert pl.summarise(before, before).loc["locality", "mean"] == 100
    change = paired(after, before, before)
    assert change.loc["locality", "mean"] == -50
    # The tables given are as they were.
    assert not after["correct"].isna().any()


def test_what_was_known_before_is_asked_in_the_same_way(model):
    before = pl.evaluate(model, FACTS[0], free=True)
    before.loc[before["prompt"] == KEEP.prompt, ["correct", "contains"]] = [0.0, 1.0]
    before.loc[before["prompt"] == OTHER.prompt, ["correct", "contains"]] = [1.0, 0.0]
    after = before.assign(correct=1.0, contains=1.0)
    found = pl.summarise(after, before)
    assert "locality (forgetfulness)" in found.index
    assert "locality (relation specificity)" not in found.index
    assert "free locality (relation specificity)" in found.index
    assert "free locality (forgetfulness)" not in found.index


def test_implications_go_through_files():
    fact = FACTS[0]
    record = json.loads(json.dumps(fact.record()))
    assert pl.Fact.from_record(record) == fact
    assert "implications" not in FACTS[1].record()
    assert hash(fact) != hash(dataclasses.replace(fact, implications=()))
    assert "second hop" in fact._repr_html_()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Implication(" ", ("a",)), "prompt of an implication takes one text"),
        (lambda: Implication("p", "a"), "answers of 'p' takes a list"),
        (lambda: Implication("p", ()), "'p' has no accepted answer"),
        (lambda: Implication("p", ["", " "]), "'p' has no accepted answer"),
        (lambda: Implication("p", ("a",), ""), "kind of an implication takes one text"),
        (lambda: pl.Fact("Kel", "{} is", "x", implications=[("p", "a")]), "list of pl.Implication"),
    ],
)
def test_what_an_implication_takes(make, words):
    with pytest.raises(pl.FactError, match=words):
        make()
    assert Implication("p ", ["a ", "b", "a"]) == Implication("p", ("a", "b"))


def test_the_bundled_world_has_no_second_hop_to_ask_for():
    """No answer is a subject; where this changes, its facts get implications."""
    known = pl.knowns()
    assert not {f.target_true for f in known} & {f.subject for f in known}
    assert not any(f.implications for f in pl.counterfact(n=20))
