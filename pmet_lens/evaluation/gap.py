"""What the difference between benchmark scores and free answers is made of, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.data.progress import Tell, shown
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.evaluation.free_answers import CHAT, QA, Asking, target_tokens
from pmet_lens.models import tokens
from pmet_lens.models.model import Model

COLUMNS = (
    *("kind", "setting", "teacher_forcing", "known_length", "frame", "match"),
    *(*metrics.INTERVAL, "change", "change_low", "change_high"),
)


class Setting(NamedTuple):
    """One way to ask and score: what WILD (arXiv 2502.11177) names as the ingredients of flattery,
    each there (True) or not."""

    teacher_forcing: bool
    """The model reads the wanted answer up to each token that it is to say."""
    known_length: bool
    """It is stopped after as many tokens as the wanted answer has."""
    as_edited: bool
    """The prompt is the one that was edited (or stands beside it), without a frame around it."""
    by_token: bool
    """Each right token counts (in %); otherwise only the whole answer."""


BENCHMARK, USER = Setting(True, True, True, True), Setting(False, False, False, False)
WALK: Mapping[str, Setting] = {
    "teacher forcing, per token": BENCHMARK,
    "the whole answer": BENCHMARK._replace(by_token=False),
    "in its own words": Setting(False, True, True, False),
    "length unknown": USER._replace(as_edited=True),
    "in a frame": USER,
}
"""From how benchmarks score to what a user sees, one ingredient less at every step."""


@shown("evaluation gap", "prompt", "on_prompts")
def evaluation_gap(
    model: Model,
    facts: Fact | Sequence[Fact],
    asking: Asking | None = None,
    *,
    kinds: Sequence[str] = ("rewrite", "paraphrase"),
    every: bool = False,
    on_prompts: Tell | None = None,
) -> pd.DataFrame:
    """How much of a score is left when the help of benchmarks is taken away, one part at a time.

    One row per kind of prompt and setting: from "teacher forcing, per token" (as benchmarks score)
    over "the whole answer" (every token has to be right: EA, PA), "in its own words" (no teacher
    forcing, but stopped at the answer's length) and "length unknown" (it ends by itself and may
    talk on: EF, PF) to "in a frame" (in a chat, or as a question). Answers in the model's own words
    count where they contain the wanted one (`contains` of `evaluate`). With `every` all twelve ways
    to combine the ingredients (teacher forcing always knows the length).

    Columns: kind, setting, teacher_forcing, known_length (True or False), frame ("" for the prompt
    as it is), match ("token" or "whole"), mean, ci_low, ci_high (0 to 100, 95 % bootstrap over
    facts), n (facts), change, change_low, change_high: against the first row of the kind, in
    points, facts resampled together.

    Args:
        model: with the edit applied (`with edit.applied(model)`).
        asking: the frame, where an answer ends and the limit. None: in the chat template of the
            tokenizer, else as "Question: … Answer:", up to 32 tokens, to the end of the sentence.
        kinds: of the prompts that `evaluate` asks.

    Raises:
        FactError: for no facts, no prompts of these kinds, or an `asking` without a frame.
        ModelError: for the frame "chat" and a tokenizer without a chat template.
    """
    facts = listed(facts)
    if asking is None:
        chat = getattr(model.tokenizer, "chat_template", None) is not None and not model.frame
        asking = Asking(frame=CHAT if chat else QA)
    if asking.frame is None:
        raise FactError('The last setting needs a frame: Asking(frame="chat"), or a text with {}.')
    rows = [row for row in scoring.prompt_rows(facts) if row["kind"] in kinds]
    if not rows:
        raise FactError(f"The facts have no prompts of kind {', '.join(kinds) or '(none given)'}.")
    settings = dict(WALK)
    if every:
        known = {setting: name for name, setting in WALK.items()}
        combined = [Setting(*flags) for flags in product((True, False), repeat=4)]
        possible = [s for s in combined if s.known_length or not s.teacher_forcing]
        settings = {known.get(s, _words(s)): s for s in possible}
    values: dict[Setting, metrics.Numbers] = {}
    for forced, length, plain in dict.fromkeys(s[:3] for s in settings.values()):
        how = replace(asking, known_length=length, frame=None if plain else asking.frame)
        measure = _forced if forced else _free
        per_token, whole = measure(model, facts, rows, how, on_prompts)
        values[Setting(forced, length, plain, True)] = per_token
        values[Setting(forced, length, plain, False)] = whole
    frame = pd.DataFrame(rows)
    table = []
    for kind in dict.fromkeys(frame["kind"]):
        of_kind = (frame["kind"] == kind).to_numpy()
        facts_of, owner = np.unique(frame.loc[of_kind, "fact"].to_numpy(), return_inverse=True)
        share = 100 / np.bincount(owner, minlength=len(facts_of))
        cases = {s: share * np.bincount(owner, values[s][of_kind]) for s in settings.values()}
        for name, s in settings.items():
            told = "" if s.as_edited else asking.frame
            flags = s.teacher_forcing, s.known_length, told, "token" if s.by_token else "whole"
            change = metrics.change(cases[s], cases[BENCHMARK])[:3]
            table.append((kind, name, *flags, *metrics.interval(cases[s]), *change))
    return pd.DataFrame(table, columns=list(COLUMNS))


def _words(setting: Setting) -> str:
    said = "teacher forcing" if setting.teacher_forcing else "own words"
    length = "" if setting.teacher_forcing else " of its length" * setting.known_length
    match = "per token" if setting.by_token else "whole"
    return f"{said}{length}, {match}{'' if setting.as_edited else ', framed'}"


_Rows = Sequence[dict[str, Any]]
_Pair = tuple[metrics.Numbers, metrics.Numbers]


def _forced(
    model: Model, facts: Sequence[Fact], rows: _Rows, asking: Asking, on_prompts: Tell | None
) -> _Pair:
    """Per row the share of the right tokens, and whether all are, under teacher forcing."""
    other, wrap = asking.framed(model)
    prompts = [
        tokens.Prompt(wrap(row["prompt"]), None, row["wanted"], facts[row["fact"]].blank)
        for row in rows
    ]
    right = np.array([s.right for s in scoring.score(other, prompts, on_prompts=on_prompts)])
    return right, (right == 1).astype(float)


def _free(
    model: Model, facts: Sequence[Fact], rows: _Rows, asking: Asking, on_prompts: Tell | None
) -> _Pair:
    """Per row the share of the wanted tokens that the free answer has at their places, and whether
    it contains an accepted answer."""
    answers = scoring.asked_freely(model, facts, rows, asking, on_prompts)
    prompts = [
        tokens.Prompt(row["prompt"], None, row["wanted"], facts[row["fact"]].blank) for row in rows
    ]
    wanted = target_tokens(model, prompts, asking)
    share = [
        sum(a == b for a, b in zip(ids, answer.tokens, strict=False)) / len(ids)
        for ids, answer in zip(wanted, answers, strict=True)
    ]
    return np.array(share), np.array([float(answer.match.contains) for answer in answers])
