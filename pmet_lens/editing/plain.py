"""Values as JSON has them and back, hashes of them, and what is said when it fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pmet_lens.editing import solvers
from pmet_lens.editing.finetune import FineTune, FineTuneHparams
from pmet_lens.editing.mend import Mend, MendHparams
from pmet_lens.editing.method import Hparams, Method

_SOLVERS = (solvers.Ridge, solvers.Exact, solvers.NullSpace)
_STRENGTHS = (Hparams, FineTuneHparams, MendHparams)
_VALUES = {kind.__name__: kind for kind in (Method, FineTune, Mend, *_STRENGTHS, *_SOLVERS)}


class GridError(ValueError):
    """A grid, or a folder of results, that cannot be used; the message says what to do."""


def hash_of(plain: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of what JSON can hold."""
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_plain(value: Any) -> Any:
    """A method, strengths, or anything JSON can hold, as JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
        return {"is": type(value).__name__, **own}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`, for methods and strengths this package has."""
    if isinstance(value, list):
        return tuple(from_plain(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    own = {k: from_plain(v) for k, v in value.items() if k != "is"}
    if value.get("is") not in _VALUES:
        raise GridError(f"There is no {value.get('is')!r} among {', '.join(_VALUES)}.")
    return _VALUES[value["is"]](**own)
