"""The walk from `pl.load` to the first edited answer on a real model, in a process of its own.

`python tests/benchmarks/first_answer.py` prints its parts in seconds, and the largest resident
size. With an empty cache (`$PMET_LENS_CACHE`) it is the first time on this model, else a later one.
`--fast` edits by `Hparams.fast()`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from inspect import signature
from typing import Any

MODEL, LAYERS = "smollm2-135m", (2, 3, 4, 5, 6, 7)


def first_answer() -> dict[str, float]:
    """Seconds of each part, for one fact: what a stranger's first session does. Run it in a fresh
    process; with a fresh cache it is the first time on this model, again the second time."""
    start, parts = time.perf_counter(), dict[str, float]()

    def part(name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = work()
        parts[name] = time.perf_counter() - begun
        return found

    import pmet_lens as pl

    model = part("load", lambda: pl.load(MODEL))
    fact = pl.real_facts(1)[0]
    if hasattr(pl, "own_moments"):
        quick = {"text": "python"} if "text" in signature(pl.own_moments).parameters else {}
        moments = part("text and moments", lambda: pl.own_moments(model, LAYERS, **quick))
    else:  # as the README said before
        from itertools import islice

        texts = part("text", lambda: list(islice(pl.sampled_texts(model), 175)))
        moments = part(
            "moments",
            lambda: pl.second_moments(model, texts, LAYERS, projections=("mlp",), n_tokens=16_000),
        )
    contexts = part("prefixes", lambda: pl.sample_contexts(model))
    hparams = pl.Hparams(LAYERS)
    hparams = hparams.fast() if "--fast" in sys.argv[1:] else hparams
    edit = part("edit", lambda: pl.edit(model, fact, moments, "PMET", hparams, contexts))
    with edit.applied(model):
        part("answer", lambda: pl.generate(model, fact.text, length=24, top_k=1))
    parts["all"] = time.perf_counter() - start
    return parts


if __name__ == "__main__":
    found = first_answer()
    found["peak, GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(json.dumps({name: round(value, 2) for name, value in found.items()}) + "\n")
