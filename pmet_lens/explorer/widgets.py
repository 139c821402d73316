"""Controls with labels, and the only module that knows ipywidgets (core widgets, no JavaScript).

Every control is made here, so that none is without a label, a tooltip and room on a narrow page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pmet_lens.data.markup import LINE, escape

WIDE, LABEL = "16rem", "6rem"
_BOX = {"width": "auto", "overflow": "visible"}


RULES = """<style>
.lm-mod-hidden, .p-mod-hidden {display: none !important}
.jupyter-widget-tab .lm-TabBar-tabLabel, .jupyter-widget-Collapse-header
{color: var(--jp-ui-font-color0, inherit) !important}
</style>"""
"""A closed tab is not shown (pages of Colab have no such rule), and its title can be read: the grey
of the widgets' own has a contrast of 4.45."""


def available() -> bool:
    """Whether ipywidgets can be imported, and is 8 or later: titles of tabs, colours of letters and
    how a widget shows itself came with it."""
    try:
        import ipywidgets
    except ImportError:
        return False
    return int(ipywidgets.__version__.split(".")[0]) >= 8


def text(label: str, value: str = "", tip: str = "", hint: str = "", live: bool = False) -> Any:
    """One line of text; `hint` shows while it is empty. `live`: every letter is told, not only what
    stands there when somebody leaves the field."""
    options = {"value": value, "placeholder": hint, "continuous_update": live}
    return _make("Text", label, tip, WIDE, **options)


def area(label: str, value: str = "", tip: str = "", rows: int = 3) -> Any:
    """Several lines of text, over the whole width."""
    return _make("Textarea", label, tip, "auto", value=value, rows=rows, continuous_update=False)


def choice(label: str, options: Any, value: Any = None, tip: str = "", wide: str = WIDE) -> Any:
    """One of several; `options`: a list, or pairs of text and value."""
    options = list(options)
    first = options[0][1] if isinstance(options[0], tuple) else options[0]
    return _make(
        "Dropdown", label, tip, wide, options=options, value=first if value is None else value
    )


def suggestion(label: str, options: Sequence[str], tip: str = "", hint: str = "") -> Any:
    """Any text, with some to choose from."""
    return _make("Combobox", label, tip, WIDE, options=tuple(options), placeholder=hint)


def number(label: str, low: int, high: int, value: int, tip: str = "") -> Any:
    """A whole number within bounds. Numbers are fields, not sliders, whose handles have no name for
    a screen reader."""
    return _number("BoundedIntText", label, tip, low, high, value)


class Span:
    """From one whole number to another, in two fields; the one that is changed takes the other
    along."""

    def __init__(self, what: str, low: int, high: int, tip: str = "") -> None:
        self.first = number(f"First {what}", low, high, low, tip)
        self.last = number(f"Last {what}", low, high, high, tip)
        self.first.observe(lambda _: self._follow(self.last, max), names="value")
        self.last.observe(lambda _: self._follow(self.first, min), names="value")

    def _follow(self, other: Any, of: Callable[[int, int], int]) -> None:
        other.value = of(self.first.value, self.last.value)

    @property
    def value(self) -> tuple[int, int]:
        """Both numbers, the smaller one first."""
        return self.first.value, self.last.value

    @value.setter
    def value(self, both: tuple[int, int]) -> None:
        self.last.value = both[1]  # may take the first along, down
        self.first.value = both[0]
        self.last.value = both[1]

    @property
    def disabled(self) -> bool:
        """Whether neither can be changed."""
        return self.first.disabled

    @disabled.setter
    def disabled(self, off: bool) -> None:
        self.first.disabled = self.last.disabled = off


def strength(label: str, low: float, high: float, value: float, step: float, tip: str = "") -> Any:
    """A number within bounds."""
    return _number("BoundedFloatText", label, tip, low, high, value, step=step)


def magnitude(label: str, low: int, high: int, value: float, tip: str = "") -> Any:
    """A number whose size counts; `low` and `high` are powers of ten."""
    return _number("BoundedFloatText", label, tip, 10.0**low, 10.0**high, value)


def tick(label: str, value: bool = False, tip: str = "") -> Any:
    """A box to tick."""
    box = _make("Checkbox", label, tip, "auto", value=value, indent=False)
    box.layout.margin = "2px 1.2em 2px 0"
    return box


def button(label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
    """A button; `style`: "primary", "warning" or nothing. Their colours can be read on themselves
    (contrast at least 7), which those of the widgets cannot."""
    layout = {"width": "auto", "min_width": "6rem", "flex": "0 0 auto"}
    ground = {"primary": "#0d47a1", "warning": "#8a3200"}.get(style)
    layout |= {"border": LINE} if ground is None else {}  # some themes give it no ground
    colours = {} if ground is None else {"button_color": ground, "text_color": "#ffffff"}
    made = _new("Button", layout, description=label, tooltip=tip, style=colours)
    made.on_click(lambda _: on_click())
    return made


def progress() -> Any:
    """A bar from 0 to 1."""
    layout = {"width": "10rem", "flex": "0 0 auto"}
    return _new("FloatProgress", layout, min=0.0, max=1.0, tooltip="Progress of the step")


def html(value: str = "") -> Any:
    """Text, tables and figures."""
    return _new("HTML", {"width": "auto", "max_width": "100%"}, value=value)


def beside(made: Any) -> Any:
    """The same, taking the room that is left beside others in a row."""
    made.layout.flex = "1 1 12rem"
    return made


def row(*children: Any) -> Any:
    """Side by side, and below each other where the page is narrow."""
    layout = {"flex_flow": "row wrap", "align_items": "center"}
    return _new("HBox", _BOX | layout, children=children)


def column(*children: Any) -> Any:
    """Below each other."""
    return _new("VBox", _BOX, children=children)


def tabs(children: Mapping[str, Any]) -> Any:
    """One page per title."""
    pages, titles = tuple(children.values()), tuple(children)
    return _new("Tab", {"width": "auto"}, children=pages, titles=titles)


def folded(title: str, child: Any) -> Any:
    """A part that is closed until somebody opens it."""
    parts = {"children": (child,), "titles": (title,), "selected_index": None}
    return _new("Accordion", {"width": "auto"}, **parts)


def message(text: str, kind: str = "") -> str:
    """HTML of a line of status, read out by a screen reader; `kind` "error" is marked so, and
    "progress", which changes every second, is not read out."""
    role = {"error": "alert", "progress": "presentation"}.get(kind, "status")
    mark = "<b>Not done.</b> " if kind == "error" else ""
    return f'<div role="{role}" style="line-height: 1.35">{mark}{escape(text)}</div>'


def _number(
    kind: str, label: str, tip: str, low: Any, high: Any, value: Any, **options: Any
) -> Any:
    options |= {"min": low, "max": high, "value": value, "continuous_update": False}
    return _make(kind, label, tip, WIDE, **options)


def _make(kind: str, label: str, tip: str, wide: str, **options: Any) -> Any:
    """A control with its label. As many stand side by side as there is room for, each as wide as
    the room lets it be."""
    sized = {"width": "auto", "flex": f"1 1 {WIDE}", "max_width": "24rem", "min_width": "0"}
    layout = sized if wide == WIDE else {"width": wide, "max_width": "98%"}
    style = {"description_width": "initial" if kind == "Checkbox" else LABEL}
    return _new(kind, layout, description=label, tooltip=tip or label, style=style, **options)


def _new(kind: str, layout: Mapping[str, str], **options: Any) -> Any:
    import ipywidgets

    return getattr(ipywidgets, kind)(layout=ipywidgets.Layout(**layout), **options)
