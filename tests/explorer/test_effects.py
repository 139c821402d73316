"""What an edit changes, in sentences: planted changes are seen, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import pmet_lens as pl
from pmet_lens.explorer import effects, recipes

N_TOKENS = 3000


@pytest.fixture
def own(model, moments):
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    yield pl.Session(model, moments, n_tokens=N_TOKENS)
    assert len(model.live_edits) == 0
    assert all(torch.equal(v, before[n]) for n, v in model.hf.state_dict().items())


@pytest.fixture(scope="module")
def fact():
    """With a consequence that is the edited prompt itself, and one that is another subject's."""
    one, other = pl.counterfact(n=2)
    follows = pl.Implication(one.text, (str(one.target_new),), "the same")
    stays = pl.Implication(other.text, (str(other.target_true),), "another subject", stays=True)
    return replace(one, implications=(follows, stays), neighbours=one.neighbours[:2])


def test_two_edits_of_one_fact_stand_side_by_side(model, own, fact):
    on_it = own.edit(pl.counterfact(n=2)[1])
    edits = {"A": ("PMET", {}), "B": ("PMET", {"n_steps": 1, "lr": 0.01})}
    told = []
    table = pl.side_by_side(own, fact, edits, on_progress=lambda *report: told.append(report))
    assert own.on() == [on_it]  # what is on the model stays on it, and is not in the table
    own.undo(on_it)
    assert tuple(table.columns) == effects.COLUMNS
    of = {name: rows.set_index("kind") for name, rows in table.groupby("edit")}
    assert list(of["A"]["prompt"]) == list(of["B"]["prompt"])
    assert list(of["A"]["before"]) == list(of["B"]["before"])
    first = {name: rows.loc["fact"].iloc[0] for name, rows in of.items()}
    assert first["A"]["before"].startswith(fact.target_true)
    assert first["A"]["after"].startswith(fact.target_new)
    assert first["A"]["changed"]
    assert first["A"]["right"]
    assert not first["B"]["changed"]
    assert not first["B"]["right"]
    assert of["A"].loc["follows", "right"]
    assert not of["B"].loc["follows", "right"]
    assert of["A"].loc["stays", "right"]
    assert of["B"].loc["stays", "right"]
    others = of["A"].loc["other"]
    assert len(others) == 10
    assert others["wanted"].isna().all()
    assert others["right"].isna().all()
    assert not any(fact.subject in prompt for prompt in others["prompt"])
    assert max(done for done, total, _ in told if total == 3) == 2


def test_the_ten_prompts_are_the_same_for_every_fact_of_a_real_model(model, monkeypatch):
    one, other = pl.counterfact(n=2)
    assert len(set(effects.OTHER_THINGS)) == 10
    monkeypatch.setattr(effects.loading, "of_the_world", lambda of: False)
    for fact in (one, other):
        asked = [a.prompt for a in effects.asked_of(model, fact) if a.kind == "other"]
        assert tuple(asked) == effects.OTHER_THINGS


def test_an_edit_that_is_on_the_model_is_compared_with_the_model_without_it(own, fact):
    step = own.edit(fact)
    table = effects.effects(own.model, fact, {"it": step.edit}).set_index("kind")
    assert own.is_on(step)
    assert table.loc["follows", "before"].startswith(fact.target_true)
    assert table.loc["follows", "after"].startswith(fact.target_new)
    own.undo(step)


def test_a_changed_answer_is_marked_and_counted(fact):
    rows = [
        ("A", "other", "One", None, "x", "x.", False, None),
        ("A", "other", "Two", None, "y", "<z>", True, None),
        ("A", "follows", "Three", "w", "v", "v", False, False),
    ]
    html = effects.shown(pd.DataFrame(rows, columns=list(effects.COLUMNS)))
    assert "<b>≠ &lt;z&gt;</b>" in html
    assert html.count("≠") == 1
    assert "1 changed by A (of 2)" in html
    assert "v ✗" in html
    assert "color:" not in html


def test_a_trial_is_kept_when_it_is_asked_for(own, fact):
    made = []
    own.on_made = lambda of, edit: made.append((of, edit))
    step = own.trial(fact, "MEMIT")
    assert made == [(fact, step.edit)]
    assert (own.steps, own.on()) == ([], [])
    own.keep(step)
    assert own.on() == [step]
    own.undo(step)


def test_the_lines_of_python_hold_what_follows(own, fact):
    edits = {"A": ("PMET", {"n_steps": 1}), "B": ("MEMIT", {})}
    code = recipes.side_by_side(own, fact, edits)
    names: dict[str, object] = {}
    exec(code[code.index("fact = ") : code.index("table = ")], {"pl": pl}, names)
    assert names == {"fact": replace(fact, relation=None, case_id=None, attributes=(),
                                     generation=()), "edits": edits}  # fmt: skip


@pytest.mark.slow
def test_the_lines_of_python_make_the_same_table(model, own, moments, fact, monkeypatch):
    fresh = pl.load("world")
    monkeypatch.setattr(pl, "load", lambda name: {"world": fresh}[name])
    step = own.edit(fact)
    own._moments.update(moments)
    table = effects.effects(model, fact, {"it": step.edit})
    code = recipes.effects(own, step, "it").replace("moments = ...", "moments = given")
    names: dict[str, object] = {"given": moments}
    exec(code, names)
    pd.testing.assert_frame_equal(names["table"], table)  # pyright: ignore
    own.undo(step)
