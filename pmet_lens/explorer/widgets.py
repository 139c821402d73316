"""Controls with labels, and the only module that knows ipywidgets (core widgets, no JavaScript).

Every control is made here, so that none is without a label, a tooltip and room on a narrow page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pmet_lens.data.markup import escape

WIDE, LABEL = "16rem", "6rem"


def available() -> bool:
    """Whether ipywidgets can be imported."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        return False
    return True


def text(label: str, value: str = "", tip: str = "", hint: str = "", wide: str = WIDE) -> Any:
    """One line of text; `hint` shows while it is empty."""
    return _make("Text", label, tip, wide, value=value, placeholder=hint, continuous_update=False)


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
    """A whole number on a slider."""
    return _make(
        "IntSlider", label, tip, WIDE, min=low, max=high, value=value, continuous_update=False
    )


def span(label: str, low: int, high: int, value: tuple[int, int], tip: str = "") -> Any:
    """From one whole number to another, both on one slider."""
    return _make(
        "IntRangeSlider", label, tip, WIDE, min=low, max=high, value=value, continuous_update=False
    )


def strength(label: str, low: float, high: float, value: float, step: float, tip: str = "") -> Any:
    """A number on a slider."""
    return _make(
        "FloatSlider", label, tip, WIDE, min=low, max=high, value=value, step=step,
        readout_format=".3g", continuous_update=False,
    )  # fmt: skip


def magnitude(label: str, low: int, high: int, value: float, tip: str = "") -> Any:
    """A number on a logarithmic slider; `low` and `high` are powers of ten."""
    return _make(
        "FloatLogSlider", label, tip, WIDE, min=low, max=high, value=value, step=0.05,
        readout_format=".3g", continuous_update=False,
    )  # fmt: skip


def tick(label: str, value: bool = False, tip: str = "") -> Any:
    """A box to tick."""
    box = _make("Checkbox", label, tip, "auto", value=value, indent=False)
    box.layout.margin = "2px 1.2em 2px 0"
    return box


def button(label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
    """A button; `style`: "primary", "warning" or nothing."""
    import ipywidgets

    made = ipywidgets.Button(description=label, tooltip=tip, button_style=style)
    made.layout = ipywidgets.Layout(width="auto", min_width="6rem", flex="0 0 auto")
    made.on_click(lambda _: on_click())
    return made


def progress() -> Any:
    """A bar from 0 to 1."""
    import ipywidgets

    layout = ipywidgets.Layout(width="10rem", flex="0 0 auto")
    return ipywidgets.FloatProgress(min=0.0, max=1.0, tooltip="Progress of the step", layout=layout)


def html(value: str = "") -> Any:
    """Text, tables and figures."""
    import ipywidgets

    return ipywidgets.HTML(value, layout=ipywidgets.Layout(width="auto", max_width="100%"))


def beside(made: Any) -> Any:
    """The same, taking the room that is left beside others in a row."""
    made.layout.flex = "1 1 12rem"
    return made


def row(*children: Any) -> Any:
    """Side by side, and below each other where the page is narrow."""
    return _box("HBox", children, flex_flow="row wrap", align_items="center")


def column(*children: Any) -> Any:
    """Below each other."""
    return _box("VBox", children)


def tabs(children: Mapping[str, Any]) -> Any:
    """One page per title."""
    import ipywidgets

    made = ipywidgets.Tab(children=tuple(children.values()), titles=tuple(children))
    made.layout.width = "auto"
    return made


def folded(title: str, child: Any) -> Any:
    """A part that is closed until somebody opens it."""
    import ipywidgets

    made = ipywidgets.Accordion(children=(child,), titles=(title,), selected_index=None)
    made.layout.width = "auto"
    return made


def message(text: str, kind: str = "") -> str:
    """HTML of a line of status, read out by a screen reader; `kind` "error" is marked so."""
    role = "alert" if kind == "error" else "status"
    mark = "<b>Not done.</b> " if kind == "error" else ""
    return f'<div role="{role}" style="line-height: 1.35">{mark}{escape(text)}</div>'


def _make(kind: str, label: str, tip: str, wide: str, **options: Any) -> Any:
    import ipywidgets

    # As many side by side as there is room for, each as wide as the room lets it be.
    sized = {"width": "auto", "flex": f"1 1 {WIDE}", "max_width": "24rem", "min_width": "0"}
    layout = ipywidgets.Layout(**(sized if wide == WIDE else {"width": wide, "max_width": "98%"}))
    style = {"description_width": "initial" if kind == "Checkbox" else LABEL}
    maker = getattr(ipywidgets, kind)
    return maker(description=label, tooltip=tip or label, layout=layout, style=style, **options)


def _box(kind: str, children: Sequence[Any], **layout: str) -> Any:
    import ipywidgets

    made = getattr(ipywidgets, kind)(tuple(children))
    made.layout = ipywidgets.Layout(width="auto", overflow="visible", **layout)
    return made
