"""What a model says when it is only asked, and whether that is right.

Teacher forcing hands a model the answer token by token and asks for the next one. Here it says the
answer itself, greedily, until it ends, as a user sees it (WILD, arXiv 2502.11177).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pmet_lens.data.facts import FactError
from pmet_lens.data.progress import Tell, shown
from pmet_lens.data.words import ends_word
from pmet_lens.models import chat, tokens
from pmet_lens.models.generation import said
from pmet_lens.models.model import Model

CHAT = "chat"
QA = "Question: {}\nAnswer:"
"""A frame for models that only continue text."""
Until = Literal["sentence", "line", "token"]
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_POINT = re.compile(r"(?<=\d)\.(?=\d)")


@dataclass(frozen=True)
class Asking:
    """How free answers are asked for; `pl.evaluate(model, facts, free=Asking(frame="chat"))`."""

    frame: str | None = None
    """None: the prompt as it was edited. "chat": as the message of a user, in the tokenizer's chat
    template. Else a text with one `{}` for the prompt, such as "Question: {}\\nAnswer:"."""
    until: Until = "sentence"
    """Where an answer ends: with its sentence, its line, or only with an end token (as WILD has
    it; few models that only continue text ever say one). An end token always ends it, a line ends
    a sentence."""
    limit: int = 32
    """The most tokens of an answer, at least 1."""
    known_length: bool = False
    """Whether the model is stopped after as many tokens as the wanted answer has, which a user
    cannot do. `until` and `limit` then say nothing."""

    def __post_init__(self) -> None:
        if self.frame not in (None, CHAT) and str(self.frame).count("{}") != 1:
            raise FactError(
                f'frame must be None, "chat", or a text with one {{}} for the prompt, not '
                f"{self.frame!r}."
            )
        if self.until not in get_args(Until):
            raise FactError(
                f"until must be one of {', '.join(get_args(Until))}, not {self.until!r}."
            )
        if not isinstance(self.limit, int) or self.limit < 1:
            raise FactError(f"limit must be a whole number of tokens ≥ 1, not {self.limit!r}.")

    def framed(self, model: Model) -> tuple[Model, Callable[[str], str]]:
        """The model as it is to be asked (a chat model, if it was none; weights are shared), and
        what makes of a prompt what is asked.

        Raises `ModelError` for the frame "chat" and a tokenizer without a chat template.
        """
        frame = self.frame
        if frame is None or (frame == CHAT and model.frame):
            return model, str
        if frame == CHAT:
            return chat.framed(model, "{}"), str
        return model, lambda prompt: frame.replace("{}", prompt)


@dataclass(frozen=True)
class Match:
    """How an answer compares with the accepted ones."""

    exact: bool
    """It is one of them, after `normalised`."""
    contains: bool
    """One of them stands in it, as whole words."""
    talks_on: bool
    """It begins with one of them and goes on."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    text: str
    ended: str
    """What ended it: "sentence", "line", "token" (an end token), "limit", or "length" (that of the
    wanted answer, where it was known)."""
    tokens: tuple[int, ...]
    match: Match


def normalised(text: str, gap: str = "") -> str:
    """`text` as SQuAD compares answers (arXiv 1606.05250): lower case, no punctuation (`gap` in its
    place), none of the articles a, an, the, one blank between words.

    Beyond SQuAD: letters and punctuation of every script (Unicode's NFKC, case folding, classes
    P), a point between digits stays (3.5 is not 35), and where nothing would be left, as of "The"
    or "?", that is kept.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    inside = {found.start() for found in _POINT.finditer(text)}
    marks = [i not in inside and _is_mark(letter) for i, letter in enumerate(text)]
    words = "".join(gap if mark else letter for letter, mark in zip(text, marks, strict=True))
    for tried in (_ARTICLES.sub(" ", words), words):
        if left := " ".join(tried.split()):
            return left
    return text


def _is_mark(letter: str) -> bool:
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")


def match(text: str, accepted: Sequence[str], rivals: Sequence[str] = ()) -> Match:
    """Compare what was said with the answers accepted.

    Exact: equal after `normalised`. Contained: as whole words ("Rome" is not in "Romeo"; scripts
    without blanks end words anywhere), with punctuation left out or a blank in its place ("Rome's",
    "Rome-based"). A place inside one of the `rivals` does not count: of "North Korea", "Korea" is
    not the answer.
    """
    exact = contains = talks_on = False
    for gap in ("", " "):
        own = normalised(text, gap) if text.strip() else ""
        right = [normalised(answer, gap) for answer in accepted]
        wrong = {normalised(rival, gap) for rival in rivals}.difference(right)
        exact |= not gap and own in right
        masked = [place for rival in wrong for place in _places(own, rival)]
        for answer in right:
            for start, stop in _places(own, answer):
                if not any(a <= start and stop <= b for a, b in masked):
                    contains = True
                    talks_on |= start == 0 and stop < len(own)
    return Match(exact, contains or exact, talks_on and not exact)


def _places(text: str, words: str) -> list[tuple[int, int]]:
    """Where `words` stand in `text` as whole words."""
    starts = [found.start() for found in re.finditer(f"(?={re.escape(words)})", text)]
    ends = [(at, at + len(words)) for at in starts]
    return [(a, b) for a, b in ends if ends_word(text, a) and ends_word(text, b)]


@shown("free answers", "prompt", "on_prompts")
def free_answers(
    model: Model,
    prompts: Sequence[tokens.Prompt],
    accepted: Sequence[Sequence[str]],
    rivals: Sequence[Sequence[str]] | None = None,
    asking: Asking | None = None,
    *,
    on_prompts: Tell | None = None,
) -> list[Answer]:
    """What the model says to every prompt, and how that compares with the `accepted` answers and
    the `rivals` of each (`match`). Each distinct prompt is asked once, many in one pass, each as if
    it were alone. Of a prompt's target only the length is read, where that is `known_length`.

    Raises:
        FactError: for a prompt without a token.
        ModelError: for the frame "chat" and a tokenizer without a chat template.
    """
    how = Asking() if asking is None else asking
    other, wrap = how.framed(model)
    texts, lengths = [wrap(p.text) for p in prompts], [how.limit] * len(prompts)
    if how.known_length:
        lengths = [len(ids) for ids in target_tokens(model, prompts, how)]
    keys = list(dict.fromkeys(zip(texts, lengths, strict=True)))
    until = None if how.known_length or how.until == "token" else how.until
    tell: Tell = (lambda done, total: None) if on_prompts is None else on_prompts
    found = said(other, [text for text, _ in keys], [n for _, n in keys], until, tell)
    told = dict(zip(keys, found, strict=True))
    answers = []
    against = [()] * len(prompts) if rivals is None else rivals
    for key, right, wrong in zip(zip(texts, lengths, strict=True), accepted, against, strict=True):
        text, ended, ids = told[key]
        ended = "length" if how.known_length and ended == "limit" else ended
        answers.append(Answer(text, ended, tuple(ids), match(text, right, wrong)))
    return answers


def target_tokens(
    model: Model, prompts: Sequence[tokens.Prompt], asking: Asking | None = None
) -> list[list[int]]:
    """The tokens of each prompt's target as the model would say them there."""
    other, wrap = (Asking() if asking is None else asking).framed(model)
    framed = [tokens.Prompt(wrap(p.text), None, p.target, p.blank) for p in prompts]
    labels = tokens.encode(other, framed).labels.tolist() if framed else []
    return [[token for token in row if token != -100] for row in labels]
