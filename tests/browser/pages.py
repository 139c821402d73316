"""A notebook in JupyterLab or Notebook 7, as a person uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

OUT = Path(__file__).parent / "out"
SECOND = 1000


class Page:
    """A notebook in JupyterLab."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.complaints = page, []
        page.set_default_timeout(60 * SECOND)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        # On a busy machine Jupyter may ask for something (a kernel, which version of a file).
        dialog = page.locator("dialog.jp-Dialog")
        page.add_locator_handler(dialog, lambda: dialog.locator(".jp-mod-accept").last.click())
        page.goto(address)
        # JupyterLab says in its status bar that the kernel is there; Notebook 7 has only the sign.
        lab = "/lab/" in address
        sign = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        page.wait_for_selector("text=/Python 3 .ipykernel. . Idle/" if lab else sign)
        self.complaints.clear()  # those before a cell is run are of Jupyter (Notebook 7.6 has one)

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def run_all(self) -> None:
        """Run all cells and wait for the last one. A page that has just been opened may say Idle
        and yet lose what it is sent: then once more, as a person would."""
        for _ in range(3):
            self.menu("Run", "Run All Cells")
            lost = 0
            while lost < 10:  # seconds in which no cell waits for its turn
                self.page.wait_for_timeout(SECOND)
                prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
                if len(prompts) > 2 and all(re.search(r"\[\d+\]", text) for text in prompts):
                    return
                lost = 0 if any("*" in text for text in prompts) else lost + 1
        pytest.fail(f"not every cell was run: {prompts}")

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
