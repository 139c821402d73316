"""Notebooks 00 and 06 as a person uses them: run, type, click, undo, with keyboard and stop."""

from __future__ import annotations

import re

OLD, NEW = "Low Saxon", "Polish"


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
    notebook.told("Causal trace: done, in")
    assert page.locator('svg[aria-label^="Causal trace of"]').count() == 1
    notebook.picture("look")

    notebook.tab("Edit")
    steps = page.get_by_label("Steps", exact=True).locator("visible=true")
    assert steps.input_value() == "30"
    steps.focus()
    for _ in range(5):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    assert steps.input_value() == "35"

    notebook.click("Edit")  # stopped, and then let go
    notebook.click("Stop")
    notebook.told("stopped. The model is as it was.")
    assert page.get_by_role("button", name="Undo", exact=True).count() == 0
    notebook.click("Edit")
    row = page.locator(".widget-html", has_text=f"→ {NEW}").last
    notebook.told(f"(on); the model says now: {NEW}")
    assert "(on)" in row.inner_text()
    notebook.picture("edit")
    kinds = page.locator(".widget-html table td:first-child").locator("visible=true")
    assert kinds.all_inner_texts() == ["rewrite", "paraphrase", "neighbour", "neighbour"]
    page.set_viewport_size({"width": 800, "height": 800})
    notebook.picture("edit-800")
    notebook.click("Undo")
    notebook.told(f"(off); the model says now: {OLD}")
    assert "(off)" in row.inner_text()

    notebook.click("Export")
    for kind in ("png", "svg", "csv", "py"):
        link = page.locator(f'a[download$=".{kind}"]')
        with page.expect_download() as download:
            link.click()
        assert re.fullmatch(rf"edit-\d\.{kind}", download.value.suggested_filename)

    notebook.tab("Ablate")
    notebook.click("Compare")
    notebook.told("Compare: done, in")
    page.evaluate(
        "jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.locator('body[data-jp-theme-light="false"]').wait_for(state="attached")
    notebook.picture("ablate-800-dark")
    assert notebook.errors() == []


def test_a_fact_is_edited_and_undone_in_notebook_7(opened_in_7):
    notebook = opened_in_7("06_explorer.ipynb")
    notebook.run_all()
    assert notebook.errors() == []
    notebook.page.locator(".widget-tab").wait_for()
    notebook.fill("New answer", NEW)
    notebook.page.locator(".widget-html", has_text="The new answer has").wait_for()
    notebook.tab("Edit")
    notebook.click("Edit")
    notebook.told(f"the model says now: {NEW}")
    notebook.picture("notebook-7")
    notebook.click("Undo")
    notebook.told("0 of 2 edits")  # the notebook's own cells made and undid the first


def test_a_model_is_opened_from_the_list_and_results_stay(opened):
    notebook = opened("06_explorer.ipynb")
    notebook.run_all()
    page = notebook.page
    page.locator(".widget-tab").wait_for()
    notebook.click("Ask")
    notebook.told("Ask: done")
    page.get_by_text("Models", exact=True).first.click()
    notebook.picture("models")
    notebook.click("Open world-sequential")
    notebook.told("world-sequential: 8 layers, unedited.")
    page.get_by_text("Models", exact=True).first.click()
    notebook.click("Open world")
    notebook.told("world: 8 layers, unedited.")
    page.locator('svg[aria-label*="likeliest tokens"]').wait_for()
    assert notebook.errors() == []
