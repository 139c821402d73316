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
    hops = [(one.prompt, answer) for one in fact.implications for answer in one.answers]
    for prompt, answer in (*fact.neighbours, *hops):
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
    told = [fact for fact in FACTS if fact.implications]
    assert len(told) > len(FACTS) / 2
    (hop,) = next(f for f in FACTS if (f.relation, f.subject) == ("sport", "Pelé")).implications
    assert hop.prompt == "The place where the sport of Pelé is played is called a"
    assert hop.answers[0] in DATA["tables"]["place of sport"]
    assert (hop.kind, hop.stays) == ("second hop", False)


def test_another_name_is_none_of_another_answer():
    """Of what answers the same question: "New York" and "New York City" are no two answers."""
    names = DATA["aliases"]
    for answers in (*(r["answers"] for r in DATA["relations"].values()), *DATA["tables"].values()):
        every = [name.casefold() for a in answers for name in (a, *names.get(a, ()))]
        twice = {name for name in every if every.count(name) > 1}
        # English and Scottish people are British.
        assert twice <= {"the united kingdom", "the uk", "britain", "great britain"}
    told = {a for r in DATA["relations"].values() for a in r["answers"]}
    told |= {a for table in DATA["tables"].values() for a in table}
    assert set(names) <= told
    assert any(fact.aliases for fact in FACTS)


def test_what_else_is_known_of_a_subject_has_to_stay():
    france = next(f for f in FACTS if (f.relation, f.subject) == ("capital", "France"))
    (told,) = pl.with_related(france)
    more = told.implications[len(france.implications) :]
    known = {(f.text, f.target_true) for f in FACTS if f.subject == "France"}
    assert {(one.prompt, one.answers[0]) for one in more} == known - {(france.text, "Paris")}
    assert {(one.kind, one.stays) for one in more} == {("relation specificity", True)}
    assert len(pl.with_related(france, n=1)[0].implications) == len(france.implications) + 1
    # In the bundled world every relation of a subject is known, and no prompt is about the edited.
    facts = pl.with_related(pl.counterfact(n=20))
    assert sum(len(fact.implications) for fact in facts) > 10
    relation = {f.text: f.relation for f in pl.knowns()}
    for fact in facts:
        assert all(fact.subject in one.prompt for one in fact.implications)
        assert fact.relation not in {relation[one.prompt] for one in fact.implications}


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
