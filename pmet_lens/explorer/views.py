"""A view (a table, its figure, and the code that makes it again), and the pane that shows it.

In a notebook the figure takes the colour of the page's text, so that it can be read on dark and
light; in a file it stands on white.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pmet_lens.data import markup
from pmet_lens.explorer import widgets
from pmet_lens.plotting.maps import restyle

_INK = "#0a0b0c"
"""No colour of any data; it becomes the colour of the page's text."""
_MIME = {".png": "image/png", ".svg": "image/svg+xml", ".csv": "text/csv", ".py": "text/plain"}


@dataclass(frozen=True)
class View:
    """What one look at the model gave."""

    name: str
    """Names its files: "ask", "edit-1"."""
    title: str
    """Says in words what the figure shows, for those who cannot see it."""
    table: pd.DataFrame
    draw: Callable[[Figure], None]
    """Draws the table into an empty figure."""
    code: str
    """Python that makes the table, as `table`."""
    size: tuple[float, float] = (7.0, 2.6)
    """Inches."""

    def figure(self, ink: str = "black") -> Figure:
        """The figure, with axes and letters in `ink`; on white unless it is saved transparent."""
        figure = Figure(figsize=self.size, layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        self.draw(figure)
        restyle(figure, ink)
        return figure

    def inline(self) -> str:
        """HTML of the figure that follows the theme of the page."""
        text = _saved(self.figure(_INK), "svg", transparent=True).decode("utf-8")
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        label = markup.escape(self.title).replace('"', "&quot;")
        head = f'<svg role="img" aria-label="{label}" style="max-width: 100%; height: auto" '
        return text.replace("<svg ", head, 1).replace(_INK, "currentColor")

    def files(self) -> dict[str, bytes]:
        """File name -> content: PNG and SVG of the figure, CSV of the table, and the lines."""
        figure = self.figure()
        return {
            f"{self.name}.png": _saved(figure, "png"),
            f"{self.name}.svg": _saved(figure, "svg"),
            f"{self.name}.csv": self.table.to_csv(index=False).encode(),
            f"{self.name}.py": self.code.encode(),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `files` into a folder, made where it is missing. Raises `OSError` as files do."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        files = {folder / name: content for name, content in self.files().items()}
        for path, content in files.items():
            path.write_bytes(content)
        return list(files)

    def links(self) -> str:
        """HTML of one link per file that holds it, so that it works wherever the kernel runs."""
        links = []
        for name, content in self.files().items():
            kind = _MIME[Path(name).suffix]
            href = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            style = "text-decoration: underline; color: inherit"
            links.append(f'<a style="{style}" download="{name}" href="{href}">{name}</a>')
        return "Download: " + " · ".join(links)


class Pane:
    """Shows a view: text, figure, and its export as links, as files in a folder, and as code. Views
    of before are kept, and can be chosen again."""

    def __init__(self, button: Callable[..., Any], say: Callable[[str], object]) -> None:
        self._say = say
        self.view: View | None = None
        self.kept: list[tuple[View, str, str]] = []
        self._figure, self._text, self._out = widgets.html(), widgets.html(), widgets.html()
        tip = "All results of this tab, the newest first"
        self.results = widgets.choice("Result", [("none yet", -1)], tip=tip, wide="auto")
        self.results.layout.display = "none"
        self.results.observe(lambda change: self._choose(change["new"]), names="value")
        self._folder = widgets.text("Folder", "exports", "Where Save writes, beside the notebook")
        tip = "Show links to PNG, SVG, CSV and Python of this view, and the lines that make it"
        export = button("Export", tip, self._export)
        save = button("Save", "Write these four files into the folder", self._save)
        self._row = widgets.row(export, self._folder, save)
        self._row.layout.display = "none"
        shown = (self.results, self._text, self._figure, self._row, self._out)
        self.box = widgets.column(*shown)

    def show(self, view: View, text: str = "", figure: str | None = None) -> None:
        """Show a view, and HTML above its figure; `figure`: its HTML, where that is drawn yet."""
        self.kept.append((view, text, view.inline() if figure is None else figure))
        numbers = range(len(self.kept) - 1, -1, -1)
        self.results.options = [(f"{n + 1}. {self.kept[n][0].title}", n) for n in numbers]
        self.results.layout.display = "" if len(self.kept) > 1 else "none"
        self.results.value = len(self.kept) - 1
        self._choose(len(self.kept) - 1)

    def _choose(self, number: int) -> None:
        if number >= 0:
            self.view, self._text.value, self._figure.value = self.kept[number]
            self._out.value = ""
            self._row.layout.display = ""

    def figure(self, html: str) -> None:
        """Show a figure that is still growing, without export."""
        self._figure.value, self._text.value, self._out.value = html, "", ""
        self._row.layout.display = "none"

    def again(self) -> None:
        """Show what was shown before a figure that did not grow to its end."""
        self._figure.value = self._text.value = ""
        self._choose(self.results.value)

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
            self._say(f"Wrote {', '.join(map(str, written))}.")


def _saved(figure: Figure, kind: str, transparent: bool = False) -> bytes:
    file = BytesIO()
    figure.savefig(file, format=kind, transparent=transparent, dpi=200)
    return file.getvalue()
