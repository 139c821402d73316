"""`python tests/shorten.py FOLDER`: copies of the notebooks that ask the same on fewer facts.

`make test` runs the copies; `make test-all` the notebooks themselves, whose outputs are kept. Only
numbers are changed: a pattern that fits no notebook any more is an error.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    r"^EVERY = \d+": "EVERY = 60",
    r"^(FACTS|EDITED) = \d+": r"\1 = 3",
    r"n_tokens=\d+_000": "n_tokens=4_000",
    r"\[::1[05]\]": "[::60]",
    r"n=(10|20)\b": "n=4",
    r"n_(permutations|pairs)=\d+": r"n_\1=10",
    r"projections=\(\"mlp\",\)\)": 'projections=("mlp",), n_tokens=4_000)',
    r"explore\(model\)": "explore(model, n_tokens=4_000)",
}
"""Pattern in the code → what stands there in the copy."""


def shortened(source: str) -> tuple[str, set[str]]:
    """The code with fewer facts, and the patterns that were in it."""
    found = set()
    for pattern, text in SHORTER.items():
        source, n = re.subn(pattern, text, source, flags=re.MULTILINE)
        found |= {pattern} if n else set()
    return source, found


def write(folder: Path) -> set[str]:
    """Copies in `folder`/notebooks, beside links to what they read; the patterns that were used."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    for name in ("figures", "pmet_lens"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "notebooks").glob("*.csv"):
        shutil.copy(path, folder / "notebooks")
    used = set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.source, found = shortened(cell.source)
                used |= found
        nbformat.write(notebook, folder / "notebooks" / path.name)
    return used


if __name__ == "__main__":
    unused = SHORTER.keys() - write(Path(sys.argv[1]).absolute())
    if unused:
        sys.exit(f"no notebook has {', '.join(sorted(unused))}: change tests/shorten.py")
