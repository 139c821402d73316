"""The records of published benchmarks: how each is recognised, and what of it is where in a
fact."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from pmet_lens.data import datasets
from pmet_lens.data.datasets import Record, marked
from pmet_lens.data.facts import Fact, FactError, Implication

_STAYS = ("relation_specificity", "relation_specifity", "forgetfulness")  # once misspelt
_VERB = re.compile(r" (?:is|are) ")


class Shape(NamedTuple):
    """A published form of records."""

    fits: Callable[[Record], bool]
    facts: Callable[[Record], list[Fact]]
    read_as: str


def every(answer: Any) -> list[str]:
    """All accepted answers, however deep in lists."""
    if isinstance(answer, list | tuple):
        return [text for part in answer for text in every(part)]
    text = "" if answer is None else str(answer).strip()
    return [text] if text else []


def kind_of(name: str) -> str:
    """A kind of implication as it is written here: "relation specificity"."""
    return name.replace("_", " ").strip().lower()


def _easyedit_zsre(row: Record) -> list[Fact]:
    plain = datasets.zsre_fact(row)
    if "portability" not in row:
        return [plain]
    asked, answer = (row["portability"][name] for name in ("New Question", "New Answer"))
    hop = Implication(str(asked), tuple(every(answer)), "reasoning")
    return [
        replace(plain, target_new=row["alt"], target_true=row["answers"][0], implications=(hop,))
    ]


def _ripple(row: Record) -> list[Fact]:
    edit = row["edit"]
    old = edit.get("original_fact", edit.get("previous_fact", {}))
    tests = [(name, test) for name, part in row.items() if isinstance(part, list) for test in part]
    said, before = (str(one.get("prompt", "")).strip().rstrip(".") for one in (edit, old))
    # The verb behind the subject: the last one that both statements have.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(said, before, strict=False))
    same = sum(1 for _ in shared) if before else len(said)
    verbs = [found.end() for found in _VERB.finditer(said, 0, same)]
    if not verbs:
        raise FactError(f"its statement {said!r} has no ' is ' or ' are ' before the answer.")
    prompt = said[: verbs[-1]].strip()
    subject = edit.get("subject_label") or _ripple_subject(edit, prompt, tests)
    follow = [
        Implication(q["prompt"], tuple(answers), kind_of(name), name.lower() in _STAYS)
        for name, test in tests
        for q in test.get("test_queries", [])
        if (answers := every([[a["value"], a.get("aliases", [])] for a in q["answers"]]))
    ]
    return [
        Fact(
            subject,
            marked(prompt, subject),
            edit.get("target_label") or said[verbs[-1] :],
            old.get("target_label") or before[verbs[-1] :] or None,
            relation=edit.get("relation"),
            implications=tuple(follow),
        )
    ]


def _ripple_subject(edit: Record, prompt: str, tests: list[tuple[str, Record]]) -> str:
    """The subject, of which the record has the Wikidata number alone: what follows the words of the
    relation, or else the longest end of the prompt that all questions about it (which ask for
    what stays) share."""
    ends = [prompt[found.end() : prompt.rindex(" ")] for found in re.finditer(r"\bof ", prompt)]
    words = str(edit.get("relation", "")).replace("_", " ").lower()
    named = [end for end in ends if prompt.lower().find(f"{words} of {end.lower()}") >= 0]
    queries = [q for name, t in tests if name.lower() in _STAYS for q in t.get("test_queries", [])]
    own = {q["prompt"] for q in queries if q.get("subject_id") == edit.get("subject_id")}
    shared = [end for end in ends if own and all(end in asked for asked in own)]
    if not (named or shared):
        raise FactError(f"the subject of {prompt!r} is known by its Wikidata number alone.")
    return (named or shared)[0]


def _mquake(row: Record) -> list[Fact]:
    edits, hops = row["requested_rewrite"], row.get("new_single_hops", [])
    asked = {edit["question"] for edit in edits if "question" in edit}
    answers = tuple(every([row["new_answer"], row.get("new_answer_alias", [])]))
    follow = [Implication(q, answers, "multi-hop") for q in row["questions"]]
    follow += [
        Implication(hop["question"], tuple(every([hop["answer"], hop.get("answer_alias", [])])),
                    "single hop", True)
        for hop in hops if hop["question"] not in asked
    ]  # fmt: skip
    names = {hop["question"]: every(hop.get("answer_alias", [])) for hop in hops}
    return [
        Fact(
            edit["subject"],
            edit["prompt"],
            edit["target_new"]["str"],
            edit["target_true"]["str"],
            (edit["question"],) if "question" in edit else (),
            relation=edit.get("relation_id"),
            case_id=row.get("case_id"),
            aliases=tuple(names.get(edit.get("question"), [])),
            implications=tuple(follow) if i == 0 else (),
        )
        for i, edit in enumerate(edits)
    ]


SHAPES = (
    Shape(
        lambda r: isinstance(r.get("requested_rewrite"), list),
        _mquake,
        "MQuAKE: a fact per requested_rewrite, its question as paraphrase; questions as "
        'implications ("multi-hop") of the first fact of the case, new single hops that are not '
        "edited as ones that stay; left out: the answers of before and the triples. Cases are "
        "meant to be edited one at a time.",
    ),
    Shape(
        lambda r: "requested_rewrite" in r,
        lambda r: [datasets.counterfact_fact(r)],
        "CounterFact: paraphrase, neighbourhood, attribute and generation prompts; left out: "
        "pararel_idx and Wikidata numbers.",
    ),
    Shape(
        lambda r: isinstance(r.get("edit"), Mapping),
        _ripple,
        "RippleEdits: the statement before its last 'is' as prompt, the rest as new (and of the "
        "previous fact as true) answer; each test query is an implication of its own, those of "
        "Relation_Specificity and Forgetfulness have to stay; left out: condition queries, AND and "
        "OR between queries, queries without an answer.",
    ),
    Shape(
        lambda r: {"src", "answers"} <= {*r},
        _easyedit_zsre,
        "zsRE: src as prompt, answers[0] as the new answer (with a portability question, as "
        "EasyEdit has it: alt as the new and answers[0] as the true one), rephrase as paraphrase, "
        "loc as neighbour; left out: pred, cond.",
    ),
    Shape(
        lambda r: {"known_id", "attribute"} <= {*r},
        lambda r: [datasets.parse_known(r)],
        "Known statements: attribute as the true answer, nothing to edit; left out: prediction.",
    ),
)
