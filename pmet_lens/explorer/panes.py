"""What the tabs of the explorer share: the shell they live in, and a pane that shows a view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from pmet_lens.data import markup
from pmet_lens.explorer import widgets
from pmet_lens.explorer.fact_panel import FactPanel
from pmet_lens.explorer.jobs import Runner, Tick
from pmet_lens.explorer.session import Session
from pmet_lens.explorer.views import View


@runtime_checkable
class Shell(Protocol):
    """What a tab may ask of the explorer."""

    session: Session
    fact: FactPanel
    runner: Runner

    def button(self, label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
        """A button that is off while a step runs."""
        ...

    def run(self, what: str, work: Callable[[Tick], Any], then: Callable[[Any], object]) -> None:
        """Run a step in a thread, then show its result."""
        ...

    def say(self, text: str, kind: str = "") -> None:
        """Show a line of status."""
        ...


class Pane:
    """What is told, the figure of it, and its export: links, files in a folder, the lines."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self.view: View | None = None
        self._figure, self._text, self._out = widgets.html(), widgets.html(), widgets.html()
        self._folder = widgets.text("Folder", "exports", "Where Save writes, beside the notebook")
        tip = "Show links to PNG, SVG, CSV and Python of this view, and the lines that make it"
        export = shell.button("Export", tip, self._export)
        save = shell.button("Save", "Write these four files into the folder", self._save)
        self._row = widgets.row(export, self._folder, save)
        self._row.layout.display = "none"
        self.box = widgets.column(self._text, self._figure, self._row, self._out)

    def show(self, view: View, text: str = "") -> None:
        """Show a view, and HTML above its figure."""
        self.view = view
        self._figure.value, self._text.value = view.inline(), text
        self._out.value = ""
        self._row.layout.display = ""

    def figure(self, html: str) -> None:
        """Show a figure that is still growing, without export."""
        self._figure.value, self._text.value, self._out.value = html, "", ""
        self._row.layout.display = "none"

    def _export(self) -> None:
        if self.view is not None:
            style = (
                f"border: {markup.LINE}; padding: 0.5em; overflow-x: auto; white-space: pre-wrap"
            )
            code = f'<pre style="{style}">{markup.escape(self.view.code)}</pre>'
            self._out.value = f"<p>{self.view.links()}</p>{code}"

    def _save(self) -> None:
        if self.view is not None:
            written = self.view.save(self._folder.value or ".")
            self._shell.say(f"Wrote {', '.join(map(str, written))}.")
