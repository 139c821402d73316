"""The few lines of Python that make a view of the explorer again, in a fresh session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from pmet_lens import sources
from pmet_lens.adapter import Site
from pmet_lens.facts import Fact
from pmet_lens.methods import ABLATIONS, METHODS, named
from pmet_lens.sessions import Session, Step
from pmet_lens.settings import Hparams, Method, SettingsError


def ask(session: Session, prompt: str, k: int, n_tokens: int) -> str:
    """What makes `Session.ask`."""
    call = f"pl.Session(model).ask({prompt!r}, k={k}, n_tokens={n_tokens})"
    return _text([*_before(session), "", f"table = {call}", "table"])


def look(
    session: Session, fact: Fact, call: str, options: Mapping[str, Any], *, bare: bool = False
) -> str:
    """One of the token-level functions (`call`: its name) on a fact; `bare`: without the edits."""
    told = "".join(f", {name}={value!r}" for name, value in options.items())
    lines = [*(_load(session) if bare else _before(session)), ""]
    lines.append(f"fact = {_fact(fact, full=False)}")
    return _text([*lines, f"table = pl.{call}(model, fact{told})", "table"])


def edit(session: Session, step: Step) -> str:
    """The edit of a session, with the edits it was made on."""
    place = session.steps.index(step)
    below = [s for s in session.steps[:place] if session.is_on(s)]
    lines = [*_before(session, below, also=[step]), "", *_edit(session, step)]
    return _text([*lines, "table = pl.Session(model).answers(fact, edit)", "table"])


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


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def _before(
    session: Session, steps: Sequence[Step] | None = None, also: Sequence[Step] = ()
) -> list[str]:
    """The model as it is now: loaded, and with the edits that are on it (`steps`)."""
    on = [s for s in session.steps if session.is_on(s)] if steps is None else list(steps)
    lines = _load(session)
    if not on and not also:
        return lines
    sites = [site for s in [*on, *also] if s.hparams is not None for site in s.edit.factors]
    lines += ["", *_shared(session, sites)] if sites else []
    for step in on:
        lines += ["", *_edit(session, step), "edit.apply_(model)  # edit.revert_(model) undoes it"]
    return lines


def _load(session: Session) -> list[str]:
    name = session.model.name
    note = "" if name in sources.BUNDLED else "  # as you loaded it"
    return ["import pmet_lens as pl", "", f"model = pl.load({name!r}){note}"]


def _shared(session: Session, sites: Sequence[Site]) -> list[str]:
    """Second moments and context prefixes."""
    lines = ["contexts = pl.sample_contexts(model)"]
    if session.given:
        return [*lines, "moments = ...  # those that explore was given"]
    layers = sorted({site.layer for site in sites})
    projections = tuple(sorted({site.projection for site in sites}))
    texts = "pl.texts()" if session.texts is None else "texts  # those that explore was given"
    call = f"layers={layers}, projections={projections}, n_tokens={session.tokens_read()}"
    if session.texts is not None:
        return [*lines, f"moments = pl.second_moments(model, texts, {call})  # texts: your own"]
    return [*lines, f"moments = pl.second_moments(model, {texts}, {call})"]


def _edit(session: Session, step: Step) -> list[str]:
    lines = [f"fact = {_fact(step.fact)}"]
    method = _method(named(step.method))
    if step.hparams is None:
        return [*lines, f"edit = pl.edit(model, [fact], None, {method})"]
    told = ""
    if step.hparams != _known(session, step.method):
        lines.append(f"hparams = {_settings(step.hparams)}")
        told = ", hparams"
    return [*lines, f"edit = pl.edit(model, [fact], moments, {method}{told}, contexts=contexts)"]


def _known(session: Session, method: str) -> Hparams | None:
    try:
        return None if session.own_hparams is not None else session.settings(method)
    except SettingsError:
        return None


def _fact(fact: Fact, full: bool = True) -> str:
    parts = ["subject", "prompt", "target_new", "target_true"]
    parts += ["paraphrases", "neighbours"] if full else []
    told = [f"{name}={getattr(fact, name)!r}" for name in parts if getattr(fact, name)]
    return f"pl.Fact({', '.join(told)})"


def _settings(hparams: Hparams) -> str:
    """The fields that are not those of the class."""
    told = [
        f"{f.name}={getattr(hparams, f.name)!r}"
        for f in fields(hparams)
        if f.default is MISSING or getattr(hparams, f.name) != f.default
    ]
    return f"pl.Hparams({', '.join(told)})"


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
