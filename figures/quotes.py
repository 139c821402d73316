"""Tables and numbers that pages quote: `python figures/quotes.py` puts the committed ones into
README and docs.

Between `<!-- NAME -->` and `<!-- /NAME -->` of a page stands what the files of that name hold, and
nothing else; in the sentences of `said.py` stand the cells it names. `tests/repo/test_figures.py`
sees where they do not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import said

ROOT = Path(__file__).resolve().parents[1]
BENCH = "tests/benchmarks/results"
FREE = "figures/results/free_answers"
QUOTES = {
    ("README.md", "seen"): (f"{FREE}/smollm2-135m/seen.md",),
    ("docs/results.md", "results"): ("figures/results/main.md",),
    ("docs/results.md", "study"): ("figures/results/claims.md",),
    ("docs/ablations.md", "ablations"): ("figures/results/paper/ablations.md",),
    ("docs/ablations.md", "variants"): tuple(
        f"figures/results/variants/{model}.md"
        for model in ("smollm2-135m", "gemma-3-270m", "world-sequential")
    ),
    ("docs/performance.md", "bench"): (f"{BENCH}/cpu.md", f"{BENCH}/operations.md"),
    ("docs/performance.md", "session"): (f"{BENCH}/session.md",),
    ("docs/performance.md", "panel"): (f"{BENCH}/panel_smollm2-135m.md",),
    ("docs/performance.md", "waits"): (f"{BENCH}/waits.md",),
    ("docs/performance.md", "fast_preset"): (f"{BENCH}/fast_preset_pmet.md",),
    ("docs/performance.md", "fast_preset_memit"): (f"{BENCH}/fast_preset_memit.md",),
    ("docs/performance.md", "precision"): (f"{BENCH}/precision.md",),
    ("docs/performance.md", "gptj"): (f"{BENCH}/gptj_shapes.md",),
    ("docs/performance.md", "cuda"): (f"{BENCH}/cuda.md", f"{BENCH}/operations_cuda.md"),
    ("docs/performance.md", "memory"): (f"{BENCH}/memory.md",),
    ("docs/performance.md", "mass_edit"): ("figures/results/mass_edit/mass_edit.md",),
    ("docs/results.md", "paper"): ("figures/results/paper/main.md",),
    ("docs/results.md", "tune"): tuple(
        f"figures/results/tune/{model}.md"
        for model in ("smollm2-135m", "world-sequential", "world")
    ),
    ("docs/results.md", "real_facts"): ("figures/results/real/main.md",),
    ("docs/results.md", "methods"): ("figures/results/real/methods.md",),
    ("docs/results.md", "known"): ("figures/results/real/known/methods.md",),
    ("docs/results.md", "verdicts"): ("figures/results/real/verdicts.md",),
    ("docs/results.md", "real_study"): ("figures/results/real/study.md",),
    ("docs/free_answers.md", "free_answers"): (f"{FREE}/smollm2-135m/free_answers.md",),
    ("docs/free_answers.md", "seen_others"): tuple(
        f"{FREE}/{model}/seen.md" for model in ("gemma-3-270m", "world-sequential", "world")
    ),
    ("docs/own_models.md", "real"): ("figures/results/real_model/real.md",),
}
"""(page, name) -> the files that it quotes there, one after the other."""


def wanted(files: tuple[str, ...]) -> str:
    """What stands between the marks."""
    return "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)


def between(page: str, name: str) -> re.Pattern[str]:
    """Where on the page that is."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


def fill() -> list[str]:
    """Replace what pages quote and say by what the files hold; the pages that changed."""
    changed = []
    for one in said.said():
        path = ROOT / one.page
        before = path.read_text(encoding="utf-8")
        after, found = one.pattern.subn(lambda _, text=one.text: text, before)
        if found != 1:
            raise SystemExit(f"{one.page} has the words {one.words!r} {found} times, not once.")
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(one.page)
    for (page, name), files in QUOTES.items():
        path, text = ROOT / page, wanted(files)
        before = path.read_text(encoding="utf-8")
        after = between(page, name).sub(lambda _, text=text: text, before, count=1)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(page)
    return sorted(set(changed))


if __name__ == "__main__":
    sys.stdout.write("".join(f"{page} brought up to date\n" for page in fill()))
