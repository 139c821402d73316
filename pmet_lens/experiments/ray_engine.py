"""`engine="ray"`: workers as Ray actors, on this machine or on a cluster; the caller is the driver.

Every actor is a `worker.Worker`. It gets the runs once and its weights once, and talks to the
driver in names of shards: weights, moments and targets never travel with a task. All that lasts
lies in the folder, so that a worker may die at any time. Who dies is Ray's business: it starts the
worker again and gives it its task again. Which task comes next is decided here (`scheduler.py`) and
not by references between Ray's objects, because those bind a task to a worker before it can start.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmet_lens.experiments import ray_cluster, store
from pmet_lens.experiments.grid import GridError, Run
from pmet_lens.experiments.remote_worker import RemoteWorker, check_versions, check_weights
from pmet_lens.experiments.tasks import Task
from pmet_lens.experiments.worker import Outcome, WorkerInfo
from pmet_lens.models.loading import ModelError

LIVES = 3
"""How many workers may die while they work on one task."""
START_SECONDS = 900.0
"""How long workers may take to read their model before the cluster counts as full."""
LOOK_SECONDS = 5.0
"""After how long without an outcome it is asked whether the machines are still there."""


@contextmanager
def actors(
    ray: Any,
    folder: str,
    runs: Mapping[str, Run],
    workers: int | None,
    options: Mapping[str, Any],
) -> Iterator[Actors]:
    """Workers for runs of one model, until the end of the block.

    Raises:
        GridError: where they do not start, or have other packages or weights than one another.
        ModelError: where they cannot read their model.
    """
    n, share = shares(ray.cluster_resources(), workers, options)
    lives = {"max_restarts": -1, "max_task_retries": LIVES - 1}
    remote = ray.remote(**lives, **share)(RemoteWorker)
    device = options["device"]
    if device is None and share["num_gpus"] and options["device_map"] is None:
        device = "auto"
    how = {"device": device, "device_map": options["device_map"]}
    where = {"folder": str(Path(folder).resolve()), "home": str(Path.cwd())}
    everything = ray.put(dict(runs))
    made: list[Any] = []

    def start(weights: Any = None) -> Any:
        threads = max(1, math.floor(share["num_cpus"]))
        made.append(remote.remote(everything, where, how, threads, weights))
        return made[-1]

    head = ray_cluster.head_of(ray)
    try:
        first = start()
        info = _answer(ray, [first])[0]
        check_versions(info, store.versions())
        weights = None
        if options["device_map"] is None and n > 1:
            weights = first.packed.remote()  # to every node once; what it holds is never pickled
        others = [start(weights) for _ in range(n - 1)]
        for other in _answer(ray, others):
            check_versions(other, store.versions())
            check_weights(other, info)
        yield Actors(ray, [first, *others], info, share, head)
    finally:
        for one in made if ray_cluster.answers(head) else ():
            ray.kill(one)


def shares(
    have: Mapping[str, float], workers: int | None, options: Mapping[str, Any]
) -> tuple[int, dict[str, float]]:
    """How many workers, and what each takes of the cluster: a GPU, or a share of the CPUs.

    Raises:
        GridError: for fewer than one worker, and for a device map over less than one GPU.
    """
    if workers is not None and workers < 1:
        raise GridError(f"workers must be at least 1, not {workers}.")
    gpus, cpus = have.get("GPU", 0.0), have.get("CPU", 1.0)
    gpus = 0.0 if options["device"] == "cpu" else gpus
    n = workers or int(gpus) or max(1, int(cpus) // 2)
    gpu = gpus / n
    if options["device_map"] is not None and gpus:
        gpu = float(int(gpu))
        if gpu < 1:
            raise GridError(
                f"{n} workers with a device_map need {n} GPUs at least, and the cluster has "
                f"{int(gpus)}: take fewer workers."
            )
    gpu = float(min(gpu, 1.0)) if options["device_map"] is None else gpu
    cpu = cpus / n
    return n, {"num_gpus": gpu, "num_cpus": float(int(cpu)) if cpu >= 1 else cpu}


def _answer(ray: Any, started: Sequence[Any]) -> list[WorkerInfo]:
    """What workers report of themselves, as soon as they have read their model."""
    try:
        answers = ray.get([one.describe.remote() for one in started], timeout=START_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        raise GridError(
            f"The workers did not start within {START_SECONDS:.0f} seconds: the cluster may be "
            "busy with something else. Take fewer workers=, or try again later."
        ) from error
    except ray.exceptions.RayError as error:
        raise GridError(f"A worker could not be started: {error}") from error
    for one in answers:
        if isinstance(one, str):
            raise ModelError(f"A worker could not read its model: {one}")
    return answers


class Actors:
    """A `scheduler.Pool` of actors. Ray starts one again that died, and gives it its task again.
    Where its machine is lost and the others have no room for it, another worker gets the task."""

    def __init__(
        self,
        ray: Any,
        actors: Sequence[Any],
        info: WorkerInfo,
        share: Mapping[str, float],
        head: tuple[str, int] | None,
    ) -> None:
        self._ray, self._info, self._share = ray, info, share
        self._head, self._asked = head, time.monotonic()
        self.all, self._idle = list(actors), list(actors)
        places = ray.get([one.node.remote() for one in actors])
        self._node = dict(zip(actors, places, strict=True))
        self._given: dict[int, Task] = {}
        self._working: dict[Any, tuple[Any, int | None]] = {}
        """Ray's future -> worker and handle of its task; None: it is asked whether it is there."""
        self._left: list[int] = []
        """Of workers that are lost; another has to begin these."""
        self._losses: Counter[int] = Counter()
        self._handles = itertools.count()

    def info(self) -> WorkerInfo:
        return self._info

    def ask_all(self, question: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `question(worker, *arguments)` gives on every worker, asked at the same time."""
        return self._ray.get([one.ask.remote(question, *arguments) for one in self.all])

    def free(self) -> bool:
        return len(self._idle) > len(self._left)

    def submit(self, task: Task) -> int:
        handle = next(self._handles)
        self._given[handle] = task
        self._begin(handle)
        return handle

    def _begin(self, handle: int) -> None:
        actor = self._idle.pop(0)
        self._working[actor.do.remote(self._given[handle])] = actor, handle

    def wait(self, handles: Sequence[int]) -> tuple[int, Outcome]:
        """Of all that were submitted, whatever `handles` are.

        Raises:
            GridError: where a task kills its workers, and where all of them or the head are lost.
        """
        try:
            return self._wait()
        except ConnectionError as error:  # a client of a far cluster
            raise GridError(ray_cluster.lost(str(error))) from error

    def _wait(self) -> tuple[int, Outcome]:
        while True:
            self._ask_head()
            while self._left and self._idle:
                self._begin(self._left.pop())
            ready, _ = self._ray.wait(list(self._working), num_returns=1, timeout=LOOK_SECONDS)
            if not ready:
                self._drop_lost()
                continue
            actor, handle = self._working.pop(ready[0])
            try:
                found = self._ray.get(ready[0])
            except self._ray.exceptions.RayActorError as error:
                self._away(actor, handle, error)
                continue
            self._idle.append(actor)
            if handle is None:
                self._node[actor] = found
                continue
            outcome, self._node[actor] = found
            del self._given[handle]
            return handle, outcome

    def _away(self, actor: Any, handle: int | None, error: Exception) -> None:
        """A worker does not answer. Its task is for another; it is asked again, until its machine
        is known to be lost.

        Raises:
            GridError: where the task may be why.
        """
        if handle is not None:
            self._left.append(handle)
            self._losses[handle] += 1
            gone = isinstance(error, self._ray.exceptions.ActorUnavailableError)
            if not gone or self._losses[handle] == LIVES:
                task = self._given[handle]
                raise GridError(
                    f"Workers died {LIVES} times while making {task.file}, a task of kind "
                    f"{task.kind!r}. Most often the machine ran out of memory: take fewer workers "
                    "on it, a smaller dtype, or smaller shards (Cut), and start again; what was "
                    "finished is kept."
                ) from error
        else:
            time.sleep(ray_cluster.ASK_SECONDS)
        self._working[actor.node.remote()] = actor, None
        self._drop_lost()

    def _ask_head(self, now: bool = False) -> None:
        """Without its head, Ray ends this process after a minute, without an exception: it is asked
        for now and then, and before Ray is asked for its machines (`now`)."""
        if not now and time.monotonic() - self._asked < LOOK_SECONDS:
            return
        if not ray_cluster.answers(self._head):
            raise GridError(ray_cluster.lost("{}:{}".format(*self._head or ("?", "?"))))
        self._asked = time.monotonic()

    def _drop_lost(self) -> None:
        """Workers of machines that are gone, where no other has room to start them again. Raises
        `GridError` where none is left."""
        self._ask_head(now=True)
        here = [node for node in self._ray.nodes() if node["Alive"]]
        lost = [one for one in self.all if self._node[one] not in {n["NodeID"] for n in here}]
        needs = {"CPU": self._share["num_cpus"], "GPU": self._share["num_gpus"]}
        room = sum(
            min(int(node["Resources"].get(kind, 0) / n + 1e-6) for kind, n in needs.items() if n)
            for node in here
        )
        for one in lost[: max(0, len(self.all) - room)]:
            self._ray.kill(one)
            self.all.remove(one)
            self._idle = [other for other in self._idle if other is not one]
            for future, (actor, handle) in list(self._working.items()):
                if actor is one:
                    del self._working[future]
                    self._left += [] if handle is None else [handle]
        if not self.all:
            raise GridError(
                "The machines of all workers are lost. Start again when the cluster has some; "
                "what was finished is kept."
            )
