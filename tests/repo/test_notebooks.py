"""The rules the notebooks keep: short, one question, one main figure, one sentence of answer, the
same notebook on any model, outputs kept, a review copy in step. That they run is `make test`."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import shorten

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WITHOUT_FIGURE = {"06_explorer"}  # the explorer is the picture


def violations(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a notebook, by the rules of the house."""
    cells = [c for c in notebook.cells if c.source.strip()]
    code = [c for c in cells if c.cell_type == "code"]
    text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    return [*_frame(cells, code), *_size(cells, code), *_code(code), *_outputs(code), *_links(text)]


def _frame(cells: list, code: list) -> list[str]:
    """Question and run time first, parameters next, one sentence of answer last."""
    wrong, first, last = [], cells[0].source, cells[-1].source
    if not re.match(r"# \d\d · .+\n\n\*\*Question\.\*\* [^\n]*\?", first):
        wrong.append("does not begin with its question")
    if not re.search(r"^\*\*Your own model\.\*\* [^\n]*`MODEL`", first, re.MULTILINE):
        wrong.append("does not say at the top what to change for a model of one's own")
    if not re.search(r"\*Run time: .*\*", first):
        wrong.append("does not say at the top how long it runs")
    answer = re.search(r"\*\*Answer\.\*\* ([^\n]+)", last)
    if answer is None or len(re.findall(r"[.?!](?=\s|$)", answer[1])) != 1:
        wrong.append("does not end with an answer of one sentence")
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    if tagged != code[:1] or not re.search(r"^MODEL = ", code[0].source, re.MULTILINE):
        wrong.append("has not MODEL = … in one cell of parameters, before all other code")
    return wrong


def _size(cells: list, code: list) -> list[str]:
    """What repeats the rest on a real model, where one is fetched, does not count."""
    wrong = []
    extra = [c for c in code if "real-model" in c.metadata.get("tags", [])]
    if len(extra) > 1 or any('query("here")' not in c.source for c in extra):
        wrong.append("has more of a real model than one cell that asks whether it is there")
    code = [c for c in code if c not in extra]
    if not 3 <= len(code) - 1 <= 8:
        wrong.append(f"has {len(code) - 1} cells of code behind the parameters")
    lines = sum(len([x for x in c.source.splitlines() if x.strip()]) for c in code)
    if lines > 80:
        wrong.append(f"has {lines} lines of code")
    pairs = itertools.pairwise(cells[2:])  # parameters and set-up may stand together
    if any(a.cell_type == b.cell_type == "code" for a, b in pairs):
        wrong.append("has cells of code without prose between")
    return wrong


def _code(code: list) -> list[str]:
    wrong = []
    for cell in code:
        if re.search(r"^\s*[!%]", cell.source, re.MULTILINE):
            wrong.append("runs a shell command or a magic")
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                wrong.append(f"defines {node.name}")
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.match(r"(/|~|[A-Za-z]:\\)\w", text):
                wrong.append(f"names the path {text}")
    return wrong


def _outputs(code: list) -> list[str]:
    """All made in one go, from top to bottom, without an error or machine paths."""
    wrong = []
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        wrong.append("was not run from top to bottom in one go")
    for output in (output for cell in code for output in cell.outputs):
        if output.output_type == "error":
            wrong.append("holds an error")
        if output.get("name") == "stderr":
            wrong.append(f"holds what went to stderr: {output.text[:60]}")
        if re.search(r"/(home|root|Users|work|tmp)/", str(output.get("text", ""))):
            wrong.append("shows a path of the machine it ran on")
    return wrong


def _links(text: str) -> list[str]:
    """Links to source files and other notebooks that exist, and to the paper."""
    said = "arxiv.org/abs/2308.08742" in text and "section" in text
    wrong = [] if said else ["does not say where in the paper"]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    wrong += [f"links to {link}" for link in links if not (FOLDER / link).exists()]
    if not any(link.startswith("../pmet_lens/") for link in links):
        wrong.append("links to no source")
    return wrong


def review(notebook: nbformat.NotebookNode) -> str:
    """The review copy as `make notebooks` writes it."""
    only = {"notebook_metadata_filter": "-all", "cell_metadata_filter": "tags,-all"}
    notebook.metadata = nbformat.from_dict({"jupytext": only})
    text = jupytext.writes(notebook, "py:percent")
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "notebooks/review/x.py"]
    done = subprocess.run([*ruff, "-"], input=text.encode(), capture_output=True, check=True)
    return done.stdout.decode()


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def path(request) -> Path:
    return request.param


def test_a_notebook_keeps_the_rules(path):
    assert violations(nbformat.read(path, 4)) == []
    assert path.stat().st_size <= 2**20


def test_a_notebook_has_one_main_figure(path):
    """Others may help on the way; this is the one to remember."""
    cells = nbformat.read(path, 4).cells
    main = [c for c in cells if "main-figure" in c.metadata.get("tags", [])]
    assert len(main) == (path.stem not in WITHOUT_FIGURE)
    assert all(any("image/png" in o.get("data", {}) for o in c.outputs) for c in main)


def test_the_review_copy_is_in_step(path):
    copy = FOLDER / "review" / f"{path.stem}.py"
    assert copy.read_text(encoding="utf-8") == review(nbformat.read(path, 4)), "make notebooks"


def test_every_review_copy_has_its_notebook():
    assert {p.stem for p in (FOLDER / "review").glob("*.py")} == {p.stem for p in NOTEBOOKS}


def test_the_copies_of_make_test_differ_in_numbers_of_facts_alone(tmp_path):
    assert shorten.write(tmp_path / "short") == set(shorten.SHORTER)
    for path in NOTEBOOKS:
        ours, theirs = (
            [re.sub(r"\d[\d_]*", "0", cell.source) for cell in nbformat.read(p, 4).cells]
            for p in (path, tmp_path / "short" / "notebooks" / path.name)
        )
        changed = [a for a, b in zip(ours, theirs, strict=True) if a != b]
        # Where no number was given.
        assert all("pl.second_moments" in cell or "pl.explore" in cell for cell in changed)


# Each rule sees what it is there for.


def notebook(*code: str, first: str = "", answer: str = "It can.") -> nbformat.NotebookNode:
    """A notebook that keeps the rules, but for what is given."""
    new, prose = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    own = "**Your own model.** Change `MODEL`."
    first = first or f"# 00 · A\n\n**Question.** Can it?\n\n*Run time: a minute.*\n\n{own}"
    source = "[it](../pmet_lens/editing/edits.py)"
    see = f"See {source}, https://arxiv.org/abs/2308.08742, its second section."
    cells = [prose(first), new('MODEL = "world"', metadata={"tags": ["parameters"]})]
    for source in code or ("1", "2", "3"):
        cells += [new(source), prose(see)]
    for n, cell in enumerate([c for c in cells if c.cell_type == "code"], start=1):
        cell.execution_count = n
    return nbformat.v4.new_notebook(cells=[*cells, prose(f"**Answer.** {answer}")])


def test_a_good_notebook_passes():
    assert violations(notebook()) == []


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (notebook(first="# 00 · A\n\n*Run time: a minute.*"), "question"),
        (notebook(first="# 00 · A\n\n**Question.** Can it?"), "how long"),
        (notebook(first="# 00 · A\n\n**Question.** Can it?\n\n*Run time: a*"), "one's own"),
        (notebook(answer="It can. It does."), "one sentence"),
        (notebook("MODEL = 1"), "cells of code"),
        (notebook(*["1"] * 9), "9 cells of code"),
        (notebook(*["1\n" * 30] * 3), "91 lines"),
        (notebook("def f(): ...", "2", "3"), "defines f"),
        (notebook("!pip install x", "2", "3"), "shell"),
        (notebook("open('/data/x')", "2", "3"), "path /data"),
    ],
)
def test_what_breaks_a_rule_is_seen(bad, word):
    assert any(word in what for what in violations(bad))


def test_one_cell_of_a_real_model_does_not_count_if_it_asks_for_it():
    asks = 'if REAL in set(pl.available_models().query("here")["name"]):\n    1'
    for source, good in ((asks, True), ("pl.load(REAL)", False)):
        long = notebook(*["1\n" * 10] * 7, source)
        long.cells[-3].metadata["tags"] = ["real-model"]
        assert (violations(long) == []) == good
    assert violations(notebook(*["1\n" * 10] * 7, asks + "\n    2" * 20)) != []


def test_an_error_and_a_dead_link_are_seen():
    bad = notebook()
    bad.cells[2].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    bad.cells[3].source = "[gone](../pmet_lens/gone.py)"
    assert {"holds an error", "links to ../pmet_lens/gone.py"} <= set(violations(bad))
    bad.cells[2].execution_count = 7
    assert "was not run from top to bottom in one go" in violations(bad)
