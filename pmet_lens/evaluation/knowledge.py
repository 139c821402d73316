"""What a model knows of a list of facts, which lists fit it, which of them it can be edited with,
what else is known of a subject."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from pmet_lens.data import datasets
from pmet_lens.data.fact_tables import FactList
from pmet_lens.data.facts import Fact, FactError, Implication, listed, refused, with_answer
from pmet_lens.data.progress import Tell
from pmet_lens.evaluation import scoring
from pmet_lens.evaluation.real_facts import real_facts
from pmet_lens.models import tokens
from pmet_lens.models.loading import of_the_world
from pmet_lens.models.model import Model

AT_ONCE = 256
"""Facts asked about together."""


def recalled(
    model: Model,
    facts: Fact | Sequence[Fact] | None = None,
    n: int | None = None,
    *,
    on_prompts: Tell | None = None,
) -> list[Fact]:
    """The first `n` (None: all) of the facts whose true answer the model says: `recall` is 1.

    `facts`: with `target_true`. None: those that fit the model: every fact of the bundled world for
    a model of it (`loading.of_the_world`), else `pl.real_facts()`.
    """
    if facts is None:
        facts = datasets.knowns() if of_the_world(model) else real_facts()
    known: list[Fact] = []
    asked = list(with_answer(facts, "target_true", "recall").values()) if facts else []
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        right = scoring.recall(model, some, on_prompts=on_prompts)["correct"]
        known += [fact for fact, one in zip(some, right, strict=True) if one]
        if n is not None and len(known) >= n:
            break
    return known[:n]


def editable(
    model: Model, facts: Fact | Sequence[Fact], contexts: Sequence[str] = ("{}",)
) -> FactList:
    """The facts that one edit can be made of (`pl.edit(..., skip=True)` does this), and in the
    attribute `left_out` a sentence for each other one, also in a warning: no new answer, the
    contradiction of a fact before it, a repetition, or what this tokenizer cannot write or the
    model not read (behind each of the `contexts`, templates such as "I am. {}").

    Raises `FactError` where none is left, or for anything else than facts.
    """
    several = listed(facts)
    wrong: dict[int, FactError] = {}
    for number, fact in enumerate(several):
        try:
            if fact.target_new is not None:
                tokens.encode(model, tokens.prompts_of(fact, contexts, fact.target_new))
        except FactError as error:
            wrong[number] = error
    places = [number for number in range(len(several)) if number not in wrong]
    wrong |= {places[n]: error for n, error in refused([several[number] for number in places])}
    found = FactList(fact for number, fact in enumerate(several) if number not in wrong)
    found.left_out = tuple(f"Fact {n} (counted from 0): {wrong[n]}" for n in sorted(wrong))
    if not found:
        why = found.left_out[0] if wrong else "pass at least one Fact."
        raise FactError(f"There are no facts that can be edited: {why}")
    if wrong:
        told = f"{len(wrong)} of {len(several)} facts are left out (pl.editable lists them in"
        warnings.warn(f"{told} left_out); the first: {found.left_out[0]}", stacklevel=3)
    return found


def with_related(
    facts: Fact | Sequence[Fact], known: Fact | Sequence[Fact] | None = None, n: int | None = None
) -> list[Fact]:
    """The same facts, each with up to `n` (None: all) other facts about its subject as implications
    that must stay, of the kind "relation specificity": what an edit of one relation easily takes
    along, and NS, which asks other subjects, does not see.

    `known`: facts with `target_true`. None: every fact of the bundled world and of
    `pl.real_facts()`. Left out is what has the relation, or the prompt, of the fact itself.
    """
    if known is None:
        known = [*datasets.knowns(), *real_facts()]
    about: dict[str, list[Fact]] = {}
    for other in with_answer(known, "target_true", "with_related").values():
        about.setdefault(other.subject, []).append(other)
    found = []
    for fact in listed(facts):
        others = [
            Implication(other.text, (str(other.target_true),), "relation specificity", True)
            for other in about.get(fact.subject, ())
            if other.text != fact.text and (other.relation or other.text) != fact.relation
        ]
        found.append(replace(fact, implications=(*fact.implications, *others[:n])))
    return found
