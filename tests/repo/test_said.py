"""Every number in the sentences of README and docs is a cell of a committed table, or one that was
set, or another's."""

from __future__ import annotations

import re
from pathlib import Path

import cells
import pytest
import said

ROOT = Path(__file__).parents[2]
SENTENCES = said.said()
MADE = ("models.md",)
"""Pages that a script writes whole; `test_figures.py` compares them."""
PAGES = ["README.md"]
PAGES += [f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in MADE]
NAMES = re.compile(
    r"(?m:^\d\. )|GPT-J-6B|Gemma-3-270M"
    r"|\b(?:GPT-J|GPT|Llama|OLMo|Qwen|Gemma|Phi)[ -]\d[\d.]*B?(?:(?:,| and| to) \d)?"
    r"|\b(?:notebook|Notebook|JupyterLab|ipywidgets|Python|torch) (?:≥ )?\d[\d.]*|SmolLM2(?:-135M)?"
    r"|H100|float\d\d|Q\d_\w|F16|F32|SHA-256|95 %|arXiv \d+\.\d+|AAAI 2024"
    r"|\b\d+\.\d+\.\d+(?:\+cpu)?|\b20\d\d-\d\d-\d\d|\bsection \d|\beqs?\. \d+\w?(?: and \d\w)?"
)
"""Digits of names, versions and dates."""
SET = {
    "README.md": ("of 100 facts", "found on 20 others"),
    "docs/ablations.md": (
        "on 200 facts",
        "other facts, 20 and 100 at once",
        "at 100 facts",
        "at 20 facts",
        "at 20 and at 100 facts",
    ),
    "docs/architecture.md": ("at most 300 lines",),
    "docs/free_answers.md": ("100 real facts", "32 tokens", "150 answers", "(100 facts)"),
    "docs/index.md": ("100 edits",),
    "docs/limits.md": (
        "a GPU of 80 GB and one of 24 GB",
        "for 10,000 edits",
        "to 1e-13 on",
        "to 1e-4 on",
        "for 100 edits",
    ),
    "docs/own_models.md": ("as 20 facts", "17 families"),
    "docs/paper_and_code.md": (
        "17 families",
        "100,000 tokens",
        "(100 and 300 edits)",
        "1 to 750",
        "300 of the world",
        "a number, 0 by default",
        "weighed 0.5 instead of 0.1",
    ),
    "docs/performance.md": (
        "(1e-9 in",
        "*20 facts*",
        "10 steps in place of 30 (25)",
        "0.4 radii",
        "promises 100 × at d_in 3,072",
        "fits 24 GB",
        "30 published steps of 10,000 facts",
        "10,000 edits",
        "on 100 facts",
        "60 other facts",
        "from the radius to 0",
    ),
    "docs/results.md": (
        "for 100 facts",
        "on 20 or 40 real facts",
        "on 20 other records",
        "settings on 20 others",
        "a search on 20 facts",
        "found on 20 facts",
        "on 40 facts with",
        "at 1 and at 100 facts",
        "at 20 the interval of S holds 0",
        "at 20 facts",
        "at 100 not either",
        "with 100 facts",
        "with 300 facts",
        "a KL weight of 1",
        "at 1 and 20 facts",
        "refuses 100 and 300",
        "from 100 on",
        "100 facts, differences",
        "*The parts of PMET*, 100 facts",
        "0.75 of its own stream",
        "layers 0 to 3",
        "on 100 facts",
        "300 edits",
        "at 1 to 750 edits",
        "below 90 %",
        "the 750 records",
        "80 targets on 20 held-out records",
        "100 others",
        "for 20 facts",
        "at 100 it fails",
        "breaks at 100",
        "160 targets on 40 real facts",
        "instead of 2 to 7",
        "40 facts",
        "160 targets",
        "The best of 105",
    ),
    "docs/scaling_out.md": ("10,000 edits", "on 1, 8 and 64 GPUs"),
    "docs/ship.md": ("the first 50 facts",),
}
"""What was set or asked for, as the pages say it; no result."""
CITED = {
    "docs/limits.md": (
        "10,000 CounterFact edits at once on GPT-J (MEMIT paper",
        "unedited 22.4 / 15.2 / 17.7 / 83.5, FT-W 67.6 / 99.4 / 77.0 / 46.9, "
        "ROME 50.3 / 50.2 / 50.4 / 50.2, MEMIT 85.8 / 98.9 / 88.6 / 73.7",
    ),
    "docs/paper_and_code.md": (
        "top-50 tokens",
        "100,000 texts of Wikipedia",
        "1 to 10,000",
        "1,209 known",
        "the 1,209",
    ),
}
"""What others published, with the source beside it."""


def unsaid(page: str, text: str) -> list[str]:
    """Words with a digit that nothing above accounts for."""
    for one in SENTENCES:
        text = text.replace(one.text, " ") if one.page == page else text
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "]", text, flags=re.DOTALL)
    text = " ".join(NAMES.sub(" ", text).split())
    for phrase in sorted((*SET.get(page, ()), *CITED.get(page, ())), key=len, reverse=True):
        text = re.sub(rf"(?i)(?<![\w.,]){re.escape(phrase)}", " ", text)
    return re.findall(r"\S* ?(?<![\w.])\S*\d\S* ?\S*", text)


@pytest.mark.parametrize("one", SENTENCES, ids=lambda one: one.words[:40])
def test_a_sentence_has_the_numbers_of_its_cells(one: said.Said):
    found = one.pattern.findall((ROOT / one.page).read_text(encoding="utf-8"))
    assert found == [one.text]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_page_is_accounted_for(page):
    assert unsaid(page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_wrong_numbers_are_seen():
    right = SENTENCES[0]
    assert right.pattern.fullmatch(right.text.replace("8", "9"))
    page = "docs/results.md"
    assert unsaid(page, "S 84 at 20 facts") == ["S 84 "]
    assert unsaid(page, "S is higher [0.2, 4.1] with `x=3`") == ["higher [0.2, 4.1]"]
    assert unsaid(page, "Gemma 3 and SmolLM2-135M, `n=5`, 95 % intervals ([x](y3.md))") == []
    sentence = next(one for one in SENTENCES if one.page == page)
    assert unsaid(page, sentence.text) == []
    assert unsaid(page, re.sub(r"\d", "1", sentence.text)) != []


@pytest.mark.parametrize("page", sorted({*SET, *CITED}))
def test_no_phrase_is_left_of_what_a_page_does_not_say_any_more(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split()).lower()
    phrases = (*SET.get(page, ()), *CITED.get(page, ()))
    assert [phrase for phrase in phrases if phrase.lower() not in text] == []


@pytest.mark.parametrize(
    ("value", "mark", "text"),
    [
        (17575.0, "#", "17,575"),
        (-0.04, "#.#", "0.0"),
        (-0.04, "+#.##", "−0.04"),
        (2.25, "+#.#", "+2.2"),
        (-8.0, "#", "−8"),
        (0.0, "+#", "0"),
    ],
)
def test_a_number_is_written_as_pages_write_it(value, mark, text):
    assert said.shown(value, mark) == text


def test_words_need_a_number_for_every_mark():
    with pytest.raises(ValueError, match="1 numbers for the marks of 'S # and #'"):
        said.Said("README.md", "S # and #", (1.0,)).text  # noqa: B018


def test_a_cell_is_one():
    with pytest.raises(ValueError, match="rows of real/edits where"):
        cells.cell("real/edits", "mean", model=cells.SMOL)
    with pytest.raises(ValueError, match="has no row"):
        cells.waited("fast_preset_pmet", "GPU")
    assert cells.waited("fast_preset_pmet", "NS", "difference") < 0
