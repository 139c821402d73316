"""Who does what next: the shards of a grid, handed to workers as soon as they can be made.

Knows nothing of models: a `Pool` takes chunks of tasks and gives their outcomes back.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from pmet_lens.experiments.grid import GridError
from pmet_lens.experiments.store import Folder, FolderError
from pmet_lens.experiments.tasks import OWN, Task
from pmet_lens.experiments.worker import Outcome, Worker, WorkerInfo

LIVES = 3
"""How many workers may die while they work on one shard."""
POLL = 0.2
"""Seconds between two looks at what another process works on."""
OnTask = Callable[[Task, Outcome], object]


@runtime_checkable
class Pool(Protocol):
    """Workers, all with the same model."""

    def info(self) -> WorkerInfo:
        """What every worker reports of itself."""
        ...

    def free(self) -> int:
        """How many chunks can be handed out now."""
        ...

    def size(self, task: Task, left: int) -> int:
        """How many tasks like this one a chunk should have, when `left` are left."""
        ...

    def give(self, chunk: Sequence[Task]) -> None:
        """Hand out a chunk."""
        ...

    def collect(self) -> list[tuple[Task, Outcome | None]]:
        """Wait until something is done; None is the outcome where the worker died."""
        ...


class Serial:
    """One worker, in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self._chunk = worker, deque[Task]()

    def info(self) -> WorkerInfo:
        return self.worker.describe()

    def free(self) -> int:
        return 0 if self._chunk else 1

    def size(self, task: Task, left: int) -> int:
        return 1

    def give(self, chunk: Sequence[Task]) -> None:
        self._chunk.extend(chunk)

    def collect(self) -> list[tuple[Task, Outcome | None]]:
        task = self._chunk.popleft()
        return [(task, self.worker.do(task))]


class Schedule:
    """The tasks of some runs that are still to be done.

    What is there already is checked, all of it, and made again where it is damaged; what only led
    to something that is there is left out.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Task]], folder: Folder) -> None:
        """`tasks`: digest of a run → its shards (`shards.tasks_of`)."""
        self.folder = folder
        self.all: dict[str, Task] = {}
        for task in (task for ts in tasks.values() for task in ts):
            self.all.setdefault(task.file, task)
        self.of = {digest: {t.file for t in ts} for digest, ts in tasks.items()}
        self.there: set[str] = set()
        self.failed: dict[str, str] = {}
        """Digest of a run → why it cannot be finished."""
        self.deaths: Counter[str] = Counter()
        """File → how many workers died while they made it, or others of its chunk."""
        wanted = dict.fromkeys(
            file for ts in tasks.values() for t in ts if t.kind in OWN for file in self._open(t)
        )
        order = {file: i for i, file in enumerate(self.all)}
        self.waiting = deque(sorted(wanted, key=order.__getitem__))

    def _open(self, task: Task) -> list[str]:
        """The files to be made until this one is there."""
        if task.kind == "edit" or task.file in self.there:
            return []  # edits are wanted by what is measured with them
        return self._below(task.file, set())

    def _below(self, file: str, seen: set[str]) -> list[str]:
        if file in seen or self._is_there(file):
            return []
        seen.add(file)
        return [file, *(f for need in self.all[file].needs for f in self._below(need, seen))]

    def _is_there(self, file: str) -> bool:
        if file in self.there:
            return True
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
            GridError: where workers die again and again on one shard.
        """
        running: set[str] = set()
        busy: dict[str, float] = {}
        while self.waiting or running or busy:
            self._wake(busy)
            while pool.free() and (chunk := self._next(pool, running)):
                running.update(task.file for task in chunk)
                pool.give(chunk)
            if not running:
                if not busy and self.waiting:
                    raise AssertionError(f"nothing leads to {list(self.waiting)}")
                time.sleep(POLL)
                continue
            for task, outcome in pool.collect():
                running.discard(task.file)
                if outcome is None:
                    self._record_death(task)
                elif outcome.state == "busy":
                    busy[task.file] = time.monotonic() + POLL
                elif outcome.state == "stop":
                    raise FolderError(outcome.error)
                elif outcome.state == "failed":
                    self._drop(task, outcome.error)
                    on_task(task, outcome)
                else:
                    self.there.add(task.file)
                    on_task(task, outcome)

    def _wake(self, busy: dict[str, float]) -> None:
        """Tasks another process was at come back after a while."""
        for file in [file for file, at in busy.items() if at <= time.monotonic()]:
            del busy[file]
            self.waiting.appendleft(file)

    def _next(self, pool: Pool, running: set[str]) -> list[Task]:
        """The first tasks whose needs are there, of one kind and one run, as many as suit."""
        ready = [
            task
            for file in self.waiting
            if self.there.issuperset((task := self.all[file]).needs) and file not in running
        ]
        if not ready:
            return []
        first = ready[0]
        alike = [t for t in ready if (t.kind, t.run) == (first.kind, first.run)]
        alone = self.deaths[first.file] > 0  # so that it takes no other along
        chunk = alike[: 1 if alone else pool.size(first, len(alike))]
        taken = {task.file for task in chunk}
        self.waiting = deque(file for file in self.waiting if file not in taken)
        return chunk

    def _record_death(self, task: Task) -> None:
        self.deaths[task.file] += 1
        if (deaths := self.deaths[task.file]) >= LIVES:
            raise GridError(
                f"Workers died {deaths} times while making {task.file}, a shard of kind "
                f"{task.kind!r}. Most often the machine ran out of memory: take fewer workers on "
                "it, a smaller dtype, or smaller shards (Cut), and start again; what was finished "
                "is kept."
            )
        self.waiting.appendleft(task.file)

    def _drop(self, task: Task, error: str) -> None:
        """Leave out what cannot be made without this task."""
        gone = {task.file}
        for file, other in self.all.items():  # in an order in which they can be made
            if gone & {*other.needs}:
                gone.add(file)
        for digest, files in self.of.items():
            if gone & files:
                self.failed.setdefault(digest, error)
        lost = {f for d in self.failed for f in self.of[d]}
        kept = {f for d, files in self.of.items() if d not in self.failed for f in files}
        self.waiting = deque(f for f in self.waiting if f not in lost - kept)

    def complete(self, digest: str) -> bool:
        """Whether everything is there that was measured of a run."""
        ts = (self.all[file] for file in self.of[digest])
        return all(t.file in self.there for t in ts if t.kind in OWN and t.kind != "edit")
