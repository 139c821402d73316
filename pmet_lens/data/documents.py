"""A text that knows where its subjects and answers stand, as training on it needs."""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int]


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
