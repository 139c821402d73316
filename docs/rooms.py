"""Draws the rooms of the package, their files, and which room uses which: `docs/static/rooms.svg`.

    python docs/rooms.py

`tests/repo/test_docs.py` holds the picture against the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "static" / "rooms.svg"
ROOMS = (
    *("panel", "explorer", "plotting", "plans", "experiments", "interp", "moments"),
    *("editing", "evaluation", "shipping", "models", "data"),
)
"""From the top to the bottom."""
NAME, FILES, DOTS, ROW, LINE = 126, 640, 34, 64, 19
"""Widths of the room's name, its files and a column of dots; height of a room and of a line."""
PER_LINE = 92
"""Letters of file names in a line."""
HEAD = 96
FONT = 'font-family="system-ui, sans-serif" font-size="13" fill="#1b1b1b"'


def files_of(room: str) -> list[str]:
    """Names of the files of a room, without `__init__`."""
    return sorted(p.stem for p in (ROOT / "pmet_lens" / room).glob("[!_]*.py"))


def used_by(room: str) -> set[str]:
    """The other rooms that the files of `room` import from."""
    modules: set[str] = set()
    for path in (ROOT / "pmet_lens" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pmet_lens."):
                modules.add(str(node.module).split(".")[1])
    return modules - {room}


def picture() -> str:
    """The SVG: one row per room, a dot where it uses the room of that column."""
    width, height = NAME + FILES + DOTS * len(ROOMS) + 44, HEAD + ROW * len(ROOMS) + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            "<title>The rooms of pmet_lens and which uses which</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *_head(),
            *(line for i, room in enumerate(ROOMS) for line in _row(i, room)),
            "</svg>\n",
        ]
    )


def _head() -> Iterator[str]:
    yield f'<text x="{NAME + 12}" y="{HEAD - 14}" {FONT}>files</text>'
    for j, room in enumerate(ROOMS):
        x = _column(j) + 4
        yield f'<text transform="translate({x} {HEAD - 12}) rotate(-60)" {FONT}>{room}</text>'
    x = _column(0) - DOTS // 2
    yield f'<text x="{x - 8}" y="{HEAD - 14}" {FONT} text-anchor="end">uses</text>'


def _row(i: int, room: str) -> Iterator[str]:
    y, fill = HEAD + ROW * i, "#eef3f8" if i % 2 == 0 else "#ffffff"
    width = NAME + FILES + DOTS * len(ROOMS)
    yield f'<rect x="12" y="{y}" width="{width}" height="{ROW}" fill="{fill}"/>'
    yield f'<text x="20" y="{y + ROW // 2 + 5}" {FONT} font-weight="bold">{room}/</text>'
    lines = _wrapped(files_of(room))
    top = y + ROW // 2 + 5 - LINE * (len(lines) - 1) // 2
    for n, text in enumerate(lines):
        yield f'<text x="{NAME + 12}" y="{top + LINE * n}" {FONT}>{escape(text)}</text>'
    for j, other in enumerate(ROOMS):
        x, middle = _column(j), y + ROW // 2
        if other in used_by(room):
            yield f'<circle cx="{x}" cy="{middle}" r="6" fill="#0072b2"/>'
        elif other == room:
            yield f'<circle cx="{x}" cy="{middle}" r="2" fill="#9a9a9a"/>'


def _column(j: int) -> int:
    return 12 + NAME + FILES + DOTS * j + DOTS // 2


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) + 3 > PER_LINE:
            lines.append("")
        lines[-1] += f"{' · ' if lines[-1] else ''}{name}"
    return lines


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
