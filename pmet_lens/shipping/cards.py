"""The model card beside what is shipped: what was edited and how, what that did as far as it was
measured, which weights it was computed on, and their licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data import fetched, file_format
from pmet_lens.models import loading
from pmet_lens.models.weights import EditError

MARK = "<!-- written by pmet_lens -->"
FACTS = 50
"""Listed at most."""
Effects = pd.DataFrame | Mapping[str, pd.DataFrame] | None
"""Tables of measured side effects, under their headings."""
_UNKNOWN = "not known: see the base model"


def write(
    path: Path,
    parts: Mapping[str, Any],
    what: str,
    library: str,
    receipt: Any = None,
    effects: Effects = None,
    **more: Any,
) -> None:
    """Write the card of the edit with these fields (`vars(edit)`) to `path`; a text there that is
    no such card is left alone, and the card is beside it as `EDIT.md`.

    `what`: a sentence on what lies beside it. `receipt`: `Edit.receipt`. `more`: as `text` takes.

    Raises:
        EditError: where it cannot be written.
    """
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        path = path.with_name("EDIT.md")
    made = text(parts, what, library, receipt, effects, **more)
    try:
        with file_format.whole(path) as part:
            part.write_text(made, encoding="utf-8")
    except OSError as error:
        raise EditError(f"The model card could not be written to {path}: {error}") from error


def text(
    parts: Mapping[str, Any],
    what: str,
    library: str,
    receipt: Any = None,
    effects: Effects = None,
    stated: str = "",
    written: pd.DataFrame | None = None,
) -> str:
    """The card. `stated`: the licence that the base itself states; `written`: a table of the
    tensors as they are stored."""
    name = parts["model"] or "another model"
    licence, terms = licence_of(name, stated)
    facts, known = parts["facts"], [] if receipt is None else _measured(receipt)
    sections = [
        _head(name, licence, library),
        MARK,
        f"# {plain(name)}, edited",
        f"{what} {len(facts)} fact{'' if len(facts) == 1 else 's'} of `{name}` changed with "
        "`pmet_lens`. Weights that are not named below are those of the base.",
        "## What was edited",
        _facts(facts),
        "## How",
        table(["", ""], _how(parts)),
        "## What it did",
        *(known or ["Not measured."]),
        "## Side effects",
        *(_effects(effects) or ["Not measured. An edit can change answers about other things."]),
        *([] if written is None else ["## As it is stored", frame(written), _STORED]),
        "## Base",
        f"Licence of the base: {plain(licence or _UNKNOWN)}. {plain(terms)}".rstrip(),
        "The edit was computed on these weights (SHA-256 of their bits, `[d_in, d_model]`, in "
        f"{str(parts['dtype']).removeprefix('torch.')}):",
        table(["weight", "SHA-256"], _hashes(parts)),
    ]
    return "\n\n".join(sections) + "\n"


_STORED = (
    "Rounded: the share of the change (0 to 1) that is lost by rounding to the stored type; bytes: "
    "how much longer the tensor is than it was."
)


def licence_of(name: str, stated: str = "") -> tuple[str, str]:
    """The licence of a base (empty where it is not known), and the terms that come with it."""
    if name in fetched.FETCHABLE:
        known = fetched.FETCHABLE[name]
        return known.licence, known.terms
    return stated or ("MIT" if name in loading.BUNDLED else ""), ""


def stated_by(hf: Any) -> str:
    """The licence that a configuration names; most name none."""
    config: Any = getattr(hf, "config", None)
    found = getattr(config, "license", None) or getattr(config, "licence", None)
    return found if isinstance(found, str) else ""


def plain(value: Any) -> str:
    """A value in one line of Markdown, in a table or out of it."""
    words = " ".join(str(value).split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", words)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def frame(data: pd.DataFrame) -> str:
    """A table with its index, numbers with three digits."""
    heads = [plain(data.index.name or ""), *map(plain, data.columns)]
    rows = data.reset_index().itertuples(index=False, name=None)
    return table(heads, [[_number(cell) for cell in row] for row in rows])


def _number(value: Any) -> Any:
    return f"{value:.3g}" if isinstance(value, float) else value


def _head(name: str, licence: str, library: str) -> str:
    """What model hubs read; a string of JSON is one of YAML."""
    lines = [f"base_model: {json.dumps(name)}", f"library_name: {library}"]
    if licence:
        short = "gemma" if licence.startswith("Gemma") else licence.lower()
        lines.append(f"license: {json.dumps(short)}")
    return "\n".join(["---", *lines, "tags:", "- model-editing", "- pmet_lens", "---"])


def _facts(facts: Sequence[Any]) -> str:
    rows = [(f.text, f.target_new or "", f.target_true or "") for f in facts[:FACTS]]
    more = f"\n\n… and {len(facts) - FACTS} more." if len(facts) > FACTS else ""
    return table(["prompt", "new answer", "answer before, as the record has it"], rows) + more


def _how(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("method", _named(parts["method"])), ("settings", _named(parts["hparams"]))]
    rows.append(("weights written", ", ".join(map(str, parts["factors"]))))
    rows.append(("context prefixes", str(len(parts["contexts"]))))
    if parts["frame"]:
        rows.append(("prompts stand in", parts["frame"].around("…")))
    return rows


def _named(value: Any) -> str:
    """A method or its strengths; what a file says of others, too."""
    values = getattr(value, "values", None)
    if isinstance(values, dict):
        return f"{value.name}: {json.dumps(values, ensure_ascii=False)}"
    if is_dataclass(value):
        told = {f.name: getattr(value, f.name) for f in fields(value)}
        return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in told.items())})"
    return str(value)


def _measured(receipt: Any) -> list[str]:
    facts = receipt.facts
    took = int(facts["said"].sum())
    more = f" {receipt.left_out} more were not asked about." if receipt.left_out else ""
    columns = ["prompt", "wanted", "before", "after", "nll before", "nll after", "said"]
    shown = facts[columns].head(FACTS).set_index("prompt")
    return [
        f"{took} of {len(facts)} facts are answered as wanted right after the prompt.{more}",
        frame(shown),
        "Before, after: the likeliest next token. nll: −log P of the wanted answer, nats a token.",
        "Weights:",
        frame(receipt.sites),
        *([receipt.rounding] if receipt.rounding else []),
    ]


def _effects(effects: Effects) -> list[str]:
    if effects is None:
        return []
    if isinstance(effects, pd.DataFrame):
        return [frame(effects)]
    return [line for head, data in effects.items() for line in (f"### {plain(head)}", frame(data))]


def _hashes(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = parts["parameters"]
    return [(names.get(site, str(site)), digest) for site, digest in parts["base"].items()]
