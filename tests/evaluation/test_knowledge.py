"""Which facts one edit can be made of, and what is said of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CONTEXTS, FACTS, HP, same_deltas, some_moments
from kept import shared_model
from tiny import refused

import pmet_lens as pl

torch.set_num_threads(1)
GOOD = FACTS[:2]
SISTER = replace(GOOD[0], case_id=7)
BAD = [
    replace(GOOD[0], target_new="elsewhere"),
    SISTER,
    pl.Fact("Kel", "{} is", None, "small"),
    pl.Fact("Kel " * 80, "{} is", "large"),
]
WHY = ("contradict each other", "is there twice", "has no target_new", "the model reads at most")


def test_what_cannot_be_edited_is_left_out_and_listed():
    model = shared_model("gpt2")
    with pytest.warns(UserWarning, match=r"4 of 6 facts are left out .*Fact 1 .*contradict"):
        found = pl.editable(model, [GOOD[0], *BAD, GOOD[1]])
    assert found == GOOD
    assert len(found.left_out) == len(WHY)
    for place, why, said in zip((1, 2, 3, 4), WHY, found.left_out, strict=True):
        assert said.startswith(f"Fact {place} (counted from 0): ")
        assert why in said


def test_good_facts_are_all_there_without_a_word(recwarn):
    found = pl.editable(shared_model("gpt2"), FACTS)
    assert (found, found.left_out) == (list(FACTS), ())
    assert not recwarn.list


def test_a_fact_that_is_left_out_contradicts_nobody():
    """The first of two answers cannot be read, so the second one stays."""
    long = pl.Fact("Kel", "{} is" + " very" * 80, "large", relation="size")
    other = pl.Fact("Kel", "{} is", "small", relation="size")
    with pytest.warns(UserWarning, match="1 of 2 facts"):
        assert pl.editable(shared_model("gpt2"), [long, other]) == [other]


def test_what_fits_alone_but_not_behind_a_context_is_left_out():
    model = shared_model("gpt2")
    fact = pl.Fact("Kel", "{} is" + " a" * 18, "large")
    assert pl.editable(model, fact) == [fact]
    with pytest.raises(pl.FactError, match="no facts that can be edited: Fact 0"):
        pl.editable(model, fact, ["Danel Orrin says: " * 3 + "{}"])


def test_an_edit_skips_them_where_it_is_told_to():
    model = shared_model("gpt2", torch.float64)
    given = model, [*GOOD, *BAD], some_moments(model), pl.PMET, HP, CONTEXTS
    with refused("contradict each other", pl.FactError):
        pl.edit(*given)
    with pytest.warns(UserWarning, match="4 of 6 facts are left out"):
        edit = pl.edit(*given, skip=True)
    assert edit.facts == tuple(GOOD)
    assert same_deltas(edit, pl.edit(model, GOOD, *given[2:]))
    with pytest.raises(pl.FactError, match="There are no facts that can be edited: Fact 0"):
        pl.edit(model, BAD[2:], *given[2:], skip=True)
    with pytest.raises(pl.FactError, match="pass at least one Fact"):
        pl.edit(model, [], *given[2:], skip=True)
