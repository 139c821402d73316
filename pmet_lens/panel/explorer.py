"""`pl.explore("smollm2-135m")`: ask, look, edit, compare and ablate by hand, in a notebook.

The panel only shows: the session, `effects`, `variants` and the room `interp` do the work, and
every view gives the lines of Python that make it again (`recipes`). Long steps run in a thread
(`jobs`); while one runs, leave the model alone in other cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmet_lens.data import datasets, fetched, markup
from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.editing.method import Hparams
from pmet_lens.evaluation.knowledge import recalled
from pmet_lens.explorer import models_panel, widgets
from pmet_lens.explorer.frame import Page, Shell
from pmet_lens.explorer.jobs import Runner, Tick
from pmet_lens.explorer.models_panel import ModelsPanel
from pmet_lens.explorer.session import Session
from pmet_lens.models import loading
from pmet_lens.models.model import Model, Site
from pmet_lens.panel.tab_ablate import AblateTab
from pmet_lens.panel.tab_ask import AskTab
from pmet_lens.panel.tab_edit import EditTab
from pmet_lens.panel.tab_look import LookTab
from pmet_lens.panel.tab_two import TwoTab

_EXAMPLES = 40
_PLAIN = """pl.explore needs {need}. The same by hand:

explorer.session.ask(prompt)         next tokens, before and after
pl.lens_tokens(model, fact)          what each component says at each token
pl.trace_tokens(model, fact)         where the answer is recalled
pl.subject_attention(model, fact)    who looks at the subject
explorer.session.edit(fact)          edit one fact; explorer.session.undo(step) takes it back
pl.side_by_side(session, fact, …)    two edits of one fact, in full sentences
pl.compare, pl.ABLATIONS             variations of PMET side by side"""


def _made(call: Callable[[], Any]) -> Any:
    return call()


def explore(
    model: Model | str | Path | None = None,
    facts: Fact | Sequence[Fact] | None = None,
    *,
    moments: Mapping[Site, Any] | None = None,
    hparams: Hparams | None = None,
    texts: Sequence[str] | None = None,
    n_tokens: int | None = None,
) -> Explorer:
    """A panel to ask, look into, edit and ablate a model by hand; show it as a cell's last line.

    Args:
        model: one that is loaded, or what `pl.load` takes: then it is loaded beside the kernel, and
            fetched first where it has to be. None: the list of models alone, to choose from.
        facts: examples to choose from; None: facts that the unedited model knows, of the bundled
            world for a model of it, else of `pl.real_facts()` (asked once, which takes seconds).
        moments, hparams, texts, n_tokens: as `Session` takes them. Second moments that are missing
            are computed when the first edit needs them. `hparams` None, and a fetched model:
            the layers that `docs/models.md` edits, strengths as released.

    Where ipywidgets 8 is missing (`pip install "pmet-lens[notebook]"`), or nothing can show it, the
    explorer shows itself as text, and `explorer.session` does the same without buttons. Where no
    event loop runs, every step is waited for; in a notebook call `explorer.wait()` before you use
    `explorer.session` in code.

    Raises:
        ModelError: for a model that cannot be loaded, where there are no widgets to say it.
    """
    given = {"moments": moments, "hparams": hparams, "texts": texts, "n_tokens": n_tokens}
    examples = None if facts is None else listed(facts)
    if isinstance(model, Model):
        return Explorer(Session(model, **given), examples)
    explorer = Explorer(None, examples, given)
    if model is not None:
        explorer.open(model)
    return explorer


class Explorer(Shell):
    """The panel of `explore`. `session` does the work (None: no model is open yet); `wait` blocks
    until a step is over."""

    def __init__(
        self,
        session: Session | None,
        facts: Sequence[Fact] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.session: Any = session
        self._facts, self._given = facts, dict(given or {})
        self.pages: dict[str, Any] = {}
        if not widgets.available():
            self.runner, self.box = Runner(), None
            return
        super().__init__()
        self.models = ModelsPanel(self.button, self.open)
        self.box.children = (self.models.box, self.line)
        if session is None:
            self.models.unfold(True)
            self.say("Choose a model.")
        else:
            self._show_page(session.model.name, self._page(session, _at_once(session, facts)))
            if facts is None and not self.fact.example.options[1:]:
                self._offer_known()

    def open(self, source: str | Path, accept_licence: bool = False) -> None:
        """Open a model by its name, path or hub id, beside the one that is open; results of before
        are there again when that is opened once more. `accept_licence`: as `pl.load` takes it."""
        name = str(source)
        if self.box is None:
            made = loading.load(source, accept_licence=accept_licence)
            self.session = self._session(made, name)
        elif name in self.pages:
            self._show_page(name, self.pages[name])
        else:
            step = f"Open {name}"
            self.run(
                step,
                lambda tick: self._opened(tick, source, accept_licence),
                lambda page: self._show_page(name, page),
            )

    def _opened(self, tick: Tick, source: str | Path, agreed: bool) -> Page:
        """The page of a model, whose parts are made one at a time: a click is heard between two."""
        session, facts = self._load(tick, source, agreed)
        tick(0, 0, "its page")
        return self._page(session, facts, self.runner.there)

    def _load(self, tick: Tick, source: str | Path, agreed: bool) -> tuple[Session, Sequence[Fact]]:
        name = str(source)
        if name in fetched.FETCHABLE and not fetched.is_here(name):
            what = f"fetching {name} (bytes)"
            fetched.fetch_model(name, agreed, on_bytes=lambda done, all_: tick(done, all_, what))
        tick(0, 0, "reading the weights")
        session = self._session(loading.load(source, accept_licence=agreed), name)
        tick(0, 0, "which facts it knows")
        facts = self._facts if self._facts is not None else _known(session)
        return session, facts

    def _session(self, model: Model, name: str) -> Session:
        given = dict(self._given)
        given["hparams"] = given.get("hparams") or models_panel.start(name)
        return Session(model, **given)

    def _page(
        self, session: Session, facts: Sequence[Fact], part: Callable[..., Any] = _made
    ) -> Page:
        """Each part of the page is made by a call of its own, `part(call)`."""
        page: Any = part(lambda: Page(self, session, facts))
        page.ask = part(lambda: AskTab(page))
        page.look = part(lambda: LookTab(page))
        page.edit = part(lambda: EditTab(page))
        page.ablate = part(lambda: AblateTab(page))
        page.two = part(lambda: TwoTab(page, page.edit))
        tabs = {"Ask": page.ask, "Look": page.look, "Edit": page.edit}
        tabs |= {"Side by side": page.two, "Ablate": page.ablate}
        page.tabs = part(lambda: widgets.tabs({title: tab.box for title, tab in tabs.items()}))
        return page

    def _show_page(self, name: str, page: Any) -> None:
        self.pages[name] = page
        self.session, self.fact, self.ask, self.look = page.session, page.fact, page.ask, page.look
        self.edit, self.two, self.ablate = page.edit, page.two, page.ablate
        self.models.update(name)
        self.models.unfold(False)
        self.box.children = (self.models.box, page.fact.box, self.line, page.tabs)
        n = len(page.session.on())
        state = f"{n} edit{'s' if n > 1 else ''} on it" if n else "unedited"
        self.say(f"{name}: {page.session.model.n_layers} layers, {state}.")

    def _offer_known(self) -> None:
        """Ask the model which facts it knows, and offer them."""
        session, panel = self.session, self.fact
        self.run("Which facts the model knows", lambda tick: _known(session), panel.offer)

    def __repr__(self) -> str:
        if self.box is None:
            need = 'ipywidgets 8 (pip install "pmet-lens[notebook]")'
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


def _at_once(session: Session, facts: Sequence[Fact] | None) -> Sequence[Fact]:
    """The examples that cost no forward pass."""
    if facts is not None:
        return facts
    return datasets.counterfact(n=_EXAMPLES) if loading.of_the_world(session.model) else ()


def _known(session: Session) -> Sequence[Fact]:
    model = session.model
    if loading.of_the_world(model):
        return datasets.counterfact(n=_EXAMPLES)
    try:
        with model.live_edits.bare():
            return recalled(model, n=_EXAMPLES)
    except FactError:  # a model that reads no whole sentence
        return ()
