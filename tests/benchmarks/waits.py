"""What a user waits for on a real model, through public names that the package had at `BEFORE` too.

`python waits.py MODEL FACTS TEXTS` serves one version of the package (the one that Python finds
first): for each line `ROW ROUND` on standard input it does that row once and answers with the
seconds it took and the largest resident size meanwhile, in MB.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEFORE = "83a39eb"
"""The commit against which the waits are measured: the package before it met a real model."""
FIELDS = (
    "subject", "prompt", "target_new", "target_true", "paraphrases", "neighbours", "attributes",
    "generation", "relation", "case_id", "benchmark",
)  # fmt: skip
"""Of a `Fact`: what both versions know."""
LAYERS = (2, 3, 4, 5, 6, 7)
TOKENS = 2_500
"""Fewer than two per dimension of a key of SmolLM2 (1,536): time grows with their number."""


class Waits:
    """The rows. Each takes the number of the round, and other facts in every round."""

    def __init__(self, model: str, facts: str, texts: str) -> None:
        import pmet_lens as pl

        self.pl, self.path = pl, model
        self.model = pl.load(model)
        rows = json.loads(Path(facts).read_text(encoding="utf-8"))
        self.facts = [pl.Fact(**{k: _tuples(v) for k, v in row.items()}) for row in rows]
        self.texts = Path(texts).read_text(encoding="utf-8").splitlines()
        self.hparams = pl.Hparams(layers=LAYERS, second_moment_weight=20.0)
        self.kept: dict[str, Any] = {}

    def some(self, n: int, round_: int) -> list[Any]:
        """`n` of the facts, others in every round while there are enough."""
        start = n * round_ % max(1, len(self.facts) - n + 1)
        return self.facts[start : start + n]

    def load(self, _: int) -> None:
        self.pl.load(self.path)

    def prefixes(self, round_: int) -> None:
        self.kept["contexts"] = self.pl.sample_contexts(self.model, seed=round_)

    def moments(self, _: int) -> None:
        self.kept["moments"] = self.pl.second_moments(
            self.model, self.texts, LAYERS, projections=("mlp",), n_tokens=TOKENS
        )

    def edit(self, round_: int) -> None:
        self._edit(self.some(1, round_))

    def fast(self, round_: int) -> None:
        """The version before has only the published steps."""
        fast = getattr(self.hparams, "fast", lambda: self.hparams)
        self._edit(self.some(1, round_), fast())

    def _edit(self, facts: list[Any], hparams: Any = None) -> None:
        if "contexts" not in self.kept:
            self.prefixes(0)
        if "moments" not in self.kept:
            self.moments(0)
        hparams = self.hparams if hparams is None else hparams
        self.pl.edit(
            self.model, facts, self.kept["moments"], self.pl.PMET, hparams, self.kept["contexts"]
        )

    def suggest(self, round_: int) -> None:
        self.pl.suggest_hparams(self.model, self.some(1, round_))

    def trace(self, round_: int) -> None:
        self.pl.causal_trace(self.model, self.some(1, round_))

    def lens(self, round_: int) -> None:
        self.pl.lens(self.model, self.some(1, round_))

    def similarity(self, round_: int) -> None:
        self.pl.component_similarity(self.model, self.some(3, round_))

    def variance(self, _: int) -> None:
        self.pl.variance_split(self.model, self.facts)

    def patching(self, round_: int) -> None:
        self.pl.transfer(self.model, self.facts, n_pairs=1, seed=round_)

    def ability(self, _: int) -> None:
        how = {"texts": self.texts, "n_texts": 5, "others": self.facts[:10]}
        self.pl.general_ability(self.model, None, **how)

    def evaluate(self, round_: int) -> None:
        self.pl.evaluate(self.model, self.some(10, round_))

    def recall(self, round_: int) -> None:
        self.pl.recall(self.model, self.some(20, round_))

    def generate(self, round_: int) -> None:
        self.pl.generate(self.model, "The capital of France is", length=54, seed=round_)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def peak(reset: bool = False) -> float:
    """The largest resident size of this process since the last reset, in MB; NaN where the system
    does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return float(sizes[0]) / 1024 if sizes else float("nan")


def serve(waits: Waits) -> None:
    """Until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the package says is no answer
    for line in sys.stdin:
        row, round_ = line.split()
        work: Callable[[int], None] = getattr(waits, row)
        peak(reset=True)
        start = time.perf_counter()
        work(int(round_))
        took = time.perf_counter() - start
        answers.write(f"{took} {peak()}\n")
        answers.flush()


if __name__ == "__main__":
    serve(Waits(*sys.argv[1:]))
