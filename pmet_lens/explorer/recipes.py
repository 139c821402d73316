"""The few lines of Python that make a view of the explorer again, in a fresh session."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from textwrap import indent
from typing import Any

from pmet_lens.data.facts import Fact
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import ABLATIONS, METHODS, named
from pmet_lens.explorer.session import Session, Step
from pmet_lens.models import loading
from pmet_lens.models.model import Site


def ask(session: Session, prompt: str, k: int, n_tokens: int) -> str:
    """What makes `Session.ask`."""
    call = _call("pl.Session(model).ask", repr(prompt), k=k, n_tokens=n_tokens)
    return _text([*_replay(session, session.on()), ""], call)


def look(
    session: Session, fact: Fact, call: str, options: Mapping[str, Any], *, bare: bool = False
) -> str:
    """One of the token-level functions (`call`: its name) on a fact; `bare`: without the edits."""
    lines = _load(session) if bare else _replay(session, session.on())
    lines += ["", f"fact = {_fact(fact, full=False)}"]
    return _text(lines, _call(f"pl.{call}", "model", "fact", **options))


def edit(session: Session, step: Step) -> str:
    """The edit of a session, made on the edits that were on the model then."""
    name = f"edit_{session.steps.index(step) + 1}"
    lines = _replay(session, step.upon, also=step)
    return _text(lines, f"pl.Session(model).answers(fact, {name})")


def ablate(session: Session, fact: Fact, methods: Mapping[str, Method], hparams: Hparams) -> str:
    """What makes `variants.ablate`."""
    lines = _own_session(session, hparams)
    lines += [f"fact = {_fact(fact)}", "methods = {"]
    lines += [indent(f"{n!r}: {_method(method)},", "    ") for n, method in methods.items()]
    return _text([*lines, "}"], "pl.ablate(session, fact, methods)")


def side_by_side(
    session: Session, fact: Fact, edits: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> str:
    """What makes `effects.side_by_side`."""
    lines = [*_own_session(session), f"fact = {_fact(fact)}", "edits = {"]
    for name, (method, change) in edits.items():
        lines.append(f"    {name!r}: ({method!r}, {dict(change)!r}),")
    return _text([*lines, "}"], "pl.side_by_side(session, fact, edits)")


def effects(session: Session, step: Step, name: str) -> str:
    """What makes `effects.effects` of one edit, with the others that are on the model."""
    others = [one for one in session.on() if one is not step]
    lines = _replay(session, others, also=step)
    made = f"edit_{session.steps.index(step) + 1}"
    lines.insert(1, "from pmet_lens.explorer import effects")
    return _text(lines, f"effects.effects(model, fact, {{{name!r}: {made}}})")


def _own_session(session: Session, hparams: Hparams | None = None) -> list[str]:
    """The model, and a session that is given what this one was."""
    names, given = ["model"], {}
    if session.given:
        names.append("moments=moments")  # those that explore was given
    if session.hparams is not None:
        given["hparams"] = hparams or session.hparams
    if session.texts is not None:
        names.append("texts=texts")
    if session.n_tokens is not None:
        given["n_tokens"] = session.n_tokens
    return [*_load(session), f"session = {_call('pl.Session', *names, **given)}"]


def _text(lines: Sequence[str], call: str) -> str:
    """The lines, and the call that makes the table."""
    return "\n".join([*lines, f"table = {call}", "table"]) + "\n"


def _call(name: str, *code: str, **values: Any) -> str:
    """A call with arguments given as code and as values, on one line where it fits."""
    arguments = [*code, *(f"{key}={_value(value)}" for key, value in values.items())]
    short = f"{name}({', '.join(arguments)})"
    lines = indent("".join(f"{argument},\n" for argument in arguments), "    ")
    return short if len(short) <= 80 else f"{name}(\n{lines})"


def _value(value: Any) -> str:
    """A value as code; of a dataclass, the fields that are not those of the class."""
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return f"({', '.join(map(_value, value))},)"
    if not is_dataclass(value):
        return repr(value)
    if isinstance(value, Hparams):  # the method knows the others
        return _call("pl.Hparams", **value.given)
    every = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
    given = {name: own for name, (own, default) in every.items() if own != default}
    return _call(f"pl.{type(value).__name__}", **given)


def _replay(session: Session, then: Sequence[Step], also: Step | None = None) -> list[str]:
    """Load the model, make the edits `then` and `also`, each on those that were on at its time, and
    leave `then` on the model."""
    needed = {*then} if also is None else {*then, also}
    for step in reversed(session.steps):  # and all that were on the model when these were made
        if step in needed:
            needed.update(step.upon)
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
    options: dict[str, Any] = {"layers": layers, "projections": projections}
    if session.own_text:
        options |= {} if session.n_tokens is None else {"n_tokens": session.n_tokens}
        return [*lines, f"moments = {_call('pl.own_moments', 'model', **options)}"]
    texts, note = ("pl.texts()", "") if session.texts is None else ("texts", "  # texts: your own")
    call = _call("pl.second_moments", "model", texts, **options, n_tokens=session.tokens_read())
    return [*lines, f"moments = {call}{note}"]


def _edit(session: Session, step: Step, name: str) -> list[str]:
    lines = [f"fact = {_fact(step.fact)}"]
    method = _method(named(step.method))
    if step.hparams is None:
        return [*lines, f"{name} = pl.edit(model, [fact], None, {method})"]
    given = ""
    if step.hparams != _known(session, step.method):
        lines.append(f"hparams = {_value(step.hparams)}")
        given = ", hparams"
    call = f"pl.edit(model, [fact], moments, {method}{given}, contexts=contexts)"
    return [*lines, f"{name} = {call}"]


def _known(session: Session, method: str) -> Hparams | None:
    try:
        return None if session.hparams is not None else session.settings(method)
    except SettingsError:
        return None


def _fact(fact: Fact, full: bool = True) -> str:
    parts = ["subject", "prompt", "target_new", "target_true"]
    parts += ["paraphrases", "neighbours", "aliases", "implications"] if full else []
    return _call("pl.Fact", **{n: getattr(fact, n) for n in parts if getattr(fact, n)})


def _method(method: Any) -> str:
    """A method by its name where it has one."""
    for name, value in METHODS.items():
        if value == method:  # "FT+L" is pl.FT_L
            return f"pl.{re.sub('[-+]', '_', name.upper())}"
    for name, value in ABLATIONS.items():
        if value == method:
            return f"pl.ABLATIONS[{name!r}]"
    return _value(method)
