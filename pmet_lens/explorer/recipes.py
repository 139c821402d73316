"""The few lines of Python that make a view of the explorer again, in a fresh session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import ABLATIONS, METHODS, named
from pmet_lens.explorer.session import Session, Step
from pmet_lens.models import loading
from pmet_lens.models.model import Site


def ask(session: Session, prompt: str, k: int, n_tokens: int) -> str:
    """What makes `Session.ask`."""
    call = f"pl.Session(model).ask({prompt!r}, k={k}, n_tokens={n_tokens})"
    return _text([*_before(session), "", f"table = {call}", "table"])


def look(
    session: Session, fact: Fact, call: str, options: Mapping[str, Any], *, bare: bool = False
) -> str:
    """One of the token-level functions (`call`: its name) on a fact; `bare`: without the edits."""
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    lines = [*(_load(session) if bare else _before(session)), ""]
    lines.append(f"fact = {_fact(fact, full=False)}")
    return _text([*lines, f"table = pl.{call}(model, fact{arguments})", "table"])


def edit(session: Session, step: Step) -> str:
    """The edit of a session, made on the edits that were on the model then."""
    name = f"edit_{session.steps.index(step) + 1}"
    lines = _replay(session, step.upon, also=step)
    return _text([*lines, f"table = pl.Session(model).answers(fact, {name})", "table"])


def ablate(session: Session, fact: Fact, methods: Mapping[str, Method], hparams: Hparams) -> str:
    """What makes `variants.ablate`."""
    given = []
    if session.given:
        given.append("moments=moments")  # those that explore was given
    if session.own_hparams is not None:
        given.append(f"hparams={_settings(hparams)}")
    if session.texts is not None:
        given.append("texts=texts")
    if session.n_tokens is not None:
        given.append(f"n_tokens={session.n_tokens}")
    lines = [*_load(session), f"session = pl.Session({', '.join(['model', *given])})"]
    lines += [f"fact = {_fact(fact)}", "methods = {"]
    lines += [f"    {name!r}: {_method(method)}," for name, method in methods.items()]
    return _text([*lines, "}", "table = pl.ablate(session, fact, methods)", "table"])


def _call(name: str, arguments: Sequence[str]) -> str:
    """A call, on one line where it fits."""
    short = f"{name}({', '.join(arguments)})"
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return short if len(short) <= 80 else f"{name}(\n{lines})"


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def _before(session: Session) -> list[str]:
    """The model as it is now: loaded, and with the edits that are on it."""
    return _replay(session, session.on())


def _replay(session: Session, then: Sequence[Step], also: Step | None = None) -> list[str]:
    """Load the model, make the edits `then` and `also`, each on those that were on at its time, and
    leave `then` on the model."""
    needed = _with_all_below([*then, *([] if also is None else [also])])
    lines = _load(session)
    sites = [site for s in needed if s.hparams is not None for site in s.edit.factors]
    lines += ["", *_shared(session, sites)] if sites else []
    names = {step: f"edit_{n}" for n, step in enumerate(session.steps, start=1)}
    on: list[Step] = []

    def switch(wanted: Sequence[Step]) -> list[str]:
        off = [s for s in on if s not in wanted]
        new = [s for s in wanted if s not in on]
        on[:] = [s for s in on if s in wanted] + new
        lines = [f"{names[s]}.revert_(model)" for s in off]
        return lines + [f"{names[s]}.apply_(model)" for s in new]

    for step in session.steps:
        if step in needed:
            lines += [*switch(step.upon), "", *_edit(session, step, names[step])]
    return lines + switch(then)


def _with_all_below(steps: Sequence[Step]) -> set[Step]:
    """The steps and all that were on the model when they were made, and so on."""
    needed: set[Step] = set()
    waiting = list(steps)
    while waiting:
        step = waiting.pop()
        if step not in needed:
            needed.add(step)
            waiting.extend(step.upon)
    return needed


def _load(session: Session) -> list[str]:
    name = session.model.name
    note = "" if name in loading.BUNDLED else "  # as you loaded it"
    return ["import pmet_lens as pl", "", f"model = pl.load({name!r}){note}"]


def _shared(session: Session, sites: Sequence[Site]) -> list[str]:
    """Second moments and context prefixes."""
    lines = ["contexts = pl.sample_contexts(model)"]
    if session.given:
        return [*lines, "moments = ...  # those that explore was given"]
    layers = sorted({site.layer for site in sites})
    projections = tuple(sorted({site.projection for site in sites}))
    call = f"layers={layers}, projections={projections}, n_tokens={session.tokens_read()}"
    texts, note = ("pl.texts()", "") if session.texts is None else ("texts", "  # texts: your own")
    return [*lines, f"moments = pl.second_moments(model, {texts}, {call}){note}"]


def _edit(session: Session, step: Step, name: str) -> list[str]:
    lines = [f"fact = {_fact(step.fact)}"]
    method = _method(named(step.method))
    if step.hparams is None:
        return [*lines, f"{name} = pl.edit(model, [fact], None, {method})"]
    given = ""
    if step.hparams != _known(session, step.method):
        lines.append(f"hparams = {_settings(step.hparams)}")
        given = ", hparams"
    return [
        *lines,
        f"{name} = pl.edit(model, [fact], moments, {method}{given}, contexts=contexts)",
    ]


def _known(session: Session, method: str) -> Hparams | None:
    try:
        return None if session.own_hparams is not None else session.settings(method)
    except SettingsError:
        return None


def _fact(fact: Fact, full: bool = True) -> str:
    parts = ["subject", "prompt", "target_new", "target_true"]
    parts += ["paraphrases", "neighbours"] if full else []
    return _call("pl.Fact", [f"{n}={getattr(fact, n)!r}" for n in parts if getattr(fact, n)])


def _settings(hparams: Hparams) -> str:
    """The fields that were given; the method knows the others."""
    return _call("pl.Hparams", [f"{name}={value!r}" for name, value in hparams.given.items()])


def _method(method: Any) -> str:
    """A method by its name where it has one."""
    constants = {"AlphaEdit": "ALPHAEDIT", "FT-W": "FT_W", "FT+L": "FT_L"}
    for name, value in METHODS.items():
        if value == method:
            return f"pl.{constants.get(name, name)}"
    for name, value in ABLATIONS.items():
        if value == method:
            return f"pl.ABLATIONS[{name!r}]"
    solver = f"pl.{method.solver!r}"
    return (
        f"pl.Method(delta_at={method.delta_at!r}, write={method.write!r}, "
        f"spread={method.spread!r}, solver={solver})"
    )
