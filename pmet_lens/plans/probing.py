"""How fast a machine makes the shards of a grid: a small grid of the same methods is made, and
timed."""

from __future__ import annotations

import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmet_lens.data.file_format import hash_of, to_plain
from pmet_lens.experiments import target_files
from pmet_lens.experiments.grid import GridError, Run
from pmet_lens.experiments.store import Folder
from pmet_lens.experiments.tasks import OWN, tasks_of
from pmet_lens.experiments.worker import Worker
from pmet_lens.models.model import Model
from pmet_lens.plans import costs
from pmet_lens.plans.workload import Count, Shard

FACTS, OTHERS, TOKENS, TEXTS = 12, 100, 12_000, 20
"""How much of everything is made."""


def seconds_of(model: Model, shards: Sequence[Shard]) -> list[float]:
    """What each of these shards would take on this machine: its work, at the rate of a small run
    with the same method. Work is what `Count` counts, in facts where nobody counts operations."""
    runs = {shard.run.digest: shard.run for shard in shards}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the facts: `run` will say so
        for i, run in enumerate(runs.values()):
            if not i:
                _timed(model, small(run, facts=2), Path(folder) / "warm", {})
            if any(_key(s) not in rates for s in shards if s.run.digest == run.digest):
                rates |= _timed(model, small(run), Path(folder), rates)
    return [_work(shard) * rates[_key(shard)] for shard in shards]


def seconds_on(worker: Worker, shards: Sequence[Shard]) -> list[float]:
    """The same on a worker of Ray."""
    return seconds_of(worker.model, shards)


def small(run: Run, facts: int = FACTS) -> Run:
    """The same run on a little of everything: facts from everywhere in the list, or the first where
    they are edited in groups; as many parts of text."""
    step = 1 if run.group else max(1, len(run.facts) // facts)
    n_tokens = min(run.n_tokens, TOKENS)
    cut = replace(run.cut, tokens=-(-n_tokens // run.cut.parts(run.n_tokens)))
    less = {"n_tokens": n_tokens, "n_texts": min(run.n_texts, TEXTS), "others": run.others[:OTHERS]}
    generate = None if run.generate is None else min(run.generate, 2)
    return replace(run, facts=run.facts[::step][:facts], generate=generate, cut=cut, **less)


def _timed(model: Model, run: Run, folder: Path, known: dict[str, float]) -> dict[str, float]:
    """Seconds per work of every kind of shard that this run has; measurements that are known are
    left out."""
    Folder(folder).begin()
    worker = Worker(str(folder), {run.digest: run}, model=model)
    count = Count(model, costs.sizes_of(model))
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for task in tasks_of([run], worker.weights)[run.digest]:
        shard = count.shard(task, [run])
        key = _key(shard)
        if key in known and task.kind in OWN and task.kind != "edit":
            continue
        outcome = worker.do(task)
        if outcome.state != "done":
            raise GridError(f"A probe of {run.name!r} failed: {outcome.error}")
        if outcome.seconds:
            spent[key][0] += outcome.seconds
            spent[key][1] += _work(shard)
    worker.leave()
    return {key: seconds / work for key, (seconds, work) in spent.items() if key not in known}


def _key(shard: Shard) -> str:
    """What the rate of a shard follows from."""
    kind, run = shard.task.kind, shard.run
    method: Any = run.method
    read: Any = []
    if kind == "targets":
        read = [method.delta_at, method.position, to_plain(target_files.strengths(run.hparams))]
    elif kind in ("steps", "edit"):
        read = [to_plain(method), to_plain(run.hparams)]
    elif kind == "ability":
        read = [method is None]
    return f"{kind} {hash_of(read)}"


def _work(shard: Shard) -> float:
    counted = shard.operations > 0  # not where it is missing (NaN) either
    return float(shard.operations if counted else shard.units)
