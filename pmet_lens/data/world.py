"""The seeded fact world: invented subjects, real objects, fifteen relations, and text about them.

No pretrained weights can be shipped with a small package, so `pmet_lens` ships a world that small
models can know completely. Because the generator is the ground truth, one can ask what no real
model allows: after an edit, which of *all other* facts are still answered correctly?

A third of the subjects (pool A) carry the facts that benchmark records edit; neighbours and
attribute prompts are only ever about the other two thirds (pool B), so that no neighbour prompt is
about an edited subject. Records come out in the original CounterFact schema and in the zsRE/MEND
schema and are read by the loaders that read the real files (`datasets.py`).

Phrasings, objects and name parts are data: `bundled/world.json`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

Span = tuple[int, int]


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
class Document:
    """A text with the character spans of its subject mentions and of its answers."""

    text: str
    mentions: tuple[Span, ...] = ()
    answers: tuple[Span, ...] = ()

    def __add__(self, other: Document) -> Document:
        """The two texts one after the other, a space between, spans kept."""
        gap = len(self.text) + 1

        def moved(spans: tuple[Span, ...]) -> tuple[Span, ...]:
            return tuple((start + gap, end + gap) for start, end in spans)

        return Document(
            f"{self.text} {other.text}",
            self.mentions + moved(other.mentions),
            self.answers + moved(other.answers),
        )


def mention(template: str, subject: str, answer: str = "", end: str = "") -> Document:
    """`template` with `subject` in its `{}`, then a space, `answer` and `end`."""
    start = template.index("{}")
    text = template.replace("{}", subject)
    answers: tuple[Span, ...] = ()
    if answer:
        answers = ((len(text) + 1, len(text) + 1 + len(answer)),)
        text = f"{text} {answer}"
    return Document(text + end, ((start, start + len(subject)),), answers)


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
        out: dict[str, list[WorldFact]] = {}
        for fact in self.facts:
            out.setdefault(fact.subject.name, []).append(fact)
        return out

    @cached_property
    def holders(self) -> dict[tuple[str, str], list[WorldFact]]:
        """(relation, object) -> the facts of pool B that share them: the neighbours."""
        out: dict[tuple[str, str], list[WorldFact]] = {}
        for fact in self.facts:
            if fact.subject.pool == "B":
                out.setdefault((fact.relation, fact.object), []).append(fact)
        return out

    # -- text ---------------------------------------------------------------------------------

    def filler(self, rng: random.Random) -> Document:
        """One sentence about nobody."""
        parts = {key: rng.choice(values) for key, values in self.data["filler"].items()}
        text = f"{parts['subjects']} {parts['verbs']} {parts['objects']} {parts['when']}."
        return Document(text[0].upper() + text[1:])

    def statement(self, fact: WorldFact, rng: random.Random, lead: float = 0.25) -> Document:
        """The fact in one of its training phrasings, with probability `lead` behind a lead-in."""
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

    def essence(self, entity: Entity, rng: random.Random) -> Document:
        """A sentence that says what kind of thing the entity is."""
        return mention(rng.choice(self.data["kinds"][entity.kind]["essence"]), entity.name)

    def portrait(self, entity: Entity, rng: random.Random) -> Document:
        """An opener about the entity and then its facts in random order."""
        opener = rng.choice(self.data["kinds"][entity.kind]["openers"])
        text = mention(opener, entity.name)
        facts = self.by_subject[entity.name]
        for fact in rng.sample(facts, len(facts)):
            text = text + self.statement(fact, rng, lead=0.0)
        return text

    def documents(self, rng: random.Random) -> Iterator[Document]:
        """One pass over the world: per fact three statements and a question, now and then behind
        a sentence about nobody; per entity an essence sentence and now and then a portrait."""
        out: list[Document] = []
        for fact in self.facts:
            for kind in ("statement", "statement", "statement", "question"):
                doc = getattr(self, kind)(fact, rng)
                out.append(self.filler(rng) + doc if rng.random() < 0.15 else doc)
        for entity in self.entities:
            out.append(self.essence(entity, rng))
            if rng.random() < 0.4:
                out.append(self.portrait(entity, rng))
        rng.shuffle(out)
        yield from out

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

    # -- records ------------------------------------------------------------------------------

    @cached_property
    def editable(self) -> list[WorldFact]:
        """Pool-A facts, shuffled; the first ones have distinct subjects, then seconds, thirds."""
        rng = random.Random(f"editable {self.seed}")
        turns: list[list[WorldFact]] = [[] for _ in range(len(self.data["relations"]))]
        for facts in self.by_subject.values():
            if facts[0].subject.pool == "A":
                for turn, fact in enumerate(rng.sample(facts, len(facts))):
                    turns[turn].append(fact)
        return [fact for turn in turns for fact in rng.sample(turn, len(turn))]

    def _new_object(self, fact: WorldFact, rng: random.Random) -> str:
        return rng.choice(
            [o for o in self.data["relations"][fact.relation]["objects"] if o != fact.object]
        )

    def counterfact(self) -> list[dict[str, Any]]:
        """Records in the original CounterFact schema, one per editable fact.

        The rewrite prompt is a training phrasing, the two paraphrases are held-out phrasings
        behind an unrelated sentence (as in CounterFact), neighbours and attribute prompts are
        about subjects of pool B.
        """
        rng = random.Random(f"counterfact {self.seed}")
        records = []
        for case_id, fact in enumerate(self.editable):
            rel = self.data["relations"][fact.relation]
            new, name = self._new_object(fact, rng), fact.subject.name

            def about(holders: list[WorldFact], templates: list[str] = rel["train"]) -> list[str]:
                return [rng.choice(templates).replace("{}", f.subject.name) for f in holders[:10]]

            records.append(
                {
                    "case_id": case_id,
                    "requested_rewrite": {
                        "prompt": rng.choice(rel["train"]),
                        "relation_id": fact.relation,
                        "target_new": {"str": new},
                        "target_true": {"str": fact.object},
                        "subject": name,
                    },
                    "paraphrase_prompts": [
                        f"{self.filler(rng).text} {t.replace('{}', name)}"
                        for t in rng.sample(rel["held_out"], 2)
                    ],
                    "neighborhood_prompts": about(self.holders[fact.relation, fact.object]),
                    "attribute_prompts": about(self.holders[fact.relation, new]),
                    "generation_prompts": [
                        t.replace("{}", name)
                        for t in self.data["kinds"][fact.subject.kind]["openers"]
                    ],
                }
            )
        return records

    def zsre(self) -> list[dict[str, Any]]:
        """Records in the zsRE/MEND schema, one per editable fact.

        `answers` is what the edit should make the model say, `pred` what it says now, `loc` a
        question about another subject that it answers with `loc_ans`.
        """
        rng = random.Random(f"zsre {self.seed}")
        others = [f for f in self.facts if f.subject.pool == "B"]
        records = []
        for fact in self.editable:
            rel, other = self.data["relations"][fact.relation], rng.choice(others)
            new, name = self._new_object(fact, rng), fact.subject.name
            ask = rng.choice(rel["questions"]).replace("{}", name)
            loc = nq_question(rng.choice(self.data["relations"][other.relation]["questions"]))
            records.append(
                {
                    "subject": name,
                    "src": ask,
                    "pred": fact.object,
                    "rephrase": rel["held_out_question"].replace("{}", name),
                    "alt": new,
                    "answers": [new],
                    "loc": loc.replace("{}", other.subject.name),
                    "loc_ans": other.object,
                    "cond": f"{fact.object} >> {new} || {ask}",
                }
            )
        return records

    def knowns(self, templates: str = "train", every: bool = False) -> list[dict[str, Any]]:
        """Every fact as known_1000.json writes it, in one phrasing of `templates` ("train" or
        "held_out"; which one changes from fact to fact), or in `every` one of them."""
        records = []
        for i, fact in enumerate(self.facts):
            own = self.data["relations"][fact.relation][templates]
            for template in own if every else [own[i % len(own)]]:
                records.append(
                    {
                        "known_id": len(records),
                        "subject": fact.subject.name,
                        "attribute": fact.object,
                        "template": template,
                        "prompt": template.replace("{}", fact.subject.name),
                        "prediction": f" {fact.object}",
                        "relation_id": fact.relation,
                    }
                )
        return records


def nq_question(template: str) -> str:
    """A question in the manner of Natural Questions: lower case, no question mark (the zsRE loader
    puts one behind it, as the published evaluation does)."""
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
        pools = {
            "A": [Entity(name, kind, "A") for name in names[: n // 3]],
            "B": [Entity(name, kind, "B") for name in names[n // 3 :]],
        }
        entities += pools["A"] + pools["B"]
        for pool, share in (("A", per_relation // 3), ("B", per_relation - per_relation // 3)):
            for turn, relation in enumerate(relations):
                objects = data["relations"][relation]["objects"] * (share // 10)
                rng.shuffle(objects)
                for i, obj in enumerate(objects):
                    holder = pools[pool][(turn * share + i) % len(pools[pool])]
                    facts.append(WorldFact(holder, relation, obj))
    return World(seed, data, tuple(entities), tuple(facts))


def _names(kind: str, parts: dict[str, list[str]], rng: random.Random, n: int) -> list[str]:
    """`n` different names of one kind, made of parts that many names share."""
    one = rng.choice

    def draw() -> str:
        if kind == "person":
            return f"{one(parts['given'])} {one(parts['family_head'])}{one(parts['family_tail'])}"
        if kind == "town":
            return one(parts["town_head"]) + one(parts["town_tail"])
        if kind == "record":
            return f"The {one(parts['record_first'])} {one(parts['record_last'])}"
        head = one(parts[f"{kind}_head"]) + one(parts[f"{kind}_tail"])
        return f"{head} {one(parts[f'{kind}_last'])}"

    names: dict[str, None] = {}
    while len(names) < n:
        names[draw()] = None
    return list(names)
