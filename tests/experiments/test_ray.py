"""Ray: the same results with any number of workers, and workers that are killed in the middle.

One Ray of two CPUs serves all tests that need one, of which a single one is fast; what the driver
does is asked of `ray_here`, which is Ray in this process.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray_here
import torch
from grids import CUT, FACTS, HP, saved_model, tiny_grid, tiny_run
from grids import read_once as read_once

import pmet_lens as pl
from pmet_lens.data import file_format
from pmet_lens.experiments import (
    ray_cluster,
    ray_engine,
    remote_worker,
    scheduler,
    store,
    target_files,
    worker,
)
from pmet_lens.experiments import tasks as shards
from pmet_lens.experiments.grid import GridError
from pmet_lens.experiments.worker import Outcome, WorkerInfo

torch.set_num_threads(1)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "pmet-lens[ray]"'
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def grid(model) -> list[pl.Run]:
    """With an edit in steps, whose second half another worker may make, and groups."""
    one_layer, cut = replace(HP, layers=(2,)), replace(CUT, steps=2)
    steps = tiny_run(model, method="ROME", hparams=one_layer, cut=cut)
    return [*tiny_grid(model), steps, tiny_run(model, group=4, metrics=("answers",))]


@pytest.fixture(scope="module")
def serial(grid, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("serial")
    return folder, pl.run(grid, folder, progress=False)


@pytest.fixture(scope="module")
def ray():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray reads this name so; other tests may keep all cores busy.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "pmet-lens[ray]"')
    ray.init(
        address="local",  # whatever else runs on this machine
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def here(monkeypatch) -> ray_here.Here:
    made = ray_here.Here()
    monkeypatch.setitem(sys.modules, "ray", made)
    return made


@pytest.fixture(params=["here", "ray"])
def either(request):
    """In this process, and by Ray."""
    return request.getfixturevalue(request.param)


def same(found: Path, table: pd.DataFrame, grid, serial, exact: bool = True) -> None:
    """The results of a folder are those of the serial engine, bit for bit; where a worker has
    another number of threads, which add up in another order, to 1e-10 of per cent and 1e-12 (second
    moments to the bit)."""
    folder, wanted = serial
    wanted = wanted[wanted["digest"].isin([run.digest for run in grid])].reset_index(drop=True)
    how = {"check_exact": True} if exact else {"rtol": 0, "atol": 1e-10}
    pd.testing.assert_frame_equal(table, wanted, **how)
    for run in grid:
        pd.testing.assert_frame_equal(pl.rows_of(run, found), pl.rows_of(run, folder), **how)
    files, theirs = ({p.relative_to(f) for p in f.rglob("*.safetensors")} for f in (found, folder))
    assert files == theirs if len(table) == len(serial[1]) else files < theirs
    for file in sorted(files):
        near = 0.0 if exact or file.parts[0] == "moments" else 1e-12
        one, other = (file_format.read(f / file, None, "", GridError)[1] for f in (found, folder))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            close = torch.allclose(tensor, other[name], rtol=0, atol=near, equal_nan=True)
            assert close, (file, name)


@needs_ray
@pytest.mark.few("here-2")
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_have_the_same_results(either, workers, grid, serial, tmp_path):
    table = pl.run(grid, tmp_path, engine="ray", workers=workers, progress=False)
    one_thread = workers == 2 or isinstance(either, ray_here.Here)
    same(tmp_path, table, grid, serial, exact=one_thread)


def test_actors_share_the_machine_and_go_when_the_work_is_done(here, grid, tmp_path):
    pl.run(grid[2:3], tmp_path, engine="ray", workers=2, progress=False)
    actors, shares = zip(*here.started, strict=True)
    assert here.killed == list(actors)
    lives = {"max_restarts": -1, "max_task_retries": ray_engine.LIVES - 1}
    assert shares == 2 * ({**lives, "num_cpus": 0.5, "num_gpus": 0.0},)


@needs_ray
@pytest.mark.few("one of one")
@pytest.mark.parametrize(
    ("workers", "runs"), [(1, 1), (2, 5)], ids=["one of one", "one of two, every run"]
)
def test_workers_have_the_same_results_although_one_is_killed_in_the_middle(
    ray, workers, runs, grid, serial, tmp_path, monkeypatch
):
    grid = grid[:runs]
    submit, killed = ray_engine.Actors.submit, []

    def submit_and_kill(self, task):
        actor = self._idle[0]
        if task.kind != "targets" or killed:
            return submit(self, task)
        before = ray.get(actor.pid.remote())
        handle = submit(self, task)
        lock = tmp_path / "locks" / f"{store.hash_of(task.file)}.lock"
        while not lock.exists():  # it has begun
            time.sleep(0.005)
        os.kill(before, signal.SIGKILL)
        killed.append((actor, before))
        return handle

    monkeypatch.setattr(ray_engine.Actors, "submit", submit_and_kill)
    wait = ray_engine.Actors.wait

    def wait_and_see(self, handles):
        handle, outcome = wait(self, handles)
        if killed and len(killed[0]) == 2:
            killed[0] += (ray.get(killed[0][0].pid.remote()),)
        return handle, outcome

    monkeypatch.setattr(ray_engine.Actors, "wait", wait_and_see)
    table = pl.run(grid, tmp_path, engine="ray", workers=workers, progress=False)
    ((_, before, after),) = killed
    assert before != after  # somebody came for the one who died
    same(tmp_path, table, grid, serial, exact=workers == 2)  # one has the threads of two cores
    assert not list(tmp_path.rglob("*.part"))


@needs_ray
@pytest.mark.few("here")
def test_workers_spread_a_model_by_its_device_map(either, grid, serial, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    where = {"device_map": {"": "cpu"}}
    table = pl.run(grid[:1], tmp_path, engine="ray", workers=1, progress=False, **where)
    wanted = serial[1][serial[1]["digest"] == grid[0].digest]
    pd.testing.assert_frame_equal(table, wanted, rtol=0, atol=1e-10)


@needs_ray
@pytest.mark.few("here")
def test_a_plan_is_what_the_workers_say_at_the_same_time(either, grid):
    some = [replace(grid[n], facts=FACTS[:2]) for n in (0, 3)]  # at once, and in steps
    told = pl.plan(some, engine="ray", workers=2)
    assert told.workers == 2
    counted = pl.plan(some, rates=lambda kind, operations, exact: 1.0)
    assert told.tasks.keys() == counted.tasks.keys()
    assert told.operations == counted.operations
    assert (told.table["seconds"] > 0).all()
    assert told.start > 0  # two processes read their model


@needs_ray
@pytest.mark.slow
def test_workers_with_other_packages_are_refused(ray, grid, tmp_path, monkeypatch):
    own = {**store.versions(), "torch": "1.0"}
    monkeypatch.setattr(ray_engine.store, "versions", lambda: own)
    with pytest.raises(GridError, match=r"A worker has torch .* \(here 1\.0\).*same versions"):
        pl.run(grid, tmp_path, engine="ray", workers=1, progress=False)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (WorkerInfo("w", {**store.versions(), "torch": "1.0"}, {}), r"torch 1\.0 \(here "),
        (WorkerInfo("w", store.versions(), {}), "Two workers read different weights"),
    ],
)
def test_workers_that_differ_are_refused(here, grid, tmp_path, monkeypatch, told, words):
    describe, answers = ray_engine.RemoteWorker.describe, []

    def second_differs(self):
        answers.append(told if answers else describe(self))
        return answers[-1]

    monkeypatch.setattr(ray_engine.RemoteWorker, "describe", second_differs)
    with pytest.raises(GridError, match=words):
        pl.run(grid[2:3], tmp_path, engine="ray", workers=2, progress=False)
    assert here.killed == [actor for actor, _ in here.started]
    assert len(here.killed) == 2


def test_workers_that_die_again_and_again_say_on_what(here, grid, tmp_path, monkeypatch):
    """And what was finished before is kept."""
    do = worker.Worker.do

    def deadly(self, task):
        if task.kind == "answers":
            raise ray_here.Death
        return do(self, task)

    monkeypatch.setattr(worker.Worker, "do", deadly)
    with pytest.raises(GridError, match=rf"died {ray_engine.LIVES} times .*'answers'.*of memory"):
        pl.run(grid[2:3], tmp_path, engine="ray", workers=1, progress=False)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    assert len(pl.run(grid[2:3], tmp_path, progress=False))


@pytest.mark.parametrize("how", ["no answer", "far"])
def test_a_head_that_is_lost_is_said_and_what_was_finished_is_kept(
    here, grid, serial, tmp_path, monkeypatch, how
):
    """Of a cluster whose head can be asked, and of a far one, whose client hears of it."""
    submit, given, asked = ray_engine.Actors.submit, [], []

    def count(self, task):
        given.append(task)
        if how == "far" and len(given) == 4:
            raised = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("head:10001"))  # noqa: E731
            monkeypatch.setattr(here, "wait", raised)
        return submit(self, task)

    monkeypatch.setattr(ray_engine.Actors, "submit", count)
    monkeypatch.setattr(ray_engine, "LOOK_SECONDS", 0.0)
    if how == "no answer":
        monkeypatch.setattr(ray_cluster, "head_of", lambda ray: ("head", 10001))
        answers = lambda head: (asked.append(head), len(given) < 4)[1]  # noqa: E731
        monkeypatch.setattr(ray_cluster, "answers", answers)
    with pytest.raises(GridError, match=r"does not answer any more \(head:10001\).*is kept"):
        pl.run(grid[:1], tmp_path, engine="ray", workers=1, progress=False)
    assert len(here.killed) == (how == "far")  # without a head nobody can be asked to
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert kept
    table = pl.run(grid[:1], tmp_path, progress=False)
    # Parts of a second moment are gone when it is whole.
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items() if path.exists())
    same(tmp_path, table, grid[:1], serial)


def test_a_head_that_answers_at_the_second_call_is_there(monkeypatch):
    calls = []

    def connect(head, timeout):
        calls.append(head)
        if len(calls) < 2:
            raise ConnectionRefusedError
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(ray_cluster, "ASK_SECONDS", 0.0)
    assert ray_cluster.answers(("head", 1))
    assert calls == [("head", 1)] * 2
    assert ray_cluster.answers(None)


def test_a_head_that_answers_nobody_is_lost(monkeypatch):
    monkeypatch.setattr(ray_cluster, "ASK_SECONDS", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not ray_cluster.answers(free.getsockname())


# -- without a cluster ----------------------------------------------------------------------------


@needs_ray
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_said_before_ray_tries(
    grid, tmp_path, scheme, monkeypatch
):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(GridError, match=r"No Ray cluster answers at .*`ray start --head`"):
            pl.run(grid, tmp_path, engine="ray", address=address, progress=False)


def test_an_engine_that_is_not_installed_says_how_to_install_it(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GridError, match=r'pip install "pmet-lens\[ray\]".*--shard k/n'):
        pl.run(grid, tmp_path, engine="ray", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("have", "workers", "options", "wanted"),
    [
        ({"CPU": 8.0}, None, {}, (4, 0.0, 2.0)),
        ({"CPU": 1.0}, None, {}, (1, 0.0, 1.0)),
        ({"CPU": 2.0}, 4, {}, (4, 0.0, 0.5)),
        ({"CPU": 64.0, "GPU": 8.0}, None, {}, (8, 1.0, 8.0)),
        ({"CPU": 64.0, "GPU": 8.0}, 16, {}, (16, 0.5, 4.0)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, {}, (2, 1.0, 32.0)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, {"device": "cpu"}, (2, 0.0, 32.0)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, {"device_map": "auto"}, (2, 4.0, 32.0)),
    ],
)
def test_workers_share_a_cluster(have, workers, options, wanted):
    given = {"device": None, "device_map": None, **options}
    n, share = ray_engine.shares(have, workers, given)
    assert (n, share["num_gpus"], share["num_cpus"]) == wanted


@pytest.mark.parametrize(
    ("workers", "device_map", "words"),
    [(0, None, "workers must be at least 1"), (3, "auto", "take fewer workers")],
)
def test_too_few_and_too_many_workers_are_refused(workers, device_map, words):
    options = {"device": None, "device_map": device_map}
    with pytest.raises(GridError, match=words):
        ray_engine.shares({"CPU": 8.0, "GPU": 2.0}, workers, options)


def test_other_versions_are_named():
    told = WorkerInfo("w", {"torch": "2.0", "numpy": "2.1"}, {})
    ray_engine.check_versions(told, {"torch": "2.0", "numpy": "2.1"})
    with pytest.raises(GridError, match=r"A worker has numpy 2\.1 \(here none\)\. Results of"):
        ray_engine.check_versions(told, {"torch": "2.0"})


def test_a_worker_that_cannot_read_its_model_says_why(tmp_path):
    run = tiny_run("./no/such/model")
    where = {"folder": str(tmp_path), "home": str(Path.cwd())}
    how = {"device": None, "device_map": None}
    said = ray_engine.RemoteWorker({run.digest: run}, where, how, 1, None).describe()
    assert "no/such/model" in said


# -- weights once per node ------------------------------------------------------------------------


@pytest.fixture
def parcel(model):
    """The weights as Ray hands them on: arrays that cannot be written to."""
    found = remote_worker.pack(pl.load(model, dtype="float64"))
    for name, array in found["arrays"].items():
        found["arrays"][name] = array.copy()
        found["arrays"][name].flags.writeable = False
    return found


def test_a_model_from_a_parcel_is_the_same_and_shares_its_memory(model, parcel):
    run = tiny_run(model)
    before = {name: array.copy() for name, array in parcel["arrays"].items()}
    own = remote_worker.unpack(parcel, {run.digest: run}, None)
    first = pl.load(model, dtype="float64")
    assert target_files.identity(own) == target_files.identity(first)
    places = {p.data_ptr() for p in own.hf.parameters()}
    held = {int(array.ctypes.data) for array in parcel["arrays"].values()}
    assert len(held & places) > len(places) / 2
    moments = {site: torch.eye(own.d_in(site)) for site in (pl.Site(1, "mlp"), pl.Site(2, "mlp"))}
    edits = [pl.edit(m, FACTS, moments, pl.PMET, HP, ["{}"]) for m in (own, first)]
    with edits[0].applied(own), edits[1].applied(first):
        one, other = (pl.evaluate(m, FACTS[:2]) for m in (own, first))
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-12)
    assert all(np.array_equal(parcel["arrays"][name], array) for name, array in before.items())


# -- workers that die, without Ray ----------------------------------------------------------------


@pytest.mark.slow
@needs_ray
def test_a_task_that_kills_every_worker_is_given_up(ray, grid, tmp_path, monkeypatch):
    """And what was finished before is kept."""
    submit = ray_engine.Actors.submit

    class Fatal(shards.Task):
        """Whoever reads it dies."""

        def __reduce__(self):
            return os._exit, (1,)

    def submit_fatal(self, task):
        deadly = task.kind == "targets" and task.start == 2
        return submit(self, Fatal(**vars(task)) if deadly else task)

    monkeypatch.setattr(ray_engine.Actors, "submit", submit_fatal)
    with pytest.raises(GridError, match=rf"died {ray_engine.LIVES} times .*out of memory"):
        pl.run(grid[:1], tmp_path, engine="ray", workers=1, progress=False)


@pytest.mark.slow
def test_what_another_process_does_is_waited_for(model, tmp_path, monkeypatch):
    run = replace(tiny_run(model, method=None, hparams=None), facts=FACTS[:1])
    folder = store.Folder(tmp_path)
    folder.begin()
    one = worker.Worker(str(tmp_path), {run.digest: run})
    tasks = shards.tasks_of([run], one.weights)
    schedule, pool, states = scheduler.Schedule(tasks, folder), scheduler.Serial(one), []
    (file,) = (task.file for task in tasks[run.digest])
    held = folder.claimed(file)
    held.__enter__()
    do = worker.Worker.do

    def told(self, task) -> Outcome:
        states.append((found := do(self, task)).state)
        if len(states) == 2:
            held.__exit__(None, None, None)
        return found

    monkeypatch.setattr(worker.Worker, "do", told)
    schedule.run(pool, lambda *_: None)
    assert states == ["busy", "busy", "done"]
