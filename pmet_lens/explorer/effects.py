"""What an edit changes beside the words it was made with, in full sentences: other phrasings, what
follows from it, what has to stay, and ten prompts about other things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pmet_lens.data import datasets, markup
from pmet_lens.data.facts import Fact
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.targets import OnStep
from pmet_lens.evaluation.free_answers import Answer, Asking, free_answers, normalised
from pmet_lens.evaluation.metrics import where
from pmet_lens.explorer.session import OnProgress, Session, Step
from pmet_lens.models import loading, tokens
from pmet_lens.models.model import Model

OTHER_THINGS = (
    "The chemical symbol for gold is",
    "Water freezes when its temperature falls below",
    "The play Romeo and Juliet was written by",
    "The largest planet of the solar system is",
    "A week has seven days, and a year has",
    "The opposite of hot is",
    "Two plus two is",
    "The sun rises in the",
    "Once upon a time there was a little girl who",
    "To bake bread, you need flour, water and",
)
"""Prompts for models of the real world; of the bundled world, ten of its facts are asked."""
KINDS: Mapping[str, str] = {
    "fact": "The fact, and other words for it",
    "follows": "What follows from it",
    "stays": "What has to stay",
    "other": "Ten prompts about other things",
}
COLUMNS = ("edit", "kind", "prompt", "wanted", "before", "after", "changed", "right")
LIMIT = 32
"""Tokens of an answer at most."""


@dataclass(frozen=True)
class Asked:
    """A prompt whose answer an edit may change."""

    kind: str
    prompt: str
    answers: tuple[str, ...] = ()
    """Those that are right after the edit; none: nobody says."""


def asked_of(model: Model, fact: Fact) -> list[Asked]:
    """What is asked about an edit of `fact`: the fact and its paraphrases, `implications` and
    `portability`, and ten prompts about other things, which are the same for every fact."""
    new = tuple(filter(None, (fact.target_new, *fact.aliases)))
    asked = [Asked("fact", prompt, new) for prompt in (fact.text, *fact.paraphrases)]
    for one in fact.implications:
        asked.append(Asked("stays" if one.stays else "follows", one.prompt, one.answers))
    asked += [Asked("follows", prompt, (answer,)) for prompt, answer in fact.portability]
    return asked + [Asked("other", prompt) for prompt in other_things(model, fact)]


def other_things(model: Model, fact: Fact) -> Sequence[str]:
    """`OTHER_THINGS`; of a model of the bundled world ten of its facts, about other subjects."""
    if not loading.of_the_world(model):
        return OTHER_THINGS
    known = [f.text for f in datasets.knowns() if f.subject != fact.subject]
    return known[:: len(known) // len(OTHER_THINGS)][: len(OTHER_THINGS)]


def effects(
    model: Model, fact: Fact, edits: Mapping[str, Edit], on_progress: OnProgress | None = None
) -> pd.DataFrame:
    """What `model` says freely, to the end of the sentence (at most 32 tokens), without and with
    each of the edits (which may be on it, and are left as they are).

    One row per edit and prompt: edit (its name), kind ("fact", "follows", "stays", "other"),
    prompt, wanted (the first of the answers that are right then, or None), before, after, changed
    (not the same after `free_answers.normalised`), right (one of them stands in it; None where
    nobody says which are).
    """
    asked, tables = asked_of(model, fact), []
    said = {}
    for n, name in enumerate(["", *edits]):
        if on_progress is not None:
            what = f"sentences with {name}" if name else "sentences before"
            on_progress(n, len(edits) + 1, what)
        if not name:
            with _without(model, edits):
                said[name] = _said(model, asked)
            continue
        with _without(model, edits), edits[name].applied(model):
            said[name] = _said(model, asked)
    for name in edits:
        rows = [_row(*row) for row in zip(asked, said[""], said[name], strict=True)]
        tables.append(pd.DataFrame(rows).assign(edit=name))
    return pd.concat(tables, ignore_index=True).reindex(columns=list(COLUMNS))


def side_by_side(
    session: Session,
    fact: Fact,
    edits: Mapping[str, tuple[str, Mapping[str, Any]]],
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """Edits of one fact next to each other, each alone on the unedited model, which is left as it
    was: the table of `effects`.

    `edits`: name → (method, fields of its settings that differ), as `Session.edit` takes them:
    {"published": ("PMET", {}), "fewer steps": ("PMET", {"n_steps": 10})}.

    Raises:
        FactError, SettingsError, SolveError: as `pl.edit` does.
    """
    return compared(session, fact, edits, on_step, on_progress)[0]


def compared(
    session: Session,
    fact: Fact,
    edits: Mapping[str, tuple[str, Mapping[str, Any]]],
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[pd.DataFrame, dict[str, Step]]:
    """`side_by_side`, and the edits themselves, none of which is on the model."""
    steps: dict[str, Step] = {}
    with session.model.live_edits.bare():
        for name, (method, change) in edits.items():
            steps[name] = session.trial(fact, method, change, on_step, on_progress)
        made = {name: step.edit for name, step in steps.items()}
        return effects(session.model, fact, made, on_progress), steps


def shown(table: pd.DataFrame) -> str:
    """HTML of `effects`: a table per kind of prompt, an answer that changed marked with ≠, and
    whether it is right with ✓ or ✗."""
    parts, edits = [], list(dict.fromkeys(table["edit"]))
    for kind, title in KINDS.items():
        rows: dict[str, list[object]] = {}
        of_kind = where(table, kind=kind)
        for row in of_kind.to_dict("records"):
            first = [row["prompt"], *([row["wanted"]] if kind != "other" else []), row["before"]]
            rows.setdefault(row["prompt"], first).append(_marked(row))
        if rows:
            counts = {e: int(where(of_kind, edit=e)["changed"].sum()) for e in edits}
            n = "; ".join(f"{count} changed by {e}" for e, count in counts.items())
            caption = f"{title}: {n} (of {len(rows)})."
            wanted = ["right"] if kind != "other" else []
            head = ["prompt", *wanted, "before", *(f"with {name}" for name in edits)]
            parts.append(markup.table(list(rows.values()), head, caption))
    return "".join(parts)


def _marked(row: Mapping[Any, Any]) -> markup.Raw:
    text = markup.escape(row["after"] or "(nothing)")
    right = {True: " ✓", False: " ✗"}.get(row["right"], "")
    return markup.Raw(f"<b>≠ {text}</b>{right}" if row["changed"] else f"{text}{right}")


@contextmanager
def _without(model: Model, edits: Mapping[str, Edit]) -> Iterator[None]:
    with ExitStack() as stack:
        for edit in edits.values():
            stack.enter_context(model.live_edits.without(edit))
        yield


def _said(model: Model, asked: Sequence[Asked]) -> list[Answer]:
    prompts = [tokens.Prompt(one.prompt, None) for one in asked]
    accepted = [one.answers or ("?",) for one in asked]
    return free_answers(model, prompts, accepted, asking=Asking(limit=LIMIT))


def _row(one: Asked, before: Answer, after: Answer) -> dict[str, Any]:
    texts = [f"{a.text} …" if a.ended == "limit" else a.text for a in (before, after)]
    return {
        "kind": one.kind,
        "prompt": one.prompt,
        "wanted": one.answers[0] if one.answers else None,
        "before": texts[0],
        "after": texts[1],
        "changed": normalised(before.text) != normalised(after.text),
        "right": after.match.contains if one.answers else None,
    }
