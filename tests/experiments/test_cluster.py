"""A cluster of three nodes of Ray, each with an object store of its own; a node that is lost, and
the head."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from grids import CUT, saved_model, tiny_run

import pmet_lens as pl
from pmet_lens.data import file_format
from pmet_lens.experiments import ray_engine
from pmet_lens.experiments.grid import GridError

pytest.importorskip("ray", reason='needs Ray: pip install "pmet-lens[ray]"')
pytestmark = pytest.mark.slow
torch.set_num_threads(1)
STORE = 100 * 2**20


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> list[pl.Run]:
    """A thousand facts, edited at once and asked, in shards of 50."""
    model = saved_model(tmp_path_factory.mktemp("model"))
    known = pl.counterfact()
    facts = tuple(
        replace(
            f, subject=f"{f.subject} {i}", case_id=None, paraphrases=(), neighbours=f.neighbours[:1]
        )
        for i in range(2)
        for f in known
    )[:1000]
    hparams = pl.Hparams(layers=(1, 2), n_steps=2).settled()
    cut = replace(CUT, targets=50, answers=50)
    return [tiny_run(model, facts=facts, hparams=hparams, cut=cut, metrics=("answers",))]


@pytest.fixture(scope="module")
def serial(grid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    return folder, pl.run(grid, folder, progress=False)


@pytest.fixture
def cluster():
    """Three nodes of one CPU."""
    from ray import cluster_utils

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's spelling)
    how = {"num_cpus": 1, "object_store_memory": STORE}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=how)
    try:
        nodes = [made.add_node(**how) for _ in range(2)]
        made.wait_for_nodes()
        yield made, nodes
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


def same(folder, table, grid, serial) -> None:
    """Bit for bit: every number of the tables, and every tensor of second moments, targets and
    edits."""
    other, wanted = serial
    pd.testing.assert_frame_equal(table, wanted, check_exact=True)
    for run in grid:
        rows, theirs = pl.rows_of(run, folder), pl.rows_of(run, other)
        pd.testing.assert_frame_equal(rows, theirs, check_exact=True)
    files = sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(folder) for p in folder.rglob("*.safetensors"))
    for file in files:
        one, two = (file_format.read(f / file, None, "", GridError)[1] for f in (folder, other))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor.nan_to_num(), two[name].nan_to_num()), (file, name)


def test_three_nodes_give_what_one_process_gives(cluster, grid, serial, tmp_path, monkeypatch):
    made, _ = cluster
    places: set[str] = set()
    submit = ray_engine.Actors.submit

    def told(self, task):
        places.update(str(actor) for actor in self._idle[:1])
        return submit(self, task)

    monkeypatch.setattr(ray_engine.Actors, "submit", told)
    table = pl.run(grid, tmp_path, engine="ray", address=made.address, workers=3, progress=False)
    assert len(places) == 3  # every node worked
    same(tmp_path, table, grid, serial)


def after_eight_tasks(monkeypatch, lose) -> list[object]:
    """Call `lose()` when eight tasks are done; returns those that were done."""
    wait, done = ray_engine.Actors.wait, []

    def wait_and_lose(self, handles):
        found = wait(self, handles)
        done.append(found)
        if len(done) == 8:
            lose()
        return found

    monkeypatch.setattr(ray_engine.Actors, "wait", wait_and_lose)
    return done


def test_a_node_that_is_lost_costs_its_tasks_only(cluster, grid, serial, tmp_path, monkeypatch):
    made, nodes = cluster
    lose = partial(made.remove_node, nodes[0], allow_graceful=False)
    done = after_eight_tasks(monkeypatch, lose)
    table = pl.run(grid, tmp_path, engine="ray", address=made.address, workers=3, progress=False)
    assert len(done) > 8
    same(tmp_path, table, grid, serial)


def test_without_its_head_a_grid_ends_in_a_sentence_and_goes_on(
    cluster, grid, serial, tmp_path, monkeypatch
):
    made, _ = cluster
    kill = made.head_node.kill_all_processes
    after_eight_tasks(monkeypatch, partial(kill, check_alive=False, allow_graceful=False))
    with pytest.raises(GridError, match=r"head of the Ray cluster does not answer any more \(.*:"):
        pl.run(grid, tmp_path, engine="ray", address=made.address, workers=3, progress=False)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) >= 4
    table = pl.run(grid, tmp_path, progress=False)
    # Parts of a second moment are gone when it is whole.
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items() if path.exists())
    same(tmp_path, table, grid, serial)
