"""A fact is refused, in words, when nothing could be edited or studied with it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from pmet_lens.data.facts import Fact, FactError, check_editable

GOOD = Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis")


def test_the_text_has_the_subject_in_its_place():
    assert GOOD.text == "Mira Tolan plays the sport of"
    assert replace(GOOD, prompt="The sport of {} is").text == "The sport of Mira Tolan is"
    assert replace(GOOD, prompt="By {}").text == "By Mira Tolan"
    # A brace that is not a place, and a subject that looks like one, stay as they are.
    assert replace(GOOD, prompt="{ {} }").text == "{ Mira Tolan }"
    assert replace(GOOD, subject="{}", prompt="The set {} is").text == "The set {} is"


def test_a_fact_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        GOOD.subject = "Danel Orrin"


@pytest.mark.parametrize(
    ("prompt", "holes"), [("plays the sport of", 0), ("{0} plays", 0), ("{} and {} play", 2)]
)
def test_a_prompt_needs_exactly_one_place_for_the_subject(prompt, holes):
    with pytest.raises(FactError, match=rf"has {holes} places marked \{{\}}; it needs exactly one"):
        replace(GOOD, prompt=prompt)


@pytest.mark.parametrize("subject", ["", "  ", "\n"])
def test_an_empty_subject_is_refused(subject):
    with pytest.raises(FactError, match=r"plays the sport of.* has an empty subject"):
        replace(GOOD, subject=subject)


@pytest.mark.parametrize("name", ["target_new", "target_true"])
@pytest.mark.parametrize("target", ["", " "])
def test_an_empty_target_is_refused(name, target):
    with pytest.raises(FactError, match=f"{name} of 'Mira Tolan plays the sport of' is empty"):
        replace(GOOD, **{name: target})


def test_one_target_is_enough_and_none_is_too_few():
    assert replace(GOOD, target_true=None).target_new == "rugby"
    assert replace(GOOD, target_new=None).target_true == "tennis"
    with pytest.raises(FactError, match="neither target_new nor target_true; give one"):
        replace(GOOD, target_new=None, target_true=None)


# -- lists of facts -------------------------------------------------------------------------------


def test_an_edit_needs_facts():
    with pytest.raises(FactError, match="no facts to edit; pass at least one"):
        check_editable([])


def test_an_edit_needs_new_answers():
    with pytest.raises(FactError, match=r"'Ilmar plays .*' has no target_new"):
        check_editable([GOOD, replace(GOOD, subject="Ilmar", target_new=None)])


def test_two_answers_to_one_question_are_refused():
    other = replace(GOOD, target_new="golf")
    with pytest.raises(FactError, match=r"contradict each other: .*'rugby' and 'golf'\. Keep one"):
        check_editable([GOOD, replace(GOOD, subject="Ilmar"), other])


def test_what_does_not_contradict_passes():
    another = replace(GOOD, subject="Ilmar", target_new="golf")
    asked_otherwise = replace(GOOD, prompt="The mother tongue of {} is", target_new="French")
    check_editable([GOOD, another, asked_otherwise])
    check_editable([GOOD, replace(GOOD, paraphrases=("Mira Tolan competes in",))])
