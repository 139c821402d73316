"""What a grid would cost, told before it runs: memory, operations, bytes on disk, and time.

Operations and bytes are counted, shard by shard, what runs share once. Time comes from a short
probe on the machine that asks, or from rates that somebody gives; how the shards are dealt out to
workers is played through, because some wait for others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from pmet_lens import costs, probing, shards
from pmet_lens.adapter import Model, load
from pmet_lens.costs import Sizes, scaled
from pmet_lens.grid import GridError, Run, check_grid
from pmet_lens.workload import Count, Shard

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
            told = [row["kind"], row["shards"], units, counted, size, clock(row["seconds"])]
            rows.append([str(cell).strip() for cell in told])
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
    grid: Sequence[Run],
    *,
    workers: int = 1,
    device: str | None = None,
    device_map: Any = None,
    rates: Rates | None = None,
    stand_in: tuple[Model, Sizes] | None = None,
) -> Plan:
    """What `run` of this grid would cost if nothing of it were there.

    Args:
        workers: how many share the work, each on a machine like this one.
        device, device_map: as `run` takes them.
        rates: seconds of a shard from its kind and operations, instead of a probe: nothing is
            measured then. A probe reads the models, optimises, edits and asks a few facts per
            method, and reads a few thousand tokens: about a minute on the bundled models.
        stand_in: a small model of the same family and depth, and the sizes of the model that is
            meant, which then need not be here. Only with `rates`.

    Raises:
        GridError: as `run` does for the grid; for `stand_in` without rates.
    """
    runs = check_grid(grid)
    if stand_in is not None and rates is None:
        raise GridError("A model that is not here cannot be probed: give rates with stand_in.")
    if workers < 1:
        raise GridError(f"workers must be at least 1, not {workers}.")
    counted: list[Shard] = []
    memory, start = 0, 0.0
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.model, run.dtype, run.template), []).append(run)
    for (name, dtype, template), group in groups.items():
        clock = probing.Clock()
        if stand_in is None:
            model = load(name, device=device, dtype=dtype, device_map=device_map, template=template)
            sizes = costs.sizes_of(model)
        else:
            model, sizes = stand_in
        start += clock.seconds()
        count = Count(model, sizes)
        for own in shards.tasks_of(group, f"plan of {name} {dtype}").values():
            counted += [count.shard(task, group) for task in own]
        memory = max(memory, count.memory)
        if rates is None:
            probe = probing.Probe(model)
            seconds = {
                s.task.file: probe.seconds(s.task, s.run) for s in counted if s.model is model
            }
        else:
            seconds = {s.task.file: rates(s.task.kind, s.operations, s.exact) for s in counted}
        for shard in counted:
            shard.seconds = seconds.get(shard.task.file, shard.seconds)
    distinct = {shard.task.file: shard for shard in counted}.values()
    return _told(list(distinct), runs, workers, memory, start)


def _told(
    found: Sequence[Shard], runs: Sequence[Run], workers: int, memory: int, start: float
) -> Plan:
    rows: dict[str, list[Any]] = {}
    for shard in found:
        own = rows.setdefault(shard.task.kind, [0, 0.0, 0.0, 0, 0.0])
        own[0] += 1
        numbers = (shard.units, shard.operations, shard.kept, shard.seconds)
        for i, value in enumerate(numbers, start=1):
            own[i] += value
    columns = ["shards", "units", "operations", "bytes", "seconds"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table = table.rename_axis("kind").reset_index()
    table.insert(3, "unit", table["kind"].map(UNITS))
    kept = sum(shard.kept for shard in found)
    return Plan(
        table=table,
        runs=len(runs),
        memory=memory,
        disk=kept,
        disk_most=kept + sum(shard.passing for shard in found),
        workers=workers,
        start=start,
        tasks={s.task.file: (s.seconds, s.task.needs) for s in found},
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
