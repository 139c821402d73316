"""The models that can be opened by name: bundled, fetched, and those that can be fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pmet_lens.data import fetched, markup
from pmet_lens.editing.method import Hparams
from pmet_lens.explorer import widgets
from pmet_lens.models import loading

LAYERS: Mapping[str, tuple[int, ...]] = {
    "smollm2-135m": (2, 3, 4, 5, 6, 7),
    "gemma-3-270m": (2, 3, 4, 5),
}
"""Critical layers to begin with, of models that nobody published settings for: those that
`docs/models.md` edits. They follow a causal trace and are not tuned."""

Open = Callable[[str, bool], object]
"""Opens a model by name, or fetches it first; `True`: its licence was agreed to."""


def start(name: str) -> Hparams | None:
    """Settings to begin with, strengths as released; None: the model has some of its own, or
    nothing is known of it."""
    return Hparams(LAYERS[name]) if name in LAYERS else None


class ModelsPanel:
    """A row per model: what it is, its size and licence, and the button that opens or fetches it;
    and a field for any other."""

    def __init__(self, button: Callable[..., Any], open_model: Open) -> None:
        self._button, self._open = button, open_model
        self._rows = widgets.column()
        tip = "A directory, a .gguf file or a hub id"
        self.other = widgets.text("Other model", tip=tip, hint="path or hub id")
        tip = "Open the model of this path or hub id"
        opens = button("Open other model", tip, self._open_other)
        inside = widgets.column(self._rows, widgets.row(self.other, opens))
        self.box = widgets.folded("Models", inside)
        self.buttons: dict[str, Any] = {}
        self._lines: dict[str, Any] = {}
        self._agreed: dict[str, Any] = {}
        table = loading.available_models()
        for name in table["name"]:
            self._rows.children = (*self._rows.children, self._row(str(name)))
        self.update()

    def unfold(self, wide: bool) -> None:
        """Show the list, or fold it away."""
        self.box.selected_index = 0 if wide else None

    def update(self, current: str | None = None) -> None:
        """Say what is here now, and which model is `current`."""
        for row in loading.available_models().to_dict("records"):
            name = row["name"]
            bundled = name in loading.BUNDLED
            state = "bundled" if bundled else "fetched" if row["here"] else "not fetched yet"
            state = "open" if name == current else state
            text = f"{row['architecture']}, {row['size']:,.0f} MB, {row['licence']}: {state}"
            self._lines[
                name
            ].value = f'<div style="line-height: 1.35"><b>{name}</b> {markup.escape(text)}</div>'
            self.buttons[name].description = f"{'Open' if row['here'] else 'Fetch'} {name}"
            if name in self._agreed:
                self._agreed[name].layout.display = "none" if row["here"] else ""

    def _row(self, name: str) -> Any:
        line = self._lines[name] = widgets.beside(widgets.html())
        tip = f"Open {name} in this panel; it is fetched first, with pip, where it is not here"
        self.buttons[name] = self._button(f"Open {name}", tip, lambda: self._open_named(name))
        parts = [self.buttons[name], line]
        known = fetched.FETCHABLE.get(name)
        if known is not None and known.terms:
            label = f"I agree to the {known.licence}"
            self._agreed[name] = widgets.tick(label, tip=known.terms)
            parts.append(self._agreed[name])
        return widgets.row(*parts)

    def _open_named(self, name: str) -> None:
        agreed = self._agreed.get(name)
        self._open(name, bool(agreed is not None and agreed.value))

    def _open_other(self) -> None:
        if self.other.value.strip():
            self._open(self.other.value.strip(), False)
