"""Where sentences and lines end."""

from __future__ import annotations

import pytest

from pmet_lens.data.words import end_of


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Rome. It is old", "Rome"),
        ("Rome", "Rome"),
        ("Rome.", "Rome"),
        ("Rome!? Yes", "Rome"),
        ("Rome\nIt is", "Rome"),
        ("3.5 metres. More", "3.5 metres"),
        ("St. Louis. It", "St. Louis"),
        ("J. K. Rowling. She", "J. K. Rowling"),
        ("the U.S. Navy. It", "the U.S. Navy"),
        ("the U.S.", "the U.S"),
        ("St.\nLouis", "St"),
        ("best. Louis", "best"),
        ("罗马。它很老", "罗马"),
        ("रोम। यह", "रोम"),
        ("", ""),
        (". Rome", ""),
    ],
)
def test_a_sentence_ends_where_it_does(text, kept):
    assert text[: end_of(text, "sentence")] == kept


def test_a_line_ends_at_its_break_alone():
    assert end_of("Rome. It is\nold", "line") == len("Rome. It is")
    assert end_of("Rome. It is", "line") is None
