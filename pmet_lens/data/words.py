"""Where in a text words, lines and sentences end, which scripts write no blanks between words, and
texts that know where their subjects and answers stand, as training on them needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Span = tuple[int, int]
End = Literal["sentence", "line"]

# Blocks of the Unicode standard, first and last code point.
_NO_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana, more
    (0x3400, 0x4DBF),  # Han, more
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, for compatibility
    (0x20000, 0x3FFFF),  # Han, more
)
_HANGUL = ((0x1100, 0x11FF), (0xAC00, 0xD7FF))
# A full stop, "!" or "?" before a blank or the end; those of other scripts need no blank.
_STOP = re.compile(r"[.!?]+(?=\s|$)|[\u3002\uff01\uff1f\uff61\u0964\u061f\u06d4]")
# "J. K. Rowling", "U.S. Navy", "St. Louis": these full stops end no sentence.
_SHORT = re.compile(r"\b(?:[^\W\d_](?:\.[^\W\d_])*|St|Mt|Ft|Dr|Mr|Mrs|Ms|Jr|Sr|vs)\.$")


def _lies_in(letter: str, blocks: tuple[Span, ...]) -> bool:
    return any(first <= ord(letter) <= last for first, last in blocks)


def writes_blanks(text: str) -> bool:
    """Whether a blank stands between this text and what goes on: by the script of its last letter
    or digit. Korean writes blanks."""
    last = next((letter for letter in reversed(text) if letter.isalnum()), "a")
    return not _lies_in(last, _NO_BLANKS)


def ends_word(text: str, at: int) -> bool:
    """Whether a word may end before `text[at]` (and another begin there): unless letters or digits
    stand on both sides. Scripts without blanks end words anywhere, and Korean puts its particles
    directly behind them."""
    if not 0 < at < len(text):
        return True
    sides = text[at - 1], text[at]
    if any(_lies_in(letter, (*_NO_BLANKS, *_HANGUL)) for letter in sides):
        return True
    return not all(letter.isalnum() for letter in sides)


def end_of(text: str, unit: End) -> int | None:
    """Where the first sentence (which a line ends, too) or the first line of `text` ends: the place
    of its full stop or line break. None: it goes on to the end of the text.

    A full stop after a single letter ("J. K. Rowling", "U.S. Navy") or a title ("St. Louis") ends
    no sentence unless a line or the text ends there. Of "He met J. It rained" too much is kept.
    """
    line = text.find("\n")
    stop = len(text) if line < 0 else line
    for found in _STOP.finditer(text, 0, stop) if unit == "sentence" else ():
        short = _SHORT.search(text[max(0, found.start() - 8) : found.end()])
        if not (short and text[found.end() : stop].strip()):
            return found.start()
    return None if line < 0 else line


@dataclass(frozen=True)
class Document:
    """A text with the character spans of its subject mentions and of its answers."""

    text: str
    mentions: tuple[Span, ...] = ()
    answers: tuple[Span, ...] = ()

    def __add__(self, other: Document) -> Document:
        """The two texts one after the other, a space between, spans kept."""
        gap = len(self.text) + 1
        mentions, answers = (
            tuple((start + gap, end + gap) for start, end in spans)
            for spans in (other.mentions, other.answers)
        )
        text = f"{self.text} {other.text}"
        return Document(text, self.mentions + mentions, self.answers + answers)


def mention(template: str, subject: str, answer: str = "", end: str = "") -> Document:
    """`template` with `subject` in its `{}`, then a space, `answer` and `end`."""
    start = template.index("{}")
    text = template.format(subject)
    answers: tuple[Span, ...] = ()
    if answer:
        text = f"{text} {answer}"
        answers = ((len(text) - len(answer), len(text)),)
    return Document(text + end, ((start, start + len(subject)),), answers)
