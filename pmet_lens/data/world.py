"""The seeded fact world: invented subjects, real objects, fifteen relations, and text about them.

No pretrained weights can be shipped with a small package, so `pmet_lens` ships a world that small
models can know completely. As everything in it is known, one can ask what no real model allows:
after an edit, which of *all other* facts are still answered correctly?

A third of the subjects (pool A) carry the facts that benchmark records edit; neighbours and
attribute prompts are only ever about the other two thirds (pool B), so that no neighbour prompt is
about an edited subject. Records come out in the original CounterFact schema and in the zsRE/MEND
schema and are read by the loaders that read the real files (`datasets.py`).

Phrasings, objects and name parts are data: `bundled/world.json`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from pmet_lens.data.words import Document, mention


@dataclass(frozen=True)
class Entity:
    """An invented subject. `pool` is "A" (may be edited) or "B" (never edited: neighbours)."""

    name: str
    kind: str
    pool: str


@dataclass(frozen=True)
class WorldFact:
    """`subject` stands in `relation` (a Wikidata property id) to `object`."""

    subject: Entity
    relation: str
    object: str


@dataclass(frozen=True)
class World:
    """All entities and facts of one seed. Build with `build`."""

    seed: int
    data: dict[str, Any] = field(repr=False)
    entities: tuple[Entity, ...] = field(repr=False)
    facts: tuple[WorldFact, ...] = field(repr=False)

    @cached_property
    def by_subject(self) -> dict[str, list[WorldFact]]:
        """Subject name -> its facts."""
        facts: dict[str, list[WorldFact]] = {}
        for fact in self.facts:
            facts.setdefault(fact.subject.name, []).append(fact)
        return facts

    @cached_property
    def holders(self) -> dict[tuple[str, str], list[WorldFact]]:
        """(relation, object) -> the facts of pool B that share them: the neighbours."""
        facts: dict[tuple[str, str], list[WorldFact]] = {}
        for fact in self.facts:
            if fact.subject.pool == "B":
                facts.setdefault((fact.relation, fact.object), []).append(fact)
        return facts

    def filler(self, rng: random.Random) -> Document:
        """One sentence about nobody."""
        parts = {key: rng.choice(values) for key, values in self.data["filler"].items()}
        text = f"{parts['subjects']} {parts['verbs']} {parts['objects']} {parts['when']}."
        return Document(text[0].upper() + text[1:])

    def statement(self, fact: WorldFact, rng: random.Random, lead: float = 0.25) -> Document:
        """The fact in one of its training phrasings, with probability `lead` after a lead-in."""
        template = rng.choice(self.data["relations"][fact.relation]["train"])
        if rng.random() < lead:
            first = template[0].lower() if template.startswith("The ") else template[0]
            template = f"{rng.choice(self.data['leads'])} {first}{template[1:]}"
        return mention(template, fact.subject.name, fact.object, ".")

    def question(self, fact: WorldFact, rng: random.Random) -> Document:
        """The fact as a question with its answer: zsRE style, or Natural Questions style."""
        template = rng.choice(self.data["relations"][fact.relation]["questions"])
        if rng.random() < 0.4:
            template = f"{nq_question(template)}?"
        return mention(template, fact.subject.name, fact.object)

    def portrait(self, entity: Entity, rng: random.Random) -> Document:
        """An opener about the entity and then its facts in random order."""
        text = mention(rng.choice(self.data["kinds"][entity.kind]["openers"]), entity.name)
        facts = self.by_subject[entity.name]
        for fact in rng.sample(facts, len(facts)):
            text += self.statement(fact, rng, lead=0.0)
        return text

    def documents(self, rng: random.Random) -> Iterator[Document]:
        """One pass over the world: per fact three statements and a question, now and then after a
        sentence about nobody; per entity what kind of thing it is, and now and then a portrait."""
        documents: list[Document] = []
        for fact in self.facts:
            for write in (*[self.statement] * 3, self.question):
                document = write(fact, rng)
                documents.append(self.filler(rng) + document if rng.random() < 0.15 else document)
        for entity in self.entities:
            essence = rng.choice(self.data["kinds"][entity.kind]["essence"])
            documents.append(mention(essence, entity.name))
            if rng.random() < 0.4:
                documents.append(self.portrait(entity, rng))
        rng.shuffle(documents)
        yield from documents

    def texts(self, seed: int = 1) -> Iterator[str]:
        """The text of `documents`, pass after pass, without end."""
        rng = random.Random(f"texts {self.seed} {seed}")
        while True:
            yield from (doc.text for doc in self.documents(rng))

    def references(self, relation: str, obj: str, n: int = 5) -> list[str]:
        """Up to `n` texts about pool-B subjects whose `relation` is `obj`: what texts about a
        subject should be like after an edit to `obj` (for consistency, RS).

        Raises `ValueError` where nobody in pool B has that relation to `obj`.
        """
        if (relation, obj) not in self.holders:
            raise ValueError(f"Nobody in this world has {obj!r} as {relation!r}.")
        rng = random.Random(f"references {self.seed} {relation} {obj}")
        return [self.portrait(f.subject, rng).text for f in self.holders[relation, obj][:n]]

    @cached_property
    def editable(self) -> list[WorldFact]:
        """Pool-A facts, shuffled; the first ones have distinct subjects, then seconds, thirds."""
        rng = random.Random(f"editable {self.seed}")
        editable = [facts for facts in self.by_subject.values() if facts[0].subject.pool == "A"]
        orders = [rng.sample(facts, len(facts)) for facts in editable]
        turns = [[f for f in turn if f is not None] for turn in zip_longest(*orders)]
        return [fact for turn in turns for fact in rng.sample(turn, len(turn))]

    def _new_object(self, fact: WorldFact, rng: random.Random) -> str:
        objects = self.data["relations"][fact.relation]["objects"]
        return rng.choice([obj for obj in objects if obj != fact.object])

    def counterfact(self) -> list[dict[str, Any]]:
        """Records in the original CounterFact schema, one per editable fact.

        The rewrite prompt is a training phrasing, the two paraphrases are held-out phrasings
        after an unrelated sentence (as in CounterFact), neighbours and attribute prompts are
        about subjects of pool B.
        """
        rng = random.Random(f"counterfact {self.seed}")
        return [self._counterfact(i, fact, rng) for i, fact in enumerate(self.editable)]

    def _counterfact(self, case_id: int, fact: WorldFact, rng: random.Random) -> dict[str, Any]:
        phrasings = self.data["relations"][fact.relation]
        new, name = self._new_object(fact, rng), fact.subject.name
        openers = self.data["kinds"][fact.subject.kind]["openers"]

        def neighbours(obj: str) -> list[str]:
            holders = self.holders[fact.relation, obj][:10]
            return [rng.choice(phrasings["train"]).format(f.subject.name) for f in holders]

        return {
            "case_id": case_id,
            "requested_rewrite": {
                "prompt": rng.choice(phrasings["train"]),
                "relation_id": fact.relation,
                "target_new": {"str": new},
                "target_true": {"str": fact.object},
                "subject": name,
            },
            "paraphrase_prompts": [
                f"{self.filler(rng).text} {template.format(name)}"
                for template in rng.sample(phrasings["held_out"], 2)
            ],
            "neighborhood_prompts": neighbours(fact.object),
            "attribute_prompts": neighbours(new),
            "generation_prompts": [opener.format(name) for opener in openers],
        }

    def zsre(self) -> list[dict[str, Any]]:
        """Records in the zsRE/MEND schema, one per editable fact.

        `answers` is what the edit should make the model say, `pred` what it says now, `loc` a
        question about another subject that it answers with `loc_ans`.
        """
        rng = random.Random(f"zsre {self.seed}")
        others = [f for f in self.facts if f.subject.pool == "B"]
        records = []
        for fact in self.editable:
            phrasings, other = self.data["relations"][fact.relation], rng.choice(others)
            new, name = self._new_object(fact, rng), fact.subject.name
            question = rng.choice(phrasings["questions"]).format(name)
            locality = rng.choice(self.data["relations"][other.relation]["questions"])
            record = {
                "subject": name,
                "src": question,
                "pred": fact.object,
                "rephrase": phrasings["held_out_question"].format(name),
                "alt": new,
                "answers": [new],
                "loc": nq_question(locality).format(other.subject.name),
                "loc_ans": other.object,
                "cond": f"{fact.object} >> {new} || {question}",
            }
            records.append(record)
        return records

    def knowns(self, templates: str = "train", every: bool = False) -> list[dict[str, Any]]:
        """Every fact as known_1000.json writes it, in one phrasing of `templates` ("train" or
        "held_out"; which one changes from fact to fact), or in `every` one of them."""
        records = []
        for i, fact in enumerate(self.facts):
            phrasings = self.data["relations"][fact.relation][templates]
            for template in phrasings if every else [phrasings[i % len(phrasings)]]:
                record = {
                    "known_id": len(records),
                    "subject": fact.subject.name,
                    "attribute": fact.object,
                    "template": template,
                    "prompt": template.format(fact.subject.name),
                    "prediction": f" {fact.object}",
                    "relation_id": fact.relation,
                }
                records.append(record)
        return records


def nq_question(template: str) -> str:
    """A question in the manner of Natural Questions: lower case, no question mark (the zsRE loader
    adds one, as the published evaluation does)."""
    return "nq question: " + template[0].lower() + template[1:].rstrip("?")


def build(seed: int = 0, per_relation: int = 150) -> World:
    """The world of `seed`: `per_relation` facts for each of the fifteen relations.

    `per_relation` is a multiple of 30: ten objects, each held by a twentieth of the pool-A and a
    tenth of the pool-B subjects alike.
    """
    if per_relation % 30 or per_relation <= 0:
        raise ValueError(f"per_relation must be a positive multiple of 30, not {per_relation}.")
    data = json.loads(files("pmet_lens").joinpath("bundled/world.json").read_text("utf-8"))
    rng = random.Random(f"world {seed}")
    entities: list[Entity] = []
    facts: list[WorldFact] = []
    for kind in data["kinds"]:
        relations = [r for r, rel in data["relations"].items() if rel["kind"] == kind]
        n = per_relation * (3 if len(relations) > 3 else 1)
        names = _names(kind, data["names"], rng, n)
        share = per_relation // 3
        pools = (("A", names[: n // 3], share), ("B", names[n // 3 :], per_relation - share))
        for pool, members, share in pools:
            subjects = [Entity(name, kind, pool) for name in members]
            entities += subjects
            for turn, relation in enumerate(relations):
                objects = data["relations"][relation]["objects"] * (share // 10)
                rng.shuffle(objects)
                for i, obj in enumerate(objects):
                    subject = subjects[(turn * share + i) % len(subjects)]
                    facts.append(WorldFact(subject, relation, obj))
    return World(seed, data, tuple(entities), tuple(facts))


def _names(kind: str, parts: dict[str, list[str]], rng: random.Random, n: int) -> list[str]:
    """`n` different names of one kind, made of parts that many names share."""
    patterns = {
        "person": "{given} {family_head}{family_tail}",
        "town": "{town_head}{town_tail}",
        "record": "The {record_first} {record_last}",
        "company": "{company_head}{company_tail} {company_last}",
        "product": "{product_head}{product_tail} {product_last}",
    }
    names: dict[str, None] = {}  # a set that keeps the order
    while len(names) < n:
        names[re.sub(r"{(\w+)}", lambda part: rng.choice(parts[part[1]]), patterns[kind])] = None
    return list(names)
