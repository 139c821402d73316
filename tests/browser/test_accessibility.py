"""The explorer for people who use a keyboard, a screen reader, a larger letter or a dark page:
axe-core finds nothing serious in any tab, every control has a name and its turn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pages import Page

EXPLORER = ".jp-OutputArea-output .jupyter-widgets"
"""The panel; what is around it is JupyterLab's own."""
TABS = ("Ask", "Look", "Edit", "Side by side", "Ablate")
SERIOUS = ("serious", "critical")
ZOOM = 2
TALL = 4000
"""Pixels that the panel of every tab fits in."""
RUN = """async where => {
    const found = await axe.run(where, {resultTypes: ["violations"]});
    return found.violations.map(v => ({id: v.id, impact: v.impact,
        nodes: v.nodes.map(n => n.html.slice(0, 200) + " :: " + n.failureSummary)}));
}"""
NAMELESS = """where => [...document.querySelectorAll(
    `${where} button, ${where} input, ${where} select, ${where} textarea, ${where} [role=slider]`)]
    .filter(e => e.offsetParent !== null).filter(e => {
        const by = (e.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean)
            .map(id => document.getElementById(id)?.textContent || "").join(" ");
        const label = [...(e.labels || [])].map(l => l.textContent).join(" ");
        const own = e.tagName === "BUTTON" ? e.textContent : "";
        return !(by + label + own + (e.getAttribute("aria-label") || "")).trim();
    }).map(e => e.outerHTML.slice(0, 200))"""
WIDER = """where => [...document.querySelectorAll(where + " *")]
    .filter(e => e.offsetParent !== null && !e.closest("[style*='overflow-x: auto']"))
    .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip('needs axe-core: pip install -e ".[browser]"')
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def panel(opened) -> Page:
    """The explorer of notebook 06, with a result in every tab."""
    notebook = opened("06_explorer.ipynb")
    notebook.run_all()
    notebook.page.locator(".widget-tab").wait_for()
    for tab, button in zip(TABS, ("Ask", "Look", "Edit", "Edit twice", "Compare"), strict=True):
        notebook.tab(tab)
        notebook.click(button)
        notebook.told(": done" if tab != "Edit" else "edits are on the model")
    return notebook


def serious(page: Any, axe: str) -> list[dict[str, Any]]:
    """What axe-core finds in the explorer and calls serious, or worse. It judges the contrast of
    what is in sight: so the page is tall, and so is its body, which JupyterLab makes 0 high."""
    page.set_viewport_size({"width": 1280, "height": TALL})
    page.add_style_tag(content="body {min-height: 100vh}")
    page.locator(EXPLORER).first.evaluate("e => e.scrollIntoView({block: 'start'})")
    page.evaluate(axe)
    return [one for one in page.evaluate(RUN, EXPLORER) if one["impact"] in SERIOUS]


def dark(page: Any) -> None:
    """JupyterLab's dark theme."""
    page.evaluate(
        "jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.locator('body[data-jp-theme-light="false"]').wait_for(state="attached")


def test_axe_finds_nothing_serious_in_any_tab(panel, axe):
    found = {}
    for theme in ("light", "dark"):
        if theme == "dark":
            dark(panel.page)
        for tab in TABS:
            panel.tab(tab)
            found[theme, tab] = serious(panel.page, axe)
            panel.picture(f"{theme}-{tab.split()[0].lower()}")
            assert panel.page.evaluate(NAMELESS, EXPLORER) == []
    assert {where: what for where, what in found.items() if what} == {}


def test_axe_sees_what_it_is_there_for(panel, axe):
    """Planted: a field without a name, and grey letters on grey."""
    panel.page.evaluate(
        """where => document.querySelector(where).insertAdjacentHTML("beforeend",
        "<input type=text><p style='color: #999; background: #aaa'>grey</p>")""",
        EXPLORER,
    )
    assert {one["id"] for one in serious(panel.page, axe)} == {"label", "color-contrast"}
    assert len(panel.page.evaluate(NAMELESS, EXPLORER)) == 1


def test_at_twice_the_size_nothing_runs_out_of_the_page(panel):
    page = panel.page
    page.keyboard.press("Control+b")  # without the file browser
    page.set_viewport_size({"width": 1280 // ZOOM, "height": 800 // ZOOM})  # what zoom leaves
    for tab in TABS:
        panel.tab(tab)
        panel.picture(f"zoom-{tab.split()[0].lower()}")
        assert page.evaluate(WIDER, EXPLORER) == []


def test_tab_goes_through_the_controls_in_the_order_they_are_read(panel):
    page = panel.page
    panel.tab("Ask")
    page.get_by_label("Subject", exact=True).focus()
    names = []
    for _ in range(12):
        names.append(page.evaluate("document.activeElement.outerHTML"))
        page.keyboard.press("Tab")
    assert len(set(names)) == len(names)  # none holds the focus
    order = page.evaluate(
        """where => [...document.querySelectorAll(`${where} :is(button, input, select, textarea,
        [tabindex="0"])`)].filter(e => e.offsetParent !== null && !e.disabled)
        .map(e => e.outerHTML)""",
        EXPLORER,
    )
    inside = [order.index(html) for html in names if html in order]
    assert len(inside) > 6
    assert inside == sorted(inside)


def test_two_edits_and_their_harm_are_shown(panel):
    panel.tab("Side by side")
    page = panel.page
    captions = page.locator("caption").locator("visible=true").all_inner_texts()
    assert any("Ten prompts about other things" in text for text in captions)
    panel.click("Keep B")
    panel.tab("Edit")
    # The notebook's own cells made the first.
    page.locator(".widget-html", has_text="3. MEMIT").wait_for()
    panel.click("What else changed")
    panel.told("What else changed: done")
    page.get_by_label("Result", exact=True).locator("visible=true").select_option(index=1)
    page.locator(".widget-html", has_text="P(new) before").locator("visible=true").first.wait_for()
