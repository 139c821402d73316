"""Where a word ends, and which scripts write no blanks between words."""

from __future__ import annotations

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


def _lies_in(letter: str, blocks: tuple[tuple[int, int], ...]) -> bool:
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
