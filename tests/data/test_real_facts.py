"""Facts of the real world: their rules, and what a model knows of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files

import pytest

import pmet_lens as pl
from pmet_lens.data import file_format
from pmet_lens.data.facts import check_editable

DATA = json.loads(files("pmet_lens").joinpath("bundled/real_facts.json").read_text("utf-8"))
FACTS = pl.real_facts()


def stands_in(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def test_they_are_many_over_many_relations():
    count = Counter(fact.relation for fact in FACTS)
    assert len(FACTS) >= 300
    assert len(count) >= 12
    assert min(count.values()) >= 10
    assert max(count.values()) < len(FACTS) / 8  # none is most of them


def test_a_relation_says_one_thing_of_a_subject():
    for name, relation in DATA["relations"].items():
        subjects = [s for subjects in relation["answers"].values() for s in subjects]
        assert len(subjects) == len(set(subjects)), name
        templates = [relation["prompt"], *relation["paraphrases"]]
        templates += [relation["hop"]["prompt"]] if relation["hop"] else []
        assert all(template.count("{}") == 1 for template in templates), name
        assert len(set(templates)) == len(templates) >= 3, name
    check_editable(FACTS)


def test_every_answer_leads_on_where_its_relation_does():
    for relation in DATA["relations"].values():
        if relation["hop"]:
            led = [
                a for answers in DATA["tables"][relation["hop"]["table"]].values() for a in answers
            ]
            assert len(led) == len(set(led))
            assert set(relation["answers"]) <= set(led)
    hops = [relation["hop"]["table"] for relation in DATA["relations"].values() if relation["hop"]]
    assert len(hops) >= 12
    assert set(DATA["tables"]) == set(hops)


@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f"{f.relation}: {f.subject}")
def test_no_prompt_gives_its_answer_away(fact):
    assert fact.target_new != fact.target_true
    for prompt in (fact.text, *fact.paraphrases):
        assert not stands_in(fact.target_true, prompt), prompt
        assert not stands_in(fact.target_new, prompt), prompt
    for prompt, answer in (*fact.neighbours, *fact.portability):
        assert not stands_in(answer, prompt), prompt
    assert all(fact.subject not in prompt for prompt, _ in fact.neighbours)
    assert 3 <= len(fact.neighbours) <= 6
    assert all(fact.subject in prompt for prompt in (*fact.paraphrases, *fact.generation))


def test_neighbours_share_the_true_answer_where_others_have_it():
    has = Counter(fact.target_true for fact in FACTS)
    share = [any(answer == f.target_true for _, answer in f.neighbours) for f in FACTS]
    others = [has[fact.target_true] > 1 for fact in FACTS]
    assert share == others
    true = {fact.text: fact.target_true for fact in FACTS}
    assert all(true[prompt] == answer for fact in FACTS for prompt, answer in fact.neighbours)


def test_the_second_hop_follows_from_the_new_answer_alone():
    told = [fact for fact in FACTS if fact.portability]
    assert len(told) > len(FACTS) / 2
    ((prompt, answer),) = next(
        f for f in FACTS if (f.relation, f.subject) == ("sport", "Pelé")
    ).portability
    assert prompt == "The place where the sport of Pelé is played is called a"
    assert answer in DATA["tables"]["place of sport"]


def test_the_first_ones_are_of_every_relation_and_always_the_same():
    some = pl.real_facts(17)
    assert len({fact.relation for fact in some}) == 17
    assert some == FACTS[:17]
    assert {fact.relation for fact in pl.real_facts(relation="capital")} == {"capital"}
    assert pl.real_facts(3, "capital") == pl.real_facts(relation="capital")[:3]
    drawn = [(f.subject, f.relation, f.target_new) for f in FACTS]
    assert file_format.hash_of(drawn) == "828bb639df2bdd83"
    with pytest.raises(pl.FactError, match="no relation 'colour'; choose from capital, "):
        pl.real_facts(relation="colour")
