"""`pl.explore(model)`: ask, look, edit and ablate by hand, in a notebook.

The explorer only shows: the session, `variants` and the room `interp` do the work, and
every view gives the lines of Python that make it again (`recipes`). Long steps run
in a thread (`jobs`); while one runs, leave the model alone in other cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from pmet_lens.data import datasets, markup
from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import Hparams
from pmet_lens.explorer import widgets
from pmet_lens.explorer.fact_panel import FactPanel
from pmet_lens.explorer.jobs import Runner, Stopped, Tick
from pmet_lens.explorer.session import Session
from pmet_lens.explorer.tab_ablate import AblateTab
from pmet_lens.explorer.tab_ask import AskTab
from pmet_lens.explorer.tab_edit import EditTab
from pmet_lens.explorer.tab_look import LookTab
from pmet_lens.models import loading
from pmet_lens.models.model import Model, Site

_EXAMPLES = 40
_PLAIN = """pl.explore needs {need}. The same by hand:

explorer.session.ask(prompt)         next tokens, before and after
pl.lens_tokens(model, fact)          what each component says at each token
pl.trace_tokens(model, fact)         where the answer is recalled
pl.subject_attention(model, fact)    who looks at the subject
explorer.session.edit(fact)          edit one fact; explorer.session.undo(step) takes it back
pl.compare, pl.ABLATIONS             variations of PMET side by side"""


def explore(
    model: Model,
    facts: Sequence[Fact] | None = None,
    *,
    moments: Mapping[Site, Any] | None = None,
    hparams: Hparams | None = None,
    texts: Sequence[str] | None = None,
    n_tokens: int | None = None,
) -> Explorer:
    """A panel to ask, look into, edit and ablate `model` by hand; show it as a cell's last line.

    Args:
        facts: examples to choose from; None: of the bundled world, for a bundled model.
        moments, hparams, texts, n_tokens: as `Session` takes them. Second moments that are missing
            are computed when the first edit needs them.

    Where ipywidgets is missing (`pip install "pmet-lens[notebook]"`), or nothing can show it, the
    explorer shows itself as text, and `explorer.session` does the same without buttons.
    """
    if facts is None:
        facts = datasets.counterfact(n=_EXAMPLES) if model.name in loading.BUNDLED else ()
    return Explorer(Session(model, moments, hparams, texts, n_tokens), facts)


class Explorer:
    """The panel of `explore`. `session` does the work; `wait` blocks until a step is over."""

    def __init__(self, session: Session, facts: Sequence[Fact] = ()) -> None:
        self.session = session
        self.runner = Runner(self._progress, self._busy)
        self.box: Any = None
        self._buttons: list[Any] = []
        if widgets.available():
            self._build(facts)

    def _build(self, facts: Sequence[Fact]) -> None:
        self._bar, self._status = widgets.progress(), widgets.html()
        stop = "Stop the step that is running; the model stays as it was"
        self._stop = widgets.button("Stop", stop, self.runner.stop, "warning")
        self._stop.disabled = True
        self.fact = FactPanel(self.session, facts)
        self.ask, self.look = AskTab(self), LookTab(self)
        self.edit, self.ablate = EditTab(self), AblateTab(self)
        pages = {
            "Ask": self.ask.box,
            "Look": self.look.box,
            "Edit": self.edit.box,
            "Ablate": self.ablate.box,
        }
        self.pages = widgets.tabs(pages)
        bar = widgets.row(self._bar, self._stop, self._status)
        self.box = widgets.column(self.fact.box, bar, self.pages)
        self.say(f"{self.session.model.name}: {self.session.model.n_layers} layers, unedited.")

    def button(self, label: str, tip: str, on_click: Callable[[], object], style: str = "") -> Any:
        """A button that is off while a step runs."""
        made = widgets.button(label, tip, lambda: self._safely(on_click), style)
        made.disabled = self.runner.busy
        self._buttons.append(made)
        return made

    def run(self, what: str, work: Callable[[Tick], Any], then: Callable[[Any], object]) -> None:
        """Run `work(tick)` in a thread with progress and the stop button on, then show its result
        with `then`. Errors are shown in words."""
        self.runner.start(work, lambda future: self._finish(what, future, then))
        self._progress(0, 0, what)

    def say(self, text: str, kind: str = "") -> None:
        """Show a line of status."""
        self._status.value = widgets.message(text, kind)

    def wait(self) -> None:
        """Block until the step that is running is over, and what it shows is there."""
        self.runner.wait()

    def _finish(self, what: str, future: Future[Any], then: Callable[[Any], object]) -> None:
        error = future.exception()
        self._bar.value = 0.0 if error else 1.0
        if error is None:
            self.say(f"{what}: done.")  # before `then`, which may have more to say
            self._safely(lambda: then(future.result()))
        elif isinstance(error, Stopped):
            self.say(f"{what}: stopped. The model is as it was.")
        else:
            self._failed(error)

    def _safely(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (ValueError, OSError) as error:  # every error of this package is a ValueError
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        self.say(f"{kind}{error}", "error")

    def _busy(self, busy: bool) -> None:
        if self.box is None:
            return
        self._stop.disabled = not busy
        for made in self._buttons:
            made.disabled = busy

    def _progress(self, done: int, total: int, what: str) -> None:
        if self.box is None:
            return
        self._bar.value = min(1.0, done / total) if total else 0.0
        self.say(f"{what}: {done:,} of {total:,}" if total else f"{what} …")

    def __repr__(self) -> str:
        if self.box is None:
            need = 'ipywidgets (pip install "pmet-lens[notebook]")'
        else:
            need = "a notebook to be shown in"
        return _PLAIN.format(need=need)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The widget where there is one; text, and HTML for a page that cannot run it."""
        plain = repr(self)
        bundle = {} if self.box is None else dict(self.box._repr_mimebundle_())
        bundle["text/plain"] = plain
        bundle["text/html"] = f"<pre>{markup.escape(plain)}</pre>"
        return bundle
