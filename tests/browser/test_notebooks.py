"""Notebooks 00 and 06 as a person uses them: run, type, click, undo, with keyboard and stop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import OUT

SECOND = 1000
OLD, NEW = "Low Saxon", "Polish"


class Page:
    """A notebook in JupyterLab."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.complaints = page, []
        page.set_default_timeout(60 * SECOND)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("text=/Python 3 .ipykernel. . Idle/")

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def run_all(self) -> None:
        """Run all cells and wait for the last one."""
        self.menu("Run", "Run All Cells")
        done = """() => {
            const cells = [...document.querySelectorAll(".jp-CodeCell")];
            return cells.length > 2 && cells.every(cell =>
                /\\[\\d+\\]/.test(cell.querySelector(".jp-InputPrompt").textContent));
        }"""
        self.page.wait_for_function(done, timeout=400 * SECOND)

    def menu(self, *path: str) -> None:
        """Click through the menu bar."""
        for name in path:
            self.page.get_by_role("menuitem", name=name, exact=True).last.click()

    def errors(self) -> list[str]:
        """Tracebacks and what went to stderr."""
        kinds = ("application/vnd.jupyter.error", "application/vnd.jupyter.stderr")
        found = [
            self.page.locator(f'[data-mime-type="{kind}"]').all_inner_texts() for kind in kinds
        ]
        return [text for texts in found for text in texts]

    def tab(self, name: str) -> None:
        """Open a tab of the explorer."""
        self.page.locator(".widget-tab .lm-TabBar-tab", has_text=name).click()

    def click(self, name: str) -> None:
        """Click the button of this name that can be seen."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def fill(self, label: str, text: str) -> None:
        """Type into the field with this label, and leave it."""
        field = self.page.get_by_label(label, exact=True).locator("visible=true")
        field.fill(text)
        field.press("Tab")

    def told(self, text: str) -> None:
        """Wait until the explorer says this, and its step is over."""
        self.page.locator(".widget-html", has_text=text).first.wait_for()
        self.page.locator("button:disabled", has_text="Stop").wait_for()

    def picture(self, name: str, top: str = ".jp-OutputArea .jupyter-widgets") -> None:
        """A screenshot with the first `top` at the top of the page."""
        self.page.locator(top).first.evaluate("e => e.scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=OUT / f"{name}.png")


@pytest.fixture
def opened(lab: str, browser: Any) -> Iterator[Any]:
    """A function that opens a notebook; behind the test no page may have complained."""
    pages = []

    def open_notebook(name: str, width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800})
        page = Page(context.new_page(), lab.format(name))
        pages.append((context, page))
        return page

    yield open_notebook
    for n, (context, page) in enumerate(pages):
        page.page.screenshot(path=OUT / f"last-{n}.png")
        complaints = page.complaints
        context.close()
        assert complaints == []


def test_the_quickstart_runs(opened):
    notebook = opened("00_quickstart.ipynb")
    notebook.run_all()
    assert notebook.errors() == []
    assert notebook.page.locator(".jp-OutputArea-output img").count() >= 1
    notebook.picture("quickstart", ".jp-CodeCell")


def test_a_fact_is_typed_edited_and_undone(opened):
    notebook = opened("06_explorer.ipynb")
    page = notebook.page
    notebook.run_all()
    assert notebook.errors() == []
    page.locator(".widget-tab").wait_for()

    page.keyboard.press("Control+b")  # without the file browser
    page.get_by_label("Example", exact=True).select_option("your own")
    notebook.fill("Subject", "Penton")
    notebook.fill("Prompt", "The spoken language of {} is")
    notebook.fill("New answer", NEW)
    page.get_by_text("Paraphrases and neighbours to check").click()
    notebook.fill("Paraphrases", "The register lists {} with the main language")
    notebook.fill("Neighbours", "Coldhaven, where people speak\nKingscliff, where people speak")
    page.get_by_text("Paraphrases and neighbours to check").click()
    notebook.click("Ask")
    notebook.told(f"The spoken language of Penton is {OLD}")
    notebook.picture("ask")

    notebook.tab("Look")
    page.get_by_label("View", exact=True).select_option("Causal trace")
    notebook.click("Look")
    notebook.told("Causal trace: done.")
    assert page.locator('svg[aria-label^="Causal trace of"]').count() == 1
    notebook.picture("look")

    notebook.tab("Edit")
    handle = page.locator(".widget-slider", has_text="Steps").locator("[role=slider]")
    assert handle.get_attribute("aria-valuenow") == "30.0"
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.locator(".widget-slider", has_text="Steps").locator("text=35").wait_for()

    notebook.click("Edit")  # stopped, and then let go
    notebook.click("Stop")
    notebook.told("stopped. The model is as it was.")
    assert page.get_by_role("button", name="Undo", exact=True).count() == 0
    notebook.click("Edit")
    row = page.locator(".widget-html", has_text=f"→ {NEW}").last
    notebook.told(f"the model says now: {NEW}")
    assert "(on)" in row.inner_text()
    notebook.picture("edit")
    kinds = page.locator(".widget-html table td:first-child").locator("visible=true")
    assert kinds.all_inner_texts() == ["rewrite", "paraphrase", "neighbour", "neighbour"]
    page.set_viewport_size({"width": 800, "height": 800})
    notebook.picture("edit-800")
    notebook.click("Undo")
    notebook.told(f"the model says now: {OLD}")
    assert "(off)" in row.inner_text()

    notebook.click("Export")
    for kind in ("png", "svg", "csv", "py"):
        link = page.locator(f'a[download$=".{kind}"]')
        with page.expect_download() as download:
            link.click()
        assert re.fullmatch(rf"edit-\d\.{kind}", download.value.suggested_filename)

    notebook.tab("Ablate")
    notebook.click("Compare")
    notebook.told("Compare: done.")
    page.evaluate(
        "jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.locator('body[data-jp-theme-light="false"]').wait_for(state="attached")
    notebook.picture("ablate-800-dark")
    assert notebook.errors() == []
