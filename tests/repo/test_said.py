"""Numbers in the sentences of README and docs are those of the committed tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import said

ROOT = Path(__file__).parents[2]
SENTENCES = said.said()
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
TABLES = [ROOT / "figures" / "results", ROOT / "tests" / "benchmarks" / "results"]
BOUNDS = (("ci_low", "ci_high", "mean"), ("difference_low", "difference_high", "difference"))
INTERVAL = re.compile(
    rf"(?:({said.NUMBER})(?: %| points?| nats)? |)\[({said.NUMBER}), ({said.NUMBER})\]"
)
LONG = re.compile(rf"(?<![\w.\-#])({said.NUMBER})(?![\w\-])")
ELSEWHERE = {
    ("docs/performance.md", "117"): "a rate, which the page says was taken by hand",
}
"""Numbers that no table holds, and why."""


def prose(page: str) -> str:
    """What a page says itself, without the sentences whose cells are named: no quoted tables,
    code, addresses."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for one in SENTENCES:
        text = text.replace(one.text, "") if one.page == page else text
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|arXiv [\d.]+|AAAI 2024|20\d\d-\d\d-\d\d", "]", text)
    return "\n".join(line for line in text.split("\n") if not line.startswith("|"))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def tolerance(text: str) -> float:
    """Half of the last digit."""
    return 0.501 * 10.0 ** -len(text.partition(".")[2])


def tables() -> Iterator[pd.DataFrame]:
    for folder in TABLES:
        for path in folder.rglob("*.csv"):
            yield pd.read_csv(path, low_memory=False)


@cache
def intervals() -> np.ndarray:
    """Low, high, middle of every row of every committed table."""
    found = [
        table[list(names)].apply(pd.to_numeric, errors="coerce").dropna().to_numpy(dtype=float)
        for table in tables()
        for names in BOUNDS
        if set(names) <= set(table)
    ]
    return np.concatenate(found)


@cache
def numbers() -> np.ndarray:
    """Every number of every committed table and page of tables, sorted, without its sign."""
    found = [
        table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float).ravel()
        for table in tables()
    ]
    for folder in TABLES:
        for path in (*folder.rglob("*.md"), *folder.rglob("*.json")):
            text = path.read_text(encoding="utf-8")
            found.append(np.array([number(n) for n in re.findall(said.NUMBER, text)]))
    every = np.abs(np.concatenate(found))
    return np.unique(every[np.isfinite(every)])


def is_measured(middle: str, low: str, high: str) -> bool:
    """Whether a committed row has the interval, or, told as a loss, its opposite."""
    every, told = intervals(), ((low, 0), (high, 1), (middle, 2))
    opposite = np.stack([-every[:, 1], -every[:, 0], -every[:, 2]], axis=1)
    return any(
        bool(
            np.all(
                [np.abs(rows[:, i] - number(t)) <= tolerance(t) for t, i in told if t], axis=0
            ).any()
        )
        for rows in (every, opposite)
    )


@pytest.mark.parametrize("one", SENTENCES, ids=lambda one: one.words[:40])
def test_a_sentence_has_the_numbers_of_its_cells(one: said.Said):
    found = one.pattern.findall((ROOT / one.page).read_text(encoding="utf-8"))
    assert found == [one.text]


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_of_a_page_is_that_of_a_committed_row(page):
    unknown = [m.group() for m in INTERVAL.finditer(prose(page)) if not is_measured(*m.groups(""))]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES)
def test_every_long_number_of_a_page_is_in_a_committed_table(page):
    """Short ones are in every table."""
    unknown = []
    for text in LONG.findall(prose(page)):
        if "." in text or len(re.sub(r"\D", "", text).lstrip("0")) > 2:
            value, off = abs(number(text)), tolerance(text)
            first, last = np.searchsorted(numbers(), [value - off, value + off])
            if first == last and (page, text) not in ELSEWHERE:
                unknown.append(text)
    assert unknown == []


def test_wrong_numbers_are_seen():
    right = SENTENCES[0]
    assert right.pattern.fullmatch(right.text.replace("8", "9"))
    mean, low, high = intervals()[0, [2, 0, 1]]
    assert is_measured(f"{mean:.1f}", f"{low:.1f}", f"{high:.1f}")
    assert is_measured(f"{-mean:.1f}".replace("-", "−"), f"{-high:.1f}", f"{-low:.1f}")
    assert not is_measured(f"{mean + 0.2:.1f}", f"{low:.1f}", f"{high:.1f}")
    assert not is_measured("", f"{low:.1f}", f"{high + 777:.1f}")


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
    with pytest.raises(ValueError, match="rows of real/edits where"):
        said.cell("real/edits", "mean", model=said.SMOL)
