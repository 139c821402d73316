"""A plan counts the shards a grid will have, and what they cost."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from grids import HP, OTHERS, saved_model, tiny_grid, tiny_run
from grids import read_once as read_once
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.experiments import tasks as shards
from pmet_lens.experiments.grid import GridError
from pmet_lens.plans import costs, planning, workload

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def grid(model) -> list[pl.Run]:
    return tiny_grid(model)


def flat(kind: str, operations: float, exact: float) -> float:
    """One second each."""
    return 1.0


def test_shards_are_counted_once_although_runs_share_them(model, grid):
    more = [*grid, replace(grid[0], hparams=replace(HP, second_moment_weight=1.0))]
    told = pl.plan(more, rates=flat)
    tasks = shards.tasks_of(more, "w")
    distinct = {task.file: task.kind for own in tasks.values() for task in own}
    table = told.table.set_index("kind")
    assert table["shards"].to_dict() == Counter(distinct.values())
    assert table["seconds"].to_dict() == Counter(distinct.values())
    assert table.loc["part", "units"] == 1500
    assert table.loc["targets", "units"] == 12  # of six facts, for two methods
    assert table.loc["answers", "units"] == 24
    assert table.loc["others", "units"] == len(OTHERS)
    assert told.runs == 4


def test_groups_and_steps_are_counted(model):
    steps = tiny_run(model, method="ROME", hparams=replace(HP, layers=(2,)))
    table = pl.plan([steps], rates=flat).table.set_index("kind")
    assert table.loc["steps", ["shards", "units"]].tolist() == [1, 6]
    assert table.loc["edit", "operations"] == 0
    assert table.loc["steps", "operations"] > 6 * 4 * costs.sizes_of(pl.load(model)).blocks[0]
    groups = tiny_run(model, group=2, metrics=("answers", "collateral"), others=OTHERS)
    table = pl.plan([groups], rates=flat).table.set_index("kind")
    assert table.loc["edit", ["shards", "units"]].tolist() == [3, 6]
    assert table.loc["targets", "units"] == table.loc["answers", "units"] == 6
    assert table.loc["others", "units"] == 3 * len(OTHERS)


def test_operations_are_those_of_the_estimate(model, grid):
    own = pl.load(model)
    wanted = pl.estimate(own, grid[0].facts, pl.PMET, HP, workload.CONTEXTS)
    table = pl.plan(grid[:1], rates=flat).table.set_index("kind")
    assert table.loc["targets", "operations"] == pytest.approx(wanted.targets)
    factors = 2 * own.d_in(pl.Site(1, "mlp")) ** 3 / 3
    assert table.loc["edit", "operations"] == pytest.approx(wanted.keys + wanted.solve + factors)


def test_bytes_are_about_those_that_are_written(grid, tmp_path):
    told = pl.plan(grid, rates=flat)
    pl.run(grid, tmp_path, progress=False)
    for kind, folder in (("moments", "moments"), ("targets", "targets")):
        real = sum(f.stat().st_size for f in (tmp_path / folder).rglob("*.safetensors"))
        counted = told.table.set_index("kind").loc[kind, "bytes"]
        assert 0.2 < counted / real < 1.5, kind
    assert told.disk < told.disk_most


@pytest.mark.slow
def test_every_task_has_a_time_from_the_probe(grid):
    told = pl.plan(grid)
    assert all(seconds > 0 for seconds, _ in told.tasks.values())
    text = str(told)
    for words in ("3 runs, 1 worker: about", "memory per worker", "on disk", "targets", "12 fact"):
        assert words in text


@pytest.mark.slow
def test_methods_without_a_count_have_a_time(model):
    runs = [
        tiny_run(model, method="FT-W", hparams=pl.FineTuneHparams(layer=1, n_steps=2)),
        tiny_run(model, method="ROME", hparams=replace(HP, layers=(2,))),
        tiny_run(model, method="AlphaEdit"),
        tiny_run(model, metrics=("generation", "ability")),
    ]
    table = pl.plan(runs).table.set_index("kind")
    assert (table["seconds"] > 0).all()
    assert {"generation", "ability"} <= set(table.index)


def test_workers_help_as_far_as_shards_do_not_wait_for_each_other():
    chain = {"a": (1.0, ()), "b": (1.0, ("a",)), "c": (1.0, ("b",))}
    free = dict.fromkeys("abcd", (1.0, ()))
    assert [planning.played(chain, n) for n in (1, 2, 9)] == [3, 3, 3]
    assert [planning.played(free, n) for n in (1, 2, 3, 4)] == [4, 2, 2, 1]
    both = {**chain, **{f"x{i}": (0.5, ()) for i in range(4)}}
    times = [planning.played(both, n) for n in (1, 2, 3)]
    assert times[0] == 5
    assert times[-1] == 3
    assert all(a >= b for a, b in itertools.pairwise(times))
    assert planning.played({}, 2) == 0


def test_a_small_model_stands_in_for_a_large_one(model, grid):
    """Counting needs the sizes of the large one, and of the small one only its tokens."""
    small, own = tiny_model("gpt2", torch.float64, positions=256), pl.load(model)
    sizes = costs.sizes_of(own)
    wide = replace(
        sizes,
        blocks=tuple(4 * n for n in sizes.blocks),
        last_mlp=4 * sizes.last_mlp,
        embedding=2 * sizes.embedding,
        d_model=2 * sizes.d_model,
        d_in={p: 2 * d for p, d in sizes.d_in.items()},
    )
    plain = pl.plan(grid[:1], rates=flat, stand_in=(small, sizes)).table.set_index("kind")
    large = pl.plan(grid[:1], rates=flat, stand_in=(small, wide)).table.set_index("kind")
    ratio = large["operations"] / plain["operations"]
    assert 3.5 < ratio["targets"] < 4
    assert ratio["part"] == pytest.approx(4)
    assert large.loc["moments", "bytes"] == 4 * plain.loc["moments", "bytes"]
    pd.testing.assert_frame_equal(plain, pl.plan(grid[:1], rates=flat).table.set_index("kind"))


def test_bad_plans_are_refused(grid):
    with pytest.raises(GridError, match="counted twice"):
        pl.plan([grid[0], grid[0]])
    with pytest.raises(GridError, match="workers must be at least 1"):
        pl.plan(grid, workers=0)
    with pytest.raises(GridError, match="no engine 'spark'"):
        pl.plan(grid, engine="spark")
    with pytest.raises(GridError, match="leave it out to give rates"):
        pl.plan(grid, engine="ray", rates=flat)
    with pytest.raises(GridError, match="give rates with stand_in"):
        pl.plan(grid, stand_in=(tiny_model("gpt2"), costs.sizes_of(tiny_model("gpt2"))))


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.23, "1.2 s"), (90.0, "90.0 s"), (150.0, "2.5 minutes")]
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert planning.clock(seconds) == text
    assert planning.clock(3 * 86_400.0) == "3.0 days"
    assert planning.clock(2.5 * 3_600.0) == "2.5 hours"
