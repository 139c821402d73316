"""The files of this package: safetensors with a JSON header. Nothing in them can run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "pmet_lens"


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    head: Mapping[str, Any],
    what: str,
    error: type[ValueError],
) -> None:
    """Write `tensors` and `head` (which names its "format"). The file appears whole or not at all.

    Raises `error`, which says that `what` ("an edit") could not be written there.
    """
    part = Path(f"{path}.part")
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        save_file(whole, str(part), metadata={KEY: json.dumps(head)})
        part.replace(path)
    except (OSError, SafetensorError) as cause:
        part.unlink(missing_ok=True)
        raise error(f"{what} could not be written to {path}: {cause}") from cause


def read(
    path: str | Path, form: str, what: str, error: type[ValueError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU) of a file whose header names the format `form`.

    Raises `error`, which says that the file is missing, damaged, or not `what` ("an edit").
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            head = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as cause:
        raise error(f"{path} cannot be read as {what}: {cause}") from cause
    if not isinstance(head, dict) or head.get("format") != form:
        raise error(f"{path} is a safetensors file, but not {what} saved by pmet_lens.")
    return head, tensors
