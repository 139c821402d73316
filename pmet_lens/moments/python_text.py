"""English that is on every machine where Python is: the prose of Python's own documentation."""

from __future__ import annotations

import re

from pmet_lens.moments.moment import MomentError

_WORDS = 25
_LETTERS = 0.93


def python_text() -> list[str]:
    """The paragraphs of Python's language reference (as `help("topics")` shows it) that are prose:
    at least 25 words, of letters and blanks for 93 %. About 20,000 words; they differ a little from
    one version of Python to the next.

    Raises `MomentError` where this Python came without its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MomentError(
            'this Python came without its documentation (pydoc_data), so there is no text="python" '
            'here: take text="own", or pass texts of your own to pl.second_moments.'
        ) from error
    paragraphs = (part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    found = [" ".join(part.split()) for part in paragraphs if not part.startswith("    ")]
    return [text for text in dict.fromkeys(found) if _prose(text)]


def _prose(text: str) -> bool:
    plain = sum(letter.isalpha() or letter == " " for letter in text)
    return text.count(" ") + 1 >= _WORDS and plain >= _LETTERS * len(text)
