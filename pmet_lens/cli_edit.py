"""`pmet-lens edit` and `apply`: from facts in a file to what people run, in one command; and
back."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pmet_lens as pl
from pmet_lens.data import fetched
from pmet_lens.evaluation import ability
from pmet_lens.interp import suggestion
from pmet_lens.models.loading import of_the_world, quiet
from pmet_lens.moments.inputs import EditInputs
from pmet_lens.shipping import checkpoints, gguf_copies, undoing

Say = Callable[..., None]
_TRACED = 24
"""Facts that settings are suggested from."""
_NAMED = 5
"""Facts that did not take, by name."""


def edit(args: argparse.Namespace, load: Any, facts_of: Any, texts_of: Any, say: Say) -> None:
    """The command: load, settings, moments, edit, evaluate, write; then say what was done."""
    if args.undo:
        return _undo(args, say)
    check_out(args)
    began, method = time.monotonic(), pl.named(args.method)
    model = load(args)
    facts = facts_of(args.facts, args.n, model)
    hparams: Any = None
    moments = contexts = None
    if isinstance(method, pl.Method):
        known = _settings(args, model, method, len(facts), facts_of, say)
        texts = texts_of(args.texts, model) if args.texts else None  # then what fits the model
        inputs = EditInputs(model, None, known, texts, n_tokens=100_000)
        if inputs.own_text:  # which takes longer to write than to read
            inputs.n_tokens = None
        hparams, contexts = inputs.settings(method, len(facts)), inputs.contexts()
        if args.moments:
            moments = pl.open_moments(args.moments)
        elif args.texts == "python":  # a part of it, and kept in the cache
            moments = pl.own_moments(model, hparams.layers, projections=method.write, text="python")
        else:
            moments, _ = inputs.needed(method, hparams)
        if args.cost:
            say(str(pl.estimate(model, facts, method, hparams, contexts)), sys.stderr)
    made = pl.edit(model, facts, moments, method, hparams, contexts, check=False)
    receipt = made.receipt(model, None)
    made = replace(made, answered=int(receipt.facts["said"].sum()))
    effects = _effects(model, made, args.quick)
    # A card without other things says so: what the facts score is in its receipt.
    table = write(args, made, model, receipt, None if args.quick else effects)
    say(f"model: {model!r}")
    say(f"facts: {len(facts)} from {args.facts or 'the package'}")
    say(f"method: {args.method}, {_strengths(made.hparams)}")
    for line in (*_taken(made, receipt), *_measured(effects), *_weights(receipt, table)):
        say(line)
    say(f"time: {time.monotonic() - began:.0f} s; the model itself is as it was")
    if kind_of(args) in ("gguf", "checkpoint"):
        say(f"to take it back: pmet-lens edit --undo {args.out} --out …")
    say(f"{made!r}: {args.out}")


def _settings(
    args: argparse.Namespace, model: Any, method: pl.Method, n_facts: int, facts_of: Any, say: Say
) -> pl.Hparams | None:
    """Those asked for; None: those known for the model. A real model without any gets those that a
    causal trace of what it knows suggests."""
    if args.layers and not args.suggest:
        return pl.Hparams(tuple(args.layers))
    if not args.suggest:
        try:
            pl.hparams_for(model, method)
            return None
        except pl.SettingsError:
            if of_the_world(model):
                raise
    if args.suggest:
        traced = facts_of(args.suggest, 30, model)
        of, facts = traced, lambda: traced
    else:  # those that are asked tell which ones are known
        of, facts = pl.real_facts(), lambda: pl.recalled(model, n=_TRACED)
    told = [_TRACED, *(fact.record() for fact in of)]
    suggested = suggestion.kept_suggestion(model, facts, told, n_facts)
    say(f"settings: {suggested!r}", sys.stderr)
    return suggested.hparams


def apply(args: argparse.Namespace, load: Any, say: Say) -> None:
    """The command: an edit from its file, written like a new one."""
    check_out(args)
    model = load(args)
    made = pl.Edit.load(args.edit, model, any_base=args.any_base)
    write(args, made, model)
    say(f"{made!r}: {args.out}")


def _undo(args: argparse.Namespace, say: Say) -> None:
    lost = undoing.restored(args.undo, args.out)
    for line in _few(lost, "no longer said: "):
        say(line)
    say(f"{args.undo} as it was before {len(lost)} facts were edited, bit for bit: {args.out}")


def kind_of(args: argparse.Namespace) -> str:
    """What `--out` asks for: "adapter", "edit", "gguf" or "checkpoint"."""
    endings = {".safetensors": "edit", ".gguf": "gguf"}
    return "adapter" if args.adapter else endings.get(Path(args.out).suffix, "checkpoint")


def check_out(args: argparse.Namespace) -> None:
    """Refuse before minutes of work what could not be written after them."""
    out, kind = Path(args.out).expanduser(), kind_of(args)
    if args.type and kind != "gguf":
        raise pl.EditError("--type is how tensors of a .gguf file are stored: give --out x.gguf.")
    if args.adapter and out.suffix in (".gguf", ".safetensors"):
        raise pl.EditError(f"An adapter is a directory of two files, so {out} is no name for it.")
    if kind == "checkpoint":
        checkpoints.check_free(out)
    if kind == "gguf":
        if args.model not in fetched.FETCHABLE:  # those are fetched by loading them
            try:
                gguf_copies.layout(gguf_copies.source_of(args.model))
            except pl.EditError as error:
                why = f"A .gguf file is a copy of the one that is edited: {error}"
                raise pl.EditError(why) from error
        if out.exists():
            raise pl.EditError(f"{out} is there already; name another file.")
    there = next(p for p in out.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise pl.EditError(f"{out} cannot be written: {there} is no directory that can be.")


def write(
    args: argparse.Namespace, made: Any, model: Any, receipt: Any = None, effects: Any = None
) -> Any:
    """Write the edit to `--out`; of a GGUF file the table of its tensors, else None."""
    kind, told = kind_of(args), {"receipt": receipt, "effects": effects}
    base = {"any_base": getattr(args, "any_base", False), "undoable": True}
    with quiet(not sys.stderr.isatty()):
        if kind == "edit":
            made.save(args.out)
        elif kind == "adapter":
            made.to_peft(args.out, **told)
        elif kind == "checkpoint":
            made.save_model(model, args.out, **told, **base)
        else:
            return made.save_gguf(args.model, args.out, args.type, **told, **base)
    return None


def _effects(model: Any, made: Any, quick: bool) -> dict[str, Any]:
    """Tables under their headings: the facts before and after, and what else the model can do."""
    before = pl.evaluate(model, made.facts)
    with made.applied(model):
        after = pl.evaluate(model, made.facts)
    found = {
        "The facts, before": pl.summarise(before),
        "The facts, after": pl.summarise(after, before),
    }
    if quick:
        return found
    how: dict[str, Any] = {}
    if not of_the_world(model):  # a real model takes its time: the first of the real facts
        known = ability.others_of(pl.real_facts(_OTHERS), made.facts)
        how = {"others": known, "texts": [f"{f.text} {f.target_true}." for f in known]}
        how["prompts"] = [fact.text for fact in known]
    before = pl.general_ability(model, **{**how, "prompts": []})
    after = pl.general_ability(model, made, **how)
    return found | {"Other things, before": before, "Other things, after": after}


_OTHERS = 60
"""Known things that are asked before and after."""


def _strengths(hparams: Any) -> str:
    """The settings in a line; the card and the edit's file have them all."""
    if not isinstance(hparams, pl.Hparams):
        return str(hparams)
    layers = " ".join(map(str, hparams.layers))
    strength = f"λ {hparams.second_moment_weight:g}, at most {hparams.n_steps} steps"
    return f"layers {layers}, {strength} of {hparams.lr:g}"


def _taken(made: Any, receipt: Any) -> Iterator[str]:
    facts = receipt.facts
    yield f"took: {made.answered} of {len(facts)} facts have the new answer right after the prompt"
    missed = facts[~facts["said"]]
    told = [
        f"{row.prompt!r} still goes on with {row.after!r}, not {row.wanted!r}"
        for row in missed.itertuples()
    ]
    yield from _few(told, "DID NOT TAKE: ")
    if told:
        yield (
            "  (another --method, other --layers or --suggest may help; from Python also more "
            "steps or a smaller second_moment_weight)"
        )


def _few(lines: list[str], head: str) -> Iterator[str]:
    for line in lines[:_NAMED]:
        yield f"{head}{line}"
    if len(lines) > _NAMED:
        yield f"{head}… and {len(lines) - _NAMED} more"


def _measured(effects: dict[str, Any]) -> Iterator[str]:
    for what in ("The facts", "Other things"):
        before, after = (effects.get(f"{what}, {when}") for when in ("before", "after"))
        if before is None or after is None:
            continue
        shared = [m for m in after.index if m in before.index and m != "KL"]
        pairs = [f"{m} {before['mean'][m]:.3g} → {after['mean'][m]:.3g}" for m in shared]
        pairs += [f"KL {after['mean']['KL']:.2g}"] if "KL" in after.index else []
        yield f"{what.lower()}: {', '.join(pairs)}"


def _weights(receipt: Any, table: Any) -> Iterator[str]:
    sites = receipt.sites
    most = 100 * float(sites["relative"].max())
    yield f"weights: {len(sites)} written, each changed by at most {most:.2g} % of its norm"
    if receipt.rounding:
        yield f"  {receipt.rounding}"
    if table is not None:
        kinds = ", ".join(
            sorted({f"{a} → {b}" for a, b in zip(table.was, table.stored, strict=True)})
        )
        lost, grown = 100 * float(table["rounded"].max()), float(table["bytes"].sum()) / 1e6
        yield f"stored: {kinds}, which loses {lost:.2g} % of the change; {grown:+.1f} MB"
