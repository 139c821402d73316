"""What a grid would cost, before it runs: memory, operations, bytes on disk, and time.

Operations and bytes are counted, shard by shard, what runs share once. Time comes from a short
probe on the machine that asks, or from rates that somebody gives; how the shards are dealt out to
workers is played through, because some wait for others.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pmet_lens.experiments import ray_cluster, ray_engine
from pmet_lens.experiments.grid import ENGINES, GridError, Run, by_model, check_grid
from pmet_lens.experiments.tasks import tasks_of
from pmet_lens.models.loading import load
from pmet_lens.models.model import Model
from pmet_lens.plans import costs, probing
from pmet_lens.plans.costs import Sizes, scaled
from pmet_lens.plans.workload import Count, Shard

UNITS = {
    "contexts": "set", "part": "token", "moments": "site", "targets": "fact", "steps": "fact",
    "edit": "fact", "answers": "fact", "generation": "fact", "others": "fact",
    "ability": "measurement",
}  # fmt: skip
"""What the work of a kind of shard is counted in."""
Rates = Callable[[str, float, float], float]
"""(kind of shard, its operations, those of them in float64) → seconds."""


@dataclass(frozen=True)
class Plan:
    """What a grid costs. `print` it, or look at `table`."""

    table: pd.DataFrame = field(repr=False)
    """One row per kind of shard: kind, shards, units (and of what), operations (FLOP; missing where
    nobody counts them), bytes (on disk, at the end), seconds (of one worker)."""
    runs: int
    memory: int
    """Bytes a worker needs for the model and the largest of what it does (a guess upward)."""
    disk: int
    """Bytes that results and what they share take in the end."""
    disk_most: int
    """Bytes while it runs: edits, answers and the parts of moments are removed later."""
    workers: int
    start: float
    """Seconds until a worker has read its model."""
    tasks: Mapping[str, tuple[float, tuple[str, ...]]] = field(repr=False)
    """File → seconds, and what it needs."""

    @property
    def operations(self) -> float:
        """Of all shards."""
        return float(self.table["operations"].sum())

    def seconds(self, workers: int | None = None) -> float:
        """From the start to the last result with so many workers (None: those of the plan)."""
        return self.start + played(self.tasks, workers or self.workers)

    def __str__(self) -> str:
        rows = []
        for row in self.table.to_dict("records"):
            counted = "" if pd.isna(row["operations"]) else scaled(float(row["operations"]))
            size, units = scaled(int(row["bytes"])), f"{row['units']:,.0f} {row['unit']}"
            cells = [row["kind"], row["shards"], units, counted, size, clock(row["seconds"])]
            rows.append([str(cell).strip() for cell in cells])
        head = ["shards of", "number", "work", "operations", "on disk", "one worker"]
        lines = [head, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in lines]
        many = "worker" if self.workers == 1 else "workers"
        return "\n".join(
            [
                *(line.rstrip() for line in text),
                f"{self.runs} runs, {self.workers} {many}: about {clock(self.seconds())}, of which "
                f"{clock(self.start)} to start; {scaled(self.operations).strip()}",
                f"memory per worker {scaled(self.memory).strip()}; on disk "
                f"{scaled(self.disk).strip()}, at most {scaled(self.disk_most).strip()}",
            ]
        )


def plan(
    grid: Run | Sequence[Run],
    *,
    workers: int | None = None,
    engine: str = "serial",
    address: str | None = None,
    device: str | None = None,
    device_map: Any = None,
    rates: Rates | None = None,
    stand_in: tuple[Model, Sizes] | None = None,
) -> Plan:
    """What `run` of this grid would cost if nothing of it were there.

    Args:
        workers: how many share the work; None: 1 ("ray": as many as `run` would take).
        engine: "serial": the probe runs in this process, and other workers are taken to be as
            fast. "ray": the workers are started and probe at the same time, so that the time to
            start, and what they are in each other's way, is in the estimate.
        address, device, device_map: as `run` takes them.
        rates: seconds of a shard from its kind and operations, instead of a probe: nothing is
            measured then. A probe reads the models, optimises, edits and asks a few facts per
            method, and reads a few thousand tokens: about a minute on the bundled models.
        stand_in: a small model of the same family and depth, and the sizes of the model that is
            meant, which then need not be here. Only with `rates`.

    Raises:
        GridError: as `run` does for the grid and the engine; for `stand_in` without rates, and for
            rates with "ray", which would not be asked.
    """
    runs = check_grid(grid)
    if engine not in ENGINES:
        raise GridError(f"There is no engine {engine!r}; choose from {', '.join(ENGINES)}.")
    if rates is not None and engine == "ray":
        raise GridError('engine="ray" lets the workers probe; leave it out to give rates.')
    if stand_in is not None and rates is None:
        raise GridError("A model that is not here cannot be probed: give rates with stand_in.")
    if workers is not None and workers < 1:
        raise GridError(f"workers must be at least 1, not {workers}.")
    where = {"device": device, "device_map": device_map}
    counted: list[Shard] = []
    memory, start, began = 0, 0.0, time.perf_counter()
    with ExitStack() as stack:
        ray = None
        if engine == "ray":
            ray_cluster.check_installed()
            ray = stack.enter_context(ray_cluster.cluster(address))
            start = time.perf_counter() - began
        for (name, dtype, template), group in by_model(runs).items():
            began = time.perf_counter()
            if stand_in is None:
                here = where if ray is None else {}  # the workers have other devices
                model = load(name, dtype=dtype, template=template, **here)
                sizes = costs.sizes_of(model)
            else:
                model, sizes = stand_in
            read = time.perf_counter() - began
            count, shards = Count(model, sizes), list[Shard]()
            for tasks in tasks_of(group, f"plan of {name} {dtype}").values():
                shards += [count.shard(task, group) for task in tasks]
            memory = max(memory, count.memory)
            if rates is not None:
                seconds = [rates(s.task.kind, s.operations, s.exact) for s in shards]
            elif ray is None:
                seconds = probing.seconds_of(model, shards)
            else:
                seconds, read, workers = _asked(ray, shards, group, workers, where)
            for shard, took in zip(shards, seconds, strict=True):
                shard.seconds = took
            start += read
            counted += shards
        began = time.perf_counter()
    start += time.perf_counter() - began  # to take Ray down again
    distinct = {shard.task.file: shard for shard in counted}.values()
    return _plan(list(distinct), runs, workers or 1, memory, start)


def _asked(
    ray: Any,
    shards: Sequence[Shard],
    group: Sequence[Run],
    workers: int | None,
    where: Mapping[str, Any],
) -> tuple[list[float], float, int]:
    """The mean of what the workers of one model measure, the seconds until they have read it, and
    how many there are."""
    runs, began = {run.digest: run for run in group}, time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_engine.actors(ray, folder, runs, workers, where) as pool,
    ):
        read = time.perf_counter() - began
        measured = pool.ask_all(probing.seconds_on, shards)
    return [sum(times) / len(times) for times in zip(*measured, strict=True)], read, len(pool.all)


def _plan(
    shards: Sequence[Shard], runs: Sequence[Run], workers: int, memory: int, start: float
) -> Plan:
    rows: dict[str, list[Any]] = {}
    for shard in shards:
        sums = rows.setdefault(shard.task.kind, [0, 0.0, 0.0, 0, 0.0])
        sums[0] += 1
        numbers = (shard.units, shard.operations, shard.kept, shard.seconds)
        for i, value in enumerate(numbers, start=1):
            sums[i] += value
    columns = ["shards", "units", "operations", "bytes", "seconds"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table = table.rename_axis("kind").reset_index()
    table.insert(3, "unit", table["kind"].map(UNITS))
    kept = sum(shard.kept for shard in shards)
    return Plan(
        table=table,
        runs=len(runs),
        memory=memory,
        disk=kept,
        disk_most=kept + sum(shard.passing for shard in shards),
        workers=workers,
        start=start,
        tasks={s.task.file: (s.seconds, s.task.needs) for s in shards},
    )


def played(tasks: Mapping[str, tuple[float, tuple[str, ...]]], workers: int) -> float:
    """Seconds until all tasks are done; a free worker takes the first whose needs are there."""
    waiting, there, now = list(tasks), set[str](), 0.0
    running: list[tuple[float, str]] = []
    while waiting or running:
        for file in list(waiting):
            if len(running) == workers:
                break
            if there.issuperset(tasks[file][1]):
                waiting.remove(file)
                heapq.heappush(running, (now + tasks[file][0], file))
        now, file = heapq.heappop(running)
        there.add(file)
    return now


def clock(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
