"""HTML for notebooks: tables and key-value lists that take their colours from the page.

Nothing here names a colour, so that dark and light themes both work.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

LINE = "1px solid rgba(128, 128, 128, 0.45)"
_CELL = f"padding: 0.2em 0.7em 0.2em 0; text-align: left; border-bottom: {LINE}; {{}}"
_TABLE = "border-collapse: collapse; line-height: 1.35; max-width: 100%; margin: 0.3em 0"


class Raw(str):
    """HTML that is put into a table as it is."""


def escape(value: object) -> str:
    """Text of a value for HTML; numbers short, a missing one as "–"."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, float):
        return "–" if value != value else f"{value:.3f}" if abs(value) < 1 else f"{value:.4g}"
    return html.escape("–" if value is None else str(value))


def table(
    rows: Sequence[Sequence[object]], head: Sequence[str], caption: str = "", wide: int = 20
) -> str:
    """A table. Numbers stand right; texts longer than `wide` characters may wrap."""
    numeric = [
        any(_number(row[i]) for row in rows)
        and all(_number(row[i]) or row[i] is None for row in rows)
        for i in range(len(head))
    ]

    def cell(value: object, i: int, kind: str) -> str:
        style = "text-align: right; font-variant-numeric: tabular-nums; " if numeric[i] else ""
        if kind == "td" and len(str(value)) <= wide and not isinstance(value, Raw):
            style += "white-space: nowrap; "
        scope = ' scope="col"' if kind == "th" else ""
        return f'<{kind}{scope} style="{_CELL.format(style)}">{escape(value)}</{kind}>'

    top = "".join(cell(name, i, "th") for i, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(cell(value, i, 'td') for i, value in enumerate(row))}</tr>" for row in rows
    )
    name = f'<caption style="text-align: left">{escape(caption)}</caption>' if caption else ""
    inside = f"{name}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div style="overflow-x: auto"><table style="{_TABLE}">{inside}</table></div>'


def pairs(values: Mapping[str, object], title: str = "") -> str:
    """What something is made of: a title and one line per value."""
    lines = "".join(
        f'<tr><th scope="row" style="{_CELL.format("font-weight: 600; vertical-align: top;")}">'
        f'{escape(name)}</th><td style="{_CELL.format("")}">{escape(value)}</td></tr>'
        for name, value in values.items()
    )
    head = f"<div><b>{escape(title)}</b></div>" if title else ""
    return f'{head}<table style="{_TABLE}"><tbody>{lines}</tbody></table>'


def listed(values: Sequence[object], most: int = 3) -> Raw:
    """Values one below the other, the first `most` of them and how many more there are."""
    more = [f"… and {len(values) - most} more"] if len(values) > most else []
    return Raw("<br>".join([*map(escape, values[:most]), *more]) or "–")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
