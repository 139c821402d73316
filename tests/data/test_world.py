"""The world is one world: the same for everybody, true in all its records, and fair to an edit."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from pmet_lens.data.world import Document, World, build, mention, nq_question


@pytest.fixture(scope="module")
def whole() -> World:
    return build()


@pytest.fixture(scope="module")
def small() -> World:
    """A fifth of the facts in the same phrasings, for what takes long."""
    return build(per_relation=30)


@pytest.fixture(scope="module")
def documents(small) -> list[Document]:
    return list(small.documents(random.Random(0)))


@pytest.fixture(scope="module")
def counterfact(whole) -> list[dict]:
    return whole.counterfact()


@pytest.fixture(scope="module")
def true(whole) -> set[tuple[str, str, str]]:
    return {(f.subject.name, f.relation, f.object) for f in whole.facts}


@pytest.fixture(scope="module")
def who(whole) -> dict[str, set[tuple[str, str]]]:
    """Every prompt that can be asked -> the (subject, relation)s it can be about."""
    found: dict[str, set[tuple[str, str]]] = {}
    for fact in whole.facts:
        rel = whole.data["relations"][fact.relation]
        questions = [*rel["questions"], rel["held_out_question"]]
        for template in (*rel["train"], *rel["held_out"], *questions, *map(nq_question, questions)):
            prompt = template.replace("{}", fact.subject.name)
            found.setdefault(prompt, set()).add((fact.subject.name, fact.relation))
    return found


def about(who, prompt: str) -> tuple[str, str]:
    (only,) = who[prompt]
    return only


# -- one world ------------------------------------------------------------------------------------

_DIGEST = """
import hashlib, json, random
from pmet_lens.data.world import build
w = build(seed={seed}, per_relation=30)
parts = [w.counterfact(), w.zsre(), w.knowns(), [d.text for d in w.documents(random.Random(5))]]
print(hashlib.sha256(json.dumps(parts).encode()).hexdigest())
"""


def digest(seed: int, hash_seed: int) -> str:
    """Of all records and a pass of text, in a fresh process with its own order of sets."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    code = [sys.executable, "-c", _DIGEST.format(seed=seed)]
    return subprocess.run(code, env=env, check=True, capture_output=True, text=True).stdout


def test_a_seed_is_a_world():
    assert digest(0, hash_seed=1) == digest(0, hash_seed=2)
    assert digest(0, hash_seed=1) != digest(1, hash_seed=1)


def test_records_do_not_depend_on_what_was_asked_before():
    one, other = build(per_relation=30), build(per_relation=30)
    list(one.documents(random.Random(3)))
    one.zsre(), one.references("P103", "French")
    random.seed(7)
    assert one.counterfact() == other.counterfact() == one.counterfact()
    assert one.zsre() == other.zsre()


@pytest.mark.parametrize("wrong", [0, -30, 20, 31])
def test_a_world_that_cannot_be_fair_is_refused(wrong):
    with pytest.raises(ValueError, match=f"positive multiple of 30, not {wrong}"):
        build(per_relation=wrong)


# -- large and fair enough ------------------------------------------------------------------------


def test_its_size(whole):
    assert len(whole.facts) >= 2000
    assert len({f.relation for f in whole.facts}) >= 12
    assert len(whole.entities) == len({e.name for e in whole.entities}) >= 450
    assert len(whole.facts) == len(set(whole.facts))


def test_a_question_has_one_answer_and_of_the_right_kind(whole):
    answers = Counter((f.subject, f.relation) for f in whole.facts)
    assert set(answers.values()) == {1}
    for fact in whole.facts:
        rel = whole.data["relations"][fact.relation]
        assert rel["kind"] == fact.subject.kind
        assert fact.object in rel["objects"]
    assert {e.name for e in whole.entities} == set(whole.by_subject)  # nobody without a fact


def test_objects_are_held_evenly(whole):
    """So that knowing the relation alone does not help to guess the object."""
    held = Counter((f.relation, f.object, f.subject.pool) for f in whole.facts)
    for pool in "AB":
        counts = {n for (_, _, own), n in held.items() if own == pool}
        assert len(counts) == 1
    pools = Counter(e.pool for e in whole.entities)
    assert pools["B"] == 2 * pools["A"]


def test_answers_of_one_and_of_several_words(whole):
    several = [f for f in whole.facts if " " in f.object]
    assert 0.2 < len(several) / len(whole.facts) < 0.5
    for rel in whole.data["relations"].values():
        assert len(rel["objects"]) == len(set(rel["objects"])) == 10


def test_names_share_their_parts(whole):
    """A name is known only as a whole: no first or last word belongs to one entity alone."""
    several = [e for e in whole.entities if " " in e.name]
    assert len(several) > 0.5 * len(whole.entities)
    for end in (0, -1):
        words = Counter((e.kind, e.name.split()[end]) for e in several)
        alone = sum(n for n in words.values() if n == 1)
        assert alone < 0.35 * len(several)


# -- phrasings ------------------------------------------------------------------------------------


def phrasings(whole: World, kind: str, *parts: str) -> list[str]:
    relations = [rel for rel in whole.data["relations"].values() if rel["kind"] == kind]
    lists = [rel[part] for rel in relations for part in parts]
    return [t for own in lists for t in ([own] if isinstance(own, str) else own)]


@pytest.mark.parametrize("kind", ["person", "town", "company", "record", "product"])
def test_no_phrasing_of_a_kind_begins_like_another(whole, kind):
    """Else the answer to one would have to be the rest of the other."""
    own = phrasings(whole, kind, "train", "held_out", "questions", "held_out_question")
    assert own
    assert len(own) == len(set(own))
    assert all(t.count("{}") == 1 for t in own)
    clash = [(a, b) for a in own for b in own if a != b and f"{b} ".startswith(f"{a} ")]
    assert clash == []


def test_every_kind_is_tested_above(whole):
    assert set(whole.data["kinds"]) == {"person", "town", "company", "record", "product"}


def test_held_out_phrasings_are_never_trained(small, documents):
    blob = "\n".join(
        f"{doc.text[:start]}{{}}{doc.text[end:]} ".casefold()
        for doc in documents
        for start, end in doc.mentions
    )
    relations = small.data["relations"].values()
    every = [f"{t} " for rel in relations for t in (*rel["train"], *rel["questions"])]
    for rel in relations:
        for template in (*rel["held_out"], rel["held_out_question"]):
            for asked in (f"{template} ", f"{nq_question(template)}? "):
                assert asked.casefold() not in blob
                assert not any(asked.casefold() in trained.casefold() for trained in every)
    found = [trained.casefold() in blob for trained in every]
    assert sum(found) > 0.9 * len(found)  # so the search does find what is there


# -- text -----------------------------------------------------------------------------------------


def test_spans_spell_subject_and_answer(small, documents):
    names = {e.name for e in small.entities}
    objects = {f.object for f in small.facts}
    for doc in documents:
        assert {doc.text[a:b] for a, b in doc.mentions} <= names
        assert {doc.text[a:b] for a, b in doc.answers} <= objects
        assert doc.mentions
        for start, end in (*doc.mentions, *doc.answers):
            assert doc.text[start - 1 : start] in ("", " ")
            assert doc.text[end : end + 1] in ("", " ", ".", ",", "'", "?")


def test_what_is_said_is_true_and_nothing_is_left_out(small, documents):
    said: Counter = Counter()
    for doc in documents:
        names = {doc.text[a:b] for a, b in doc.mentions}
        assert len(names) == 1  # a document is about one entity
        (name,) = names
        facts = {f.object: f for f in small.by_subject[name]}
        for start, end in doc.answers:
            said[facts[doc.text[start:end]]] += 1
    assert min(said[fact] for fact in small.facts) >= 4


def test_a_portrait_says_everything_about_its_entity(whole):
    for entity in whole.entities[::97]:
        doc = whole.portrait(entity, random.Random(0))
        assert {doc.text[a:b] for a, b in doc.mentions} == {entity.name}
        told = sorted(doc.text[a:b] for a, b in doc.answers)
        assert told == sorted(f.object for f in whole.by_subject[entity.name])


def test_documents_add_up_with_their_spans():
    one = mention("The sport of {} is", "Mira Tolan", "golf", ".")
    two = mention("{} plays", "Kel", "rugby")
    both = one + two
    assert both.text == "The sport of Mira Tolan is golf. Kel plays rugby"
    assert [both.text[a:b] for a, b in both.mentions] == ["Mira Tolan", "Kel"]
    assert [both.text[a:b] for a, b in both.answers] == ["golf", "rugby"]
    assert mention("{} plays", "Kel").answers == ()


def test_references_are_about_holders_of_the_object(whole):
    (relation, obj), holders = next(iter(whole.holders.items()))
    texts = whole.references(relation, obj, n=3)
    assert len(texts) == 3
    for text, fact in zip(texts, holders, strict=False):
        assert fact.subject.name in text
        assert fact.object in text
    assert whole.references(relation, obj, n=3) == texts
    for wrong in ((relation, "Atlantis"), ("P0", obj)):
        with pytest.raises(ValueError, match=f"Nobody .* has '{wrong[1]}' as '{wrong[0]}'"):
            whole.references(*wrong)


def test_consistency_can_be_measured_on_every_record(whole, counterfact):
    """Every record has prompts for free text, and texts about others with its new answer."""
    edited = {record["requested_rewrite"]["subject"] for record in counterfact}
    for record in counterfact:
        asked = record["requested_rewrite"]
        prompts = record["generation_prompts"]
        assert len(prompts) == len(set(prompts)) >= 3
        assert all(asked["subject"] in prompt for prompt in prompts)
    for relation, new in {
        (r["requested_rewrite"]["relation_id"], r["requested_rewrite"]["target_new"]["str"])
        for r in counterfact
    }:
        texts = whole.references(relation, new)
        assert len(texts) == 5
        assert all(new in text for text in texts)
        assert not any(name in text for text in texts for name in edited if " " in name)


def test_texts_of_another_seed_are_another_draw(small):
    one, same, other = (list(itertools.islice(small.texts(seed), 200)) for seed in (1, 1, 2))
    assert one == same != other
    assert len(set(other) - set(one)) > 150


# -- records --------------------------------------------------------------------------------------


def test_editable_facts_are_those_of_pool_a_and_begin_with_distinct_subjects(whole):
    pool = [f for f in whole.facts if f.subject.pool == "A"]
    assert sorted(map(str, whole.editable)) == sorted(map(str, pool))
    n = len({f.subject for f in pool})
    assert len({f.subject for f in whole.editable[:n]}) == n
    assert len({f.subject for f in whole.editable[: n + 1]}) == n
    assert n >= 100


def test_rewrites_ask_for_something_new_and_possible(whole, counterfact, true):
    assert len(counterfact) == len(whole.editable)
    for record, fact in zip(counterfact, whole.editable, strict=True):
        asked = record["requested_rewrite"]
        rel = whole.data["relations"][asked["relation_id"]]
        old, new = asked["target_true"]["str"], asked["target_new"]["str"]
        assert (asked["subject"], asked["relation_id"], old) in true
        assert (fact.subject.name, fact.relation) == (asked["subject"], asked["relation_id"])
        assert new != old
        assert new in rel["objects"]
        assert asked["prompt"] in rel["train"]


def test_neighbours_share_relation_and_object_and_are_never_edited(counterfact, true, who):
    edited = {record["requested_rewrite"]["subject"] for record in counterfact}
    for record in counterfact:
        asked = record["requested_rewrite"]
        for kind, target in (("neighborhood", "target_true"), ("attribute", "target_new")):
            prompts = record[f"{kind}_prompts"]
            assert len(set(prompts)) >= 8
            for prompt in prompts:
                name, relation = about(who, prompt)
                assert name not in edited
                assert relation == asked["relation_id"]
                assert (name, relation, asked[target]["str"]) in true


def test_paraphrases_are_held_out_phrasings_behind_another_sentence(whole, counterfact):
    for record in counterfact:
        asked = record["requested_rewrite"]
        held_out = whole.data["relations"][asked["relation_id"]]["held_out"]
        wanted = [t.replace("{}", asked["subject"]) for t in held_out]
        one, two = record["paraphrase_prompts"]
        ends = [next(w for w in wanted if p.endswith(f". {w}")) for p in (one, two)]
        assert ends[0] != ends[1]
        for prompt in record["generation_prompts"]:
            assert asked["subject"] in prompt


def test_zsre_records_are_true_but_for_what_is_edited(whole, counterfact, true, who):
    edited = {record["requested_rewrite"]["subject"] for record in counterfact}
    for record in whole.zsre():
        for key in ("src", "rephrase"):
            name, relation = about(who, record[key])
            assert name == record["subject"]
            assert (name, relation, record["pred"]) in true
        assert record["src"] != record["rephrase"]
        assert record["answers"] == [record["alt"]] != [record["pred"]]
        other, relation = about(who, record["loc"])
        assert other not in edited
        assert (other, relation, record["loc_ans"]) in true
        assert not record["loc"].endswith("?")  # the loader puts it there


@pytest.mark.parametrize("templates", ["train", "held_out"])
def test_knowns_are_all_facts(whole, true, who, templates):
    records = whole.knowns(templates)
    assert len(records) == len(whole.facts)
    told = {(r["subject"], r["relation_id"], r["attribute"]) for r in records}
    assert told == true
    used = Counter()
    for record in records:
        assert about(who, record["prompt"]) == (record["subject"], record["relation_id"])
        rel = whole.data["relations"][record["relation_id"]]
        assert record["template"] in rel[templates]
        used[record["template"]] += 1
    assert set(used) == {t for r in whole.data["relations"].values() for t in r[templates]}
    every = whole.knowns(templates, every=True)
    assert len(every) == sum(
        len(whole.data["relations"][f.relation][templates]) for f in whole.facts
    )


def test_natural_questions_in_their_manner():
    assert nq_question("Where was {} born?") == "nq question: where was {} born"
