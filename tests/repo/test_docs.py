"""The documentation names what there is, and all of it; `make docs` lets no warning pass."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from rooms import PICTURE, ROOMS, files_of, picture
from where import locate

import pmet_lens as pl

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAPER = (ROOT / "docs" / "paper_and_code.md").read_text(encoding="utf-8")


def named(text: str) -> list[str]:
    """What a page names with the role {where}."""
    return re.findall(r"\{where\}`([^`]+)`", text)


def entries() -> Counter[str]:
    """The public names that have an entry in the API reference."""
    texts = [p.read_text(encoding="utf-8") for p in PAGES if p.parent.name == "api"]
    return Counter(re.findall(r"^\.\. auto\w+:: (\w+)$", "\n".join(texts), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_name_on_a_page_is_in_the_code(page):
    for name in named(page.read_text(encoding="utf-8")):
        file, line = locate(name)
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert "/" in name or name.split(".")[-1] in text[line - 1] or line == 1, name


def test_every_public_name_has_one_entry_in_the_reference():
    assert entries() == Counter(pl.__all__)


def test_the_page_on_the_paper_names_every_part_of_the_method():
    """Every function the method and the study are made of, and every figure."""
    named_there = set(named(PAPER))
    study = ("component_similarity", "variance_split", "transfer", "causal_trace", "claims")
    method = ("edit", "optimise", "second_moments", "sample_contexts", "METHODS", "ABLATIONS")
    assert {f"pmet_lens.{name}" for name in (*study, *method)} <= named_there
    scripts = {f"figures/{p.name}" for p in (ROOT / "figures").glob("fig_*.py")}
    assert scripts <= named_there


def test_code_is_found_where_it_is():
    assert locate("figures/paper.py") == (Path("figures/paper.py"), 1)
    assert locate("pmet_lens.summarise")[0] == Path(
        "pmet_lens/evaluation/metrics.py"
    )  # not where from
    file, line = locate("pmet_lens.Edit.save")
    assert "def save(" in (ROOT / file).read_text(encoding="utf-8").splitlines()[line - 1]


@pytest.mark.parametrize(
    "name", ["pmet_lens.nothing", "pmet_lens.Edit.nothing", "figures/none.py", "nowhere.at_all"]
)
def test_a_name_that_is_gone_is_seen(name):
    with pytest.raises(LookupError):
        locate(name)


def test_the_picture_of_the_rooms_is_that_of_the_code():
    assert PICTURE.read_text(encoding="utf-8") == picture(), "python docs/rooms.py"
    assert {file for room in ROOMS for file in files_of(room)} >= {"facts", "keys", "solvers"}


def test_the_page_on_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in ROOMS if f"`{room}/`" not in text] == []
