"""Facts of the real world that may lie in this repository: a few hundred over seventeen relations.

Facts only, such as language models know them; prompts, paraphrases and the second hop are written
for this package. The data is `bundled/real_facts.json`: per relation its phrasings and, by answer,
its subjects; the tables that lead from an answer on; and other names of answers.
"""

from __future__ import annotations

import json
import random
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from pmet_lens.data.facts import Fact, FactError, Implication

NEIGHBOURS = 6
"""Neighbours of a fact: those with the same true answer first, others of the relation then."""


def real_facts(n: int | None = None, relation: str | None = None) -> list[Fact]:
    """The first `n` facts of the real world (None: all), or of one `relation`.

    They come relation by relation in turn, so that the first ones are of every kind. Each has an
    invented `target_new` (another answer of its relation, drawn by a fixed rule), the true answer,
    two paraphrases, up to six neighbours (other subjects with the same true answer where there are
    such, in any relation), other names of the new answer (`aliases`) and, where the new answer
    leads on to another, a second hop (`implications`). What a model knows of them: `pl.recalled`;
    what must stay of the same subject: `pl.with_related`.

    Raises:
        FactError: for a relation that is not there (the message names all), or a negative `n`.
    """
    data = json.loads(files("pmet_lens").joinpath("bundled/real_facts.json").read_text("utf-8"))
    relations = data["relations"]
    if n is not None and n < 0:
        raise FactError(f"n must be at least 0 or None, not {n}.")
    if relation is not None and relation not in relations:
        raise FactError(f"There is no relation {relation!r}; choose from {', '.join(relations)}.")
    known = [
        (name, subject, answer)
        for name, one in relations.items()
        for answer, subjects in one["answers"].items()
        for subject in subjects
    ]
    # In a fixed random order, then one of each relation in turn.
    shuffled = random.Random("real facts").sample(known, len(known))
    chosen = [name for name in relations if relation in (None, name)]
    turns = zip_longest(*([one for one in shuffled if one[0] == name] for name in chosen))
    order = [one for turn in turns for one in turn if one is not None]
    return [_fact(data, shuffled, i, *one) for i, one in enumerate(order[:n])]


def _fact(
    data: dict[str, Any],
    known: list[tuple[str, str, str]],
    case_id: int,
    relation: str,
    subject: str,
    true: str,
) -> Fact:
    one = data["relations"][relation]
    rng = random.Random(f"real facts {relation} {subject}")
    new = rng.choice([answer for answer in one["answers"] if answer != true])
    paraphrases = tuple(template.replace("{}", subject) for template in one["paraphrases"])
    same = [other for other in known if other[2] == true]
    rest = [other for other in known if other[0] == relation and other[2] not in (true, new)]
    neighbours = []
    for name, other, answer in [*same, *rest]:
        prompt = data["relations"][name]["prompt"].replace("{}", other)
        if subject not in prompt and len(neighbours) < NEIGHBOURS:
            neighbours.append((prompt, answer))
    return Fact(
        subject,
        one["prompt"],
        new,
        true,
        paraphrases,
        tuple(neighbours),
        generation=paraphrases[:1],
        relation=relation,
        case_id=case_id,
        aliases=tuple(data["aliases"].get(new, ())),
        implications=_second_hop(data, one, subject, true, new),
    )


def _second_hop(
    data: dict[str, Any], relation: dict[str, Any], subject: str, true: str, new: str
) -> tuple[Implication, ...]:
    """What follows from the new answer and did not from the true one."""
    hop = relation["hop"]
    if hop is None:
        return ()
    leads = {a: to for to, answers in data["tables"][hop["table"]].items() for a in answers}
    if leads[new] == leads[true]:
        return ()
    answers = (leads[new], *data["aliases"].get(leads[new], ()))
    return (Implication(hop["prompt"].replace("{}", subject), answers, "second hop"),)
