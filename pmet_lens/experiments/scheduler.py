"""Who makes what next: the tasks of a grid, handed out as soon as what they need is there, and how
far they are, as bars and a table.

Knows nothing of models: a `Pool` takes a task and gives its outcome back.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from pmet_lens.experiments.grid import Run
from pmet_lens.experiments.store import Folder, FolderError
from pmet_lens.experiments.tasks import OWN, Task
from pmet_lens.experiments.worker import Outcome, Worker, WorkerInfo

POLL = 0.2
"""Seconds between two looks at what another process works on."""
MOST_BARS = 8
"""Runs that have a bar at a time; the bar of the grid counts the others."""
OnTask = Callable[[Task, Outcome], object]


@runtime_checkable
class Pool(Protocol):
    """Workers, all with the same model."""

    def info(self) -> WorkerInfo:
        """What every worker reports of itself."""
        ...

    def free(self) -> bool:
        """Whether a worker has nothing to do."""
        ...

    def submit(self, task: Task) -> Any:
        """Give a task to a free worker; returns a handle of its outcome."""
        ...

    def wait(self, handles: Sequence[Any]) -> tuple[Any, Outcome]:
        """The first of these that is done, and its outcome."""
        ...


class Serial:
    """One worker, in this process: what is submitted is done when its outcome is asked for."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self._tasks = worker, list[Task]()

    def info(self) -> WorkerInfo:
        return self.worker.describe()

    def free(self) -> bool:
        return not self._tasks

    def submit(self, task: Task) -> Task:
        self._tasks.append(task)
        return task

    def wait(self, handles: Sequence[Task]) -> tuple[Task, Outcome]:
        return handles[0], self.worker.do(self._tasks.pop())


class Schedule:
    """The tasks of some runs that are still to be done.

    What is there already is checked, all of it, and made again where it is damaged; what only led
    to something that is there is left out.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Task]], folder: Folder) -> None:
        """`tasks`: digest of a run → its tasks (`tasks.tasks_of`)."""
        self.folder = folder
        self.all: dict[str, Task] = {}
        for task in (task for ts in tasks.values() for task in ts):
            self.all.setdefault(task.file, task)
        self.of = {digest: {t.file for t in ts} for digest, ts in tasks.items()}
        self.there: set[str] = set()
        self.failed: dict[str, str] = {}
        """Digest of a run → why it cannot be finished."""
        self.waiting = self._missing()

    def _missing(self) -> dict[str, Task]:
        """What has to be made, in an order in which it can be. An edit is made where something is
        measured with it."""
        wanted = {f for f, task in self.all.items() if task.kind in OWN and task.kind != "edit"}
        missing: dict[str, Task] = {}
        for file, task in reversed(self.all.items()):
            if file in wanted and not self._is_there(file):
                missing[file] = task
                wanted.update(task.needs)
        return dict(reversed(missing.items()))

    def _is_there(self, file: str) -> bool:
        if self.folder.present(file):
            if self.folder.intact(file):
                self.there.add(file)
                return True
            with self.folder.claimed(file) as mine:
                if mine:
                    self.folder.remove(file)
            warnings.warn(f"{self.folder.path(file)} is damaged; making it again.", stacklevel=2)
        return False

    def run(self, pool: Pool, on_task: OnTask) -> None:
        """Work until nothing is left. `on_task(task, outcome)` is called after every task.

        Raises:
            FolderError: where no file can be written any more.
            GridError: where workers die again and again on one task.
        """
        running: dict[Any, Task] = {}
        busy: set[str] = set()  # another process works on these
        while self.waiting or running:
            while pool.free() and (task := self._ready(busy)) is not None:
                running[pool.submit(task)] = self.waiting.pop(task.file)
            if not running:
                if not busy:
                    raise AssertionError(f"nothing leads to {list(self.waiting)}")
                time.sleep(POLL)
                busy.clear()
                continue
            handle, outcome = pool.wait(list(running))
            task = running.pop(handle)
            if outcome.state == "stop":
                raise FolderError(outcome.error)
            if outcome.state == "busy":
                busy.add(task.file)
                self.waiting = {task.file: task, **self.waiting}
                continue
            busy.clear()
            if outcome.state == "failed":
                self._leave_out(task, outcome.error)
            else:
                self.there.add(task.file)
            on_task(task, outcome)

    def _ready(self, busy: set[str]) -> Task | None:
        """The first task whose needs are there."""
        waiting = (task for file, task in self.waiting.items() if file not in busy)
        return next((task for task in waiting if self.there.issuperset(task.needs)), None)

    def _leave_out(self, task: Task, error: str) -> None:
        """Leave out the runs that cannot be finished without this task."""
        lost = {task.file}
        for file, other in self.all.items():  # in an order in which they can be made
            if lost.intersection(other.needs):
                lost.add(file)
        for digest, files in self.of.items():
            if lost & files:
                self.failed.setdefault(digest, error)
        kept = {f for digest, files in self.of.items() if digest not in self.failed for f in files}
        self.waiting = {file: task for file, task in self.waiting.items() if file in kept}

    def complete(self, digest: str) -> bool:
        """Whether everything is there that was measured of a run."""
        ts = (self.all[file] for file in self.of[digest])
        return all(t.file in self.there for t in ts if t.kind in OWN and t.kind != "edit")


class Progress:
    """Bars in a notebook or a terminal, and rows as they come. `show` False: nothing."""

    def __init__(self, runs: Sequence[Run], show: bool) -> None:
        from tqdm.auto import tqdm

        self._tqdm, self._show = tqdm, show
        self._bars: dict[str, Any] = {}
        self._left: dict[str, int] = {}
        self._names = {run.digest: run.name for run in runs}
        self._rows: list[pd.DataFrame] = []
        self._table = _table() if show else None
        self._grid = tqdm(
            total=len(runs), desc="grid", unit="run", disable=not show, dynamic_ncols=True
        )

    def begin(self, left: Mapping[str, int]) -> None:
        """`left`: digest of a run → how many shards are to be made for it, those that others share
        counted for the first of them."""
        self._left = dict(left)

    def task(self, task: Task) -> None:
        """A shard is done."""
        bar = self._bars.get(task.run)
        if bar is None and len(self._bars) < MOST_BARS and task.run in self._left:
            bar = self._bars[task.run] = self._tqdm(
                total=self._left[task.run],
                desc=self._names[task.run],
                unit="shard",
                leave=False,
                disable=not self._show,
                dynamic_ncols=True,
            )
        if bar is not None:
            bar.set_postfix_str(task.kind, refresh=False)
            bar.update()

    def finished(self, digest: str, rows: pd.DataFrame | None) -> None:
        """A run is over; `rows`: what it says in the table, None where it failed."""
        bar = self._bars.pop(digest, None)
        if bar is not None:
            bar.close()
        if rows is not None and self._table is not None:
            self._rows.append(rows)
            self._table(pd.concat(self._rows, ignore_index=True))
        self._grid.update()

    def close(self) -> None:
        """Leave the bar of the grid, and no other."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()
        self._grid.close()


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per run, one column per metric."""
    order = list(dict.fromkeys(rows["metric"]))
    keys = ["run", "model", "edits", "digest"]  # two runs may have one name
    table = rows.pivot_table(index=keys, columns="metric", values="mean", sort=False)
    table = table[order].round(1).reset_index().rename_axis(columns=None)
    return table.drop(columns="digest")


def _table() -> Callable[[pd.DataFrame], object]:
    """Where a table goes that grows: a cell's output, or lines above the bars of a terminal."""
    from tqdm.auto import tqdm

    if _in_notebook():
        display = importlib.import_module("IPython.display")
        handle = display.display(display_id=True)
        return lambda rows: handle.update(wide(rows))
    head: list[str] = []

    def say(rows: pd.DataFrame) -> None:
        lines = wide(rows).to_string(index=False).splitlines()
        if lines[0] != "".join(head):
            head[:] = [lines[0]]
            tqdm.write(lines[0])
        tqdm.write(lines[-1])

    return say


def _in_notebook() -> bool:
    try:
        shell = importlib.import_module("IPython").get_ipython()
    except ModuleNotFoundError:
        return False
    return shell is not None and hasattr(shell, "kernel")
