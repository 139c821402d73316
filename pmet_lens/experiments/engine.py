"""`run`: a grid from runs to a table. What is there is skipped, what was cut is gone on with.

Everything lies in one folder, in shards that follow from the runs alone (`tasks.py`), each whole
or not there. So the result does not depend on the engine, on how many workers there were, or on how
often the work was cut. Two drivers on one folder share the work.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.data import file_format
from pmet_lens.experiments import ray_cluster, ray_engine, store
from pmet_lens.experiments.grid import ENGINES, GridError, Run, by_model, check_grid, share_of
from pmet_lens.experiments.scheduler import Pool, Progress, Schedule, Serial
from pmet_lens.experiments.store import Folder
from pmet_lens.experiments.tasks import OWN, Task, tasks_of
from pmet_lens.experiments.worker import Outcome, Worker, WorkerInfo
from pmet_lens.models import loading
from pmet_lens.models.loading import ModelError


def run(
    grid: Run | Sequence[Run],
    folder: str | Path = "runs",
    engine: str = "serial",
    *,
    shard: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
    device_map: Any = None,
    keep_edits: bool = False,
    strict: bool = True,
    progress: bool = True,
    on_run: Callable[[Run, pd.DataFrame], object] | None = None,
) -> pd.DataFrame:
    """Make the results of all runs that are not in `folder` yet, and read those that are.

    Returns a tidy table, in the order of the grid: run, model, edits, metric, mean, ci_low, ci_high
    (95 % bootstrap over facts), n, digest. `rows_of(run, folder)` has every single prompt.

    Args:
        folder: shared by all workers (on a cluster: a disk that every node mounts). One parquet
            file and one JSON manifest per run; shards lie beside them.
        engine: "serial": in this process. "ray": one actor per GPU, or per share of the CPUs.
        shard: "k/n": runs k, k + n, … alone, for batch queues. What several shards need is made
            once, by whoever comes first.
        workers: for "ray"; None: one per GPU of the cluster, without one as many as CPUs / 2.
        address: of a running Ray cluster ("auto", "ray://…"); None: this machine.
        device: of the model, as `load` takes it; None: the CPU ("ray": the actor's GPU).
        device_map: for models larger than one GPU, as `load` takes it ("ray": every actor then
            gets as many GPUs as there are, divided by `workers`).
        keep_edits: keep the edit of every run (`edits/DIGEST-….safetensors`, for `Edit.load`).
        strict: False: a run that fails is missing in the table, with a warning that says why.
        on_run: called with every run and its rows as soon as it is finished.

    Raises:
        GridError: for a grid with a run twice, an unknown engine or shard, an engine that is not
            installed, a cluster that does not answer, workers with other packages or weights,
            results of other weights; and, when all other runs are finished, for runs that failed
            (`strict`), those of a model that cannot be read among them.
        FolderError: where the folder cannot be written (any more).
    """
    if engine not in ENGINES:
        raise GridError(f"There is no engine {engine!r}; choose from {', '.join(ENGINES)}.")
    if engine == "serial" and not (workers in (None, 1) and address is None):
        raise GridError('workers= and address= are for engine="ray"; "serial" is one process.')
    whole = check_grid(grid)
    mine = share_of(whole, shard)
    if engine == "ray":
        ray_cluster.check_installed()
    store_folder = Folder(Path(folder))
    store_folder.begin()
    bars = Progress(mine, progress)
    session = _Session(store_folder, bars, engine, keep_edits, on_run)
    try:
        with ExitStack() as stack:
            cluster = None
            for group in by_model(whole).values():
                wanted = [r for r in group if r.digest in {m.digest for m in mine}]
                todo = session.read(wanted)
                if not todo:
                    continue
                if engine == "ray" and cluster is None:
                    cluster = stack.enter_context(ray_cluster.cluster(address))
                options = {"device": device, "device_map": device_map}
                try:
                    with _pool(store_folder, todo, workers, cluster, options) as pool:
                        session.make(group, todo, pool)
                except ModelError as error:
                    session.leave_out(todo, error)
    finally:
        bars.close()
    return session.table(mine, strict)


@contextmanager
def _pool(
    folder: Folder,
    todo: Sequence[Run],
    workers: int | None,
    cluster: Any,
    options: Mapping[str, Any],
) -> Iterator[Pool]:
    """Workers for runs of one model."""
    runs = {run.digest: run for run in todo}
    if cluster is not None:
        with ray_engine.actors(cluster, str(folder.root), runs, workers, options) as pool:
            yield pool
        return
    worker = Worker(str(folder.root), runs, **options)
    try:
        yield Serial(worker)
    finally:
        worker.leave()


class _Session:
    """One call of `run`: what is finished, and what failed."""

    def __init__(
        self,
        folder: Folder,
        bars: Progress,
        engine: str,
        keep_edits: bool,
        on_run: Callable[[Run, pd.DataFrame], object] | None,
    ) -> None:
        self.folder, self.bars, self.engine = folder, bars, engine
        self.keep_edits, self.on_run = keep_edits, on_run
        self.tables: dict[str, pd.DataFrame] = {}
        self.failed: dict[str, str] = {}
        """Digest of a run → why it could not be finished."""
        self._sources: dict[str, str] = {}

    def read(self, runs: Sequence[Run]) -> list[Run]:
        """Read what is finished; returns the rest."""
        rest = []
        for run in runs:
            file = store.result_file(run.digest)
            if not self.folder.present(file):
                rest.append(run)
            elif not self.folder.intact(file):
                path = self.folder.path(file)
                warnings.warn(f"{path} is damaged; making it again.", stacklevel=3)
                self.folder.remove(file)
                rest.append(run)
            else:
                self._take(run)
        return rest

    def make(self, grid: Sequence[Run], todo: Sequence[Run], pool: Pool) -> None:
        """Make the results of runs of one model; `grid`: all of that model."""
        info, began = pool.info(), datetime.now(timezone.utc)
        for run in grid:
            if self.folder.finished(run):
                self._check_weights(run, info)
        every = tasks_of(grid, info.weights)
        tasks = {run.digest: every[run.digest] for run in todo}
        schedule = Schedule(tasks, self.folder)
        self.bars.begin(Counter(schedule.all[file].run for file in schedule.waiting))
        seconds: dict[str, dict[str, float]] = {run.digest: {} for run in todo}
        left = {run.digest: run for run in todo}
        clock = time.perf_counter()

        def close(digest: str) -> None:
            run = left.pop(digest)
            spent = {k: round(v, 3) for k, v in seconds[digest].items()}
            spent["wall"] = round(time.perf_counter() - clock, 3)
            ran = {"engine": self.engine, "began": began.isoformat(timespec="seconds")}
            self._finish(run, tasks[digest], info, {**ran, "seconds": spent})

        def on_task(task: Task, outcome: Outcome) -> None:
            spent = seconds[task.run]
            spent[task.kind] = spent.get(task.kind, 0.0) + outcome.seconds
            self.bars.task(task)
            for digest in [d for d in schedule.failed if d in left]:
                del left[digest]
                self.failed[digest] = schedule.failed[digest]
                self.bars.finished(digest, None)
            if task.run in left and schedule.complete(task.run):
                close(task.run)

        for digest in [d for d in left if schedule.complete(d)]:
            close(digest)  # it was cut between its last shard and its result
        schedule.run(pool, on_task)
        self._tidy(every, grid)

    def leave_out(self, runs: Sequence[Run], error: ModelError) -> None:
        """Go on without the runs of a model that cannot be read."""
        for run in runs:
            self.failed[run.digest] = str(error)
            self.bars.finished(run.digest, None)

    def table(self, runs: Sequence[Run], strict: bool) -> pd.DataFrame:
        """The rows of all runs; raises `GridError` for those that failed, or warns of them."""
        if self.failed:
            failed = [run for run in runs if run.digest in self.failed]
            reasons = "; ".join(f"{run.name}: {self.failed[run.digest]}" for run in failed)
            text = (
                f"{len(failed)} of {len(runs)} runs could not be finished. {reasons} All others "
                f"are in {self.folder.root}; what is right is not made again."
            )
            if strict:
                raise GridError(text)
            warnings.warn(text, stacklevel=3)
        tables = [self.tables[run.digest] for run in runs if run.digest in self.tables]
        return pd.concat(tables or [pd.DataFrame(columns=store.COLUMNS)], ignore_index=True)

    def _finish(
        self, run: Run, tasks: Sequence[Task], info: WorkerInfo, ran: Mapping[str, Any]
    ) -> None:
        """Put the shards of a run together, unless another driver has."""
        file = store.result_file(run.digest)
        while not self.folder.finished(run):
            with self.folder.claimed(file) as mine:
                if not mine:
                    time.sleep(0.1)
                    continue
                if not self.folder.finished(run):
                    parts: dict[str, list[pd.DataFrame]] = {}
                    for task in tasks:
                        if task.file.endswith(".parquet"):
                            table = self.folder.read_table(task.file)
                            parts.setdefault(task.kind, []).append(table)
                    whole = {k: pd.concat(v, ignore_index=True) for k, v in parts.items()}
                    made = {"weights": info.weights, "source": self._source(run.model)}
                    made |= {"versions": dict(info.versions), "hardware": dict(info.hardware)}
                    store.write_result(self.folder, run, whole, {**made, **ran})
        for task in tasks:
            if task.kind in OWN and not (task.kind == "edit" and self.keep_edits):
                self.folder.remove(task.file)
        self._remove_empty(tasks)
        self._take(run)

    def _take(self, run: Run) -> None:
        """Read one result."""
        manifest = store.read_manifest(self.folder, run)
        now = self._source(run.model)
        if now and manifest["source"] and now != manifest["source"]:
            raise self._other(run)
        rows = self.tables[run.digest] = store.summary_of(manifest, run)
        self.bars.finished(run.digest, rows)
        if self.on_run is not None:
            self.on_run(run, rows)

    def _check_weights(self, run: Run, info: WorkerInfo) -> None:
        if store.read_manifest(self.folder, run)["weights"] != info.weights:
            raise self._other(run)

    def _other(self, run: Run) -> GridError:
        path = self.folder.path(store.result_file(run.digest))
        return GridError(
            f"{path} was made with other weights than {run.model!r} has now. Name another folder, "
            "or remove this result and its manifest."
        )

    def _source(self, model: str) -> str:
        """A hash of the files of a model in a directory; empty for a hub id, and for a directory
        that this machine does not have."""
        if model not in self._sources:
            bundled = Path(loading.__file__).parents[1] / "bundled" / model
            path = bundled if model in loading.BUNDLED else Path(model)
            self._sources[model] = _files_digest(path) if path.is_dir() else ""
        return self._sources[model]

    def _remove_empty(self, tasks: Sequence[Task]) -> None:
        """Remove the run's folder of answers; the one of edits, where others write, stays."""
        measured = [task for task in tasks if task.kind in OWN and task.kind != "edit"]
        for folder in {self.folder.path(task.file).parent for task in measured}:
            with suppress(OSError):  # it is not empty
                folder.rmdir()

    def _tidy(self, every: Mapping[str, Sequence[Task]], grid: Sequence[Run]) -> None:
        """Remove the parts of second moments that were put together."""
        tasks = [task for run in grid for task in every[run.digest]]
        for task in tasks:
            folder = Path(task.file).parent
            files = [str(folder / f"{site}.safetensors") for site in task.sites]
            if task.kind == "part" and all(map(self.folder.present, files)):
                self.folder.remove(task.file)
                self.folder.path(f"{task.file}.lock").unlink(missing_ok=True)


def _files_digest(folder: Path) -> str:
    names = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
    paths = sorted(path for name in names for path in folder.glob(name))
    return file_format.file_digest(*paths)[:16]
