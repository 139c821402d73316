"""A view: a table, the figure of it, and the lines that make it again, in every format.

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

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pmet_lens.data import markup
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
        written = []
        for name, content in self.files().items():
            (folder / name).write_bytes(content)
            written.append(folder / name)
        return written

    def links(self) -> str:
        """HTML of one link per file that holds it, so that it works wherever the kernel runs."""
        found = []
        for name, content in self.files().items():
            kind = _MIME[Path(name).suffix]
            href = f"data:{kind};base64,{base64.b64encode(content).decode()}"
            found.append(
                f'<a style="text-decoration: underline" download="{name}" href="{href}">{name}</a>'
            )
        return "Download: " + " · ".join(found)


def _saved(figure: Figure, kind: str, transparent: bool = False) -> bytes:
    file = BytesIO()
    figure.savefig(file, format=kind, transparent=transparent, dpi=200)
    return file.getvalue()
