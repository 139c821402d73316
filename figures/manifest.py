"""What a command made, and from what: `manifest.json` beside the figures.

One entry per command, replaced whenever it runs: date, versions, seed, SHA-256 of every input and
of every table, and which tables each figure was drawn from. A figure stands in one entry: that of
the command that computed its tables, or, where nobody has told about these tables, that of
`redraw.py`. `figures/out/manifest.json` is of what lies there; `figures/manifest.json` is of the
committed results, written with `--record`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pmet_lens as pl

HERE = Path(__file__).parent
RECORDED = HERE / "manifest.json"
SEED = 0
"""No script sets a seed: every draw (world, context prefixes, noise, pairs, bootstrap) follows from
the default of its function, which is this one; the text of second moments is that of seed 1."""
PACKAGES = ("matplotlib", "numpy", "pandas", "torch", "transformers", "transformer-lens")


def digest(*files: Path) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def package() -> dict[str, str]:
    """What results follow from: the code of the package, its world, its models and editors."""
    root = Path(pl.__file__).parent
    bundled = {f"pmet_lens/{f.relative_to(root)}": f for f in root.rglob("*.safetensors")}
    bundled["pmet_lens/bundled/world.json"] = root / "bundled" / "world.json"
    found = {"pmet_lens/**/*.py": digest(*sorted(root.rglob("*.py")))}
    return found | {name: digest(file) for name, file in sorted(bundled.items())}


def write(
    command: str,
    folder: Path,
    figures: Mapping[str, Iterable[str]],
    *,
    computed: bool,
    into: Path | None = None,
) -> None:
    """Replace the entry of `command` in `into` (None: `folder`'s manifest). `figures`: name -> the
    tables (files of `folder`) it was drawn from; `computed`: the tables were made from the package,
    by this command."""
    path = folder / "manifest.json" if into is None else into
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole.pop(command, None)
    mine = {name: sorted(used) for name, used in figures.items()}
    for other in whole.values():
        twice = mine.keys() & other["figures"].keys()
        for name in twice:
            told = all(other["tables"][t] == digest(folder / t) for t in mine[name])
            drop = mine if told and not computed and other["inputs"] else other["figures"]
            del drop[name]
    whole[command] = {
        "date": str(date.today()),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "seed": SEED,
        "inputs": package() if computed else {},
        "tables": {table: digest(folder / table) for table in sorted(set(chain(*mine.values())))},
        "figures": dict(sorted(mine.items())),
    }
    for entry in whole.values():
        used = set(chain(*entry["figures"].values()))
        entry["tables"] = {table: of for table, of in entry["tables"].items() if table in used}
    kept = {name: entry for name, entry in sorted(whole.items()) if entry["figures"]}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
