"""`pl.explore(model)`: ask, look, edit and ablate by hand, in a notebook.

The explorer only shows: the session, `variants` and the room `interp` do the work, and
every view gives the lines of Python that make it again (`recipes`). Long steps run
in a thread (`jobs`); while one runs, leave the model alone in other cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmet_lens.data import datasets, markup
from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.editing.method import Hparams
from pmet_lens.evaluation.knowledge import recalled
from pmet_lens.explorer import widgets
from pmet_lens.explorer.frame import Shell
from pmet_lens.explorer.jobs import Runner
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
    facts: Fact | Sequence[Fact] | None = None,
    *,
    moments: Mapping[Site, Any] | None = None,
    hparams: Hparams | None = None,
    texts: Sequence[str] | None = None,
    n_tokens: int | None = None,
) -> Explorer:
    """A panel to ask, look into, edit and ablate `model` by hand; show it as a cell's last line.

    Args:
        facts: examples to choose from; None: facts that the unedited model knows, of the bundled
            world for a model of it, else of `pl.real_facts()` (asked once, which takes seconds).
        moments, hparams, texts, n_tokens: as `Session` takes them. Second moments that are missing
            are computed when the first edit needs them.

    Where ipywidgets is missing (`pip install "pmet-lens[notebook]"`), or nothing can show it, the
    explorer shows itself as text, and `explorer.session` does the same without buttons.
    """
    examples = _examples(model) if facts is None else listed(facts)
    return Explorer(Session(model, moments, hparams, texts, n_tokens), examples)


def _examples(model: Model) -> Sequence[Fact]:
    if loading.of_the_world(model):
        return datasets.counterfact(n=_EXAMPLES)
    try:
        with model.live_edits.bare():
            return recalled(model, n=_EXAMPLES)
    except FactError:  # a model that reads no whole sentence
        return ()


class Explorer(Shell):
    """The panel of `explore`. `session` does the work; `wait` blocks until a step is over."""

    def __init__(self, session: Session, facts: Sequence[Fact] = ()) -> None:
        if not widgets.available():
            self.session, self.runner, self.box = session, Runner(), None
            return
        super().__init__(session, facts)
        self.ask, self.look = AskTab(self), LookTab(self)
        self.edit, self.ablate = EditTab(self), AblateTab(self)
        tabs = {"Ask": self.ask, "Look": self.look, "Edit": self.edit, "Ablate": self.ablate}
        self.pages = widgets.tabs({title: tab.box for title, tab in tabs.items()})
        self.box.children += (self.pages,)
        self.say(f"{session.model.name}: {session.model.n_layers} layers, unedited.")

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
