"""Grids that survive: cut, killed, damaged, shared, on a full disk; never half, never twice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from grids import CUT, FACTS, HP, OTHERS, saved_model, tiny_grid, tiny_run
from grids import read_once as read_once

import pmet_lens as pl
from pmet_lens.evaluation import metrics as metrics_of
from pmet_lens.experiments import engine, scheduler, target_files, tasks, worker
from pmet_lens.experiments import measure as measured
from pmet_lens.experiments.grid import GridError
from pmet_lens.experiments.store import Folder, FolderError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def grid(model) -> list[pl.Run]:
    return tiny_grid(model)


@pytest.fixture(scope="module")
def whole(grid, tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    """A folder in which the grid was run without any trouble, and its table."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(grid, folder)


@pytest.fixture
def made(monkeypatch) -> list[tasks.Task]:
    """The shards that are made from here on, in this process."""
    found = []
    do = worker.Worker.do

    def told(self, task):
        outcome = do(self, task)
        found.extend([task] if outcome.seconds else [])
        return outcome

    monkeypatch.setattr(worker.Worker, "do", told)
    return found


def go(grid, folder, **more) -> pd.DataFrame:
    return pl.run(grid, folder, progress=False, **more)


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    """A folder with the shards that runs share, and no results."""
    shutil.copytree(
        whole[0], tmp_path, ignore=shutil.ignore_patterns("results"), dirs_exist_ok=True
    )
    return tmp_path


def same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


def same_rows(grid, folder, other) -> None:
    for run in grid:
        same(pl.rows_of(run, folder), pl.rows_of(run, other))


class Cut(Exception):
    """Somebody pulled the plug."""


def cut_after(monkeypatch, n: int, kind: str = "") -> None:
    """The driver fails behind its n-th shard (of this kind)."""
    do, done = worker.Worker.do, []

    def told(self, task):
        outcome = do(self, task)
        done.extend([task] if kind in task.kind else [])
        if len(done) == n:
            raise Cut
        return outcome

    monkeypatch.setattr(worker.Worker, "do", told)


# -- what a run is --------------------------------------------------------------------------------


def test_a_run_is_what_one_would_do_by_hand(model, tmp_path):
    """One shard of everything: the bits of `edit` and `measure`."""
    run = tiny_run(
        model, method="MEMIT", cut=pl.Cut(), metrics=("answers", "collateral"), others=OTHERS
    )
    found = go([run], tmp_path, keep_edits=True).set_index("metric")
    own = pl.load(model)
    moments = pl.second_moments(
        own, pl.texts(f"{model}/texts.txt"), HP.layers, projections=("mlp",), n_tokens=1500
    )
    pl.save_moments(moments, tmp_path / "m.safetensors")
    moments = pl.open_moments(tmp_path / "m.safetensors")
    edit = pl.edit(own, FACTS, moments, pl.MEMIT, HP, pl.sample_contexts(own))
    wanted = measured(own, FACTS, edit, OTHERS)
    columns = ["mean", "ci_low", "ci_high", "n"]
    same(found[columns], wanted[columns])
    (path,) = (tmp_path / "edits").glob("*.safetensors")
    kept = pl.Edit.load(path, own)
    assert all(torch.equal(kept.deltas[site], delta) for site, delta in edit.deltas.items())


@pytest.mark.slow
def test_shards_change_nothing_but_roundings(model, whole, tmp_path):
    folder, _ = whole
    run = tiny_run(model)
    go([replace(run, cut=pl.Cut(targets=4, answers=6, tokens=2000))], tmp_path)
    few = pl.rows_of(replace(run, cut=pl.Cut(targets=4, answers=6, tokens=2000)), tmp_path)
    many = pl.rows_of(run, folder)
    # The text of the moments is another sample where its parts are others, hence the tolerance.
    pd.testing.assert_frame_equal(few, many, rtol=1e-3, atol=1e-3)
    assert not few.equals(many)


def test_what_drivers_share_stays_and_what_is_the_runs_goes(whole):
    """Another driver may be about to write an edit when this one has finished its last run."""
    folder, _ = whole
    assert list((folder / "edits").iterdir()) == []
    assert list((folder / "answers").iterdir()) == []


def test_a_bench_reads_the_targets_of_a_grid(model, tmp_path, monkeypatch):
    """One cache of targets: what a grid optimised, a bench on the same folder does not again."""
    go([tiny_run(model, facts=FACTS[:2], cut=pl.Cut())], tmp_path)
    texts = (Path(model) / "texts.txt").read_text(encoding="utf-8").splitlines()
    bench = pl.Bench(pl.load(model), tmp_path, texts, n_tokens=300, hparams=lambda _: HP)
    (path,) = (tmp_path / "targets").glob("*")
    optimised = []
    monkeypatch.setattr(target_files.targets, "optimise", lambda *given: optimised.append(given))
    targets = bench.targets(pl.Trial(), FACTS[:2])
    assert optimised == []
    for stream, values in target_files.load(path).values.items():
        assert torch.equal(targets.values[stream], values)
    # A grid on the edited model would draw other prefixes, so the name has to be another.
    monkeypatch.undo()
    with torch.no_grad():
        bench.model.weight(pl.Site(0, "mlp")).add_(0.01)
    bench.targets(pl.Trial(), FACTS[:2])
    changed = target_files.identity(bench.model)
    of_grid = target_files.key(changed, FACTS[:2], pl.PMET, HP, 0)
    names = {path.stem for path in (tmp_path / "targets").glob("*")}
    assert len(names) == 2
    assert of_grid not in names


def test_groups_are_edited_one_at_a_time(model, tmp_path):
    """Each on the clean model, with the targets of all: the bits of doing so by hand."""
    metrics = ("answers", "collateral")
    run = tiny_run(model, group=4, metrics=metrics, others=OTHERS, method="MEMIT", cut=pl.Cut())
    table = go([run], tmp_path, keep_edits=True).set_index("metric")
    assert set(table["edits"]) == {4}
    own = pl.load(model)
    edits = [pl.Edit.load(path, own) for path in sorted((tmp_path / "edits").glob("*"))]
    assert [edit.facts for edit in edits] == [FACTS[:4], FACTS[4:]]
    (found,) = [target_files.load(path) for path in (tmp_path / "targets").glob("*")]
    files = (tmp_path / "moments").rglob("*.mlp.safetensors")
    moments = {site: m for file in files for site, m in pl.open_moments(file).items()}
    rows, right = [], []
    for start, kept in zip((0, 4), edits, strict=True):
        part = slice(start, start + 4)
        again = pl.edit(own, FACTS[part], moments, pl.MEMIT, HP, kept.contexts, found[part])
        assert all(torch.equal(kept.deltas[site], delta) for site, delta in again.deltas.items())
        with again.applied(own):
            rows.append(pl.evaluate(own, FACTS[part]))
            rows[-1]["fact"] += start
            right.append(100 * pl.recall(own, OTHERS)["correct"].to_numpy())
    wanted = pl.summarise(pd.concat(rows, ignore_index=True))
    columns = ["mean", "ci_low", "ci_high"]
    same(table.drop(index="collateral")[columns], wanted[columns])
    mean = np.mean(right, axis=0)
    collateral = [mean.mean(), *metrics_of.bootstrap(mean), len(OTHERS)]
    assert list(table.loc["collateral", [*columns, "n"]]) == collateral


def rome_run(model: str, n: int = 6) -> pl.Run:
    return tiny_run(
        model,
        method="ROME",
        hparams=replace(HP, layers=(2,)),
        facts=FACTS[:n],
        cut=replace(CUT, steps=2),
        name=f"ROME {n}",
    )


def test_steps_add_up_to_the_edit_by_hand(model, tmp_path):
    run = rome_run(model)
    go([run], tmp_path, keep_edits=True)
    own = pl.load(model)
    (kept,) = [pl.Edit.load(path, own) for path in (tmp_path / "edits").glob("*")]
    (file,) = (tmp_path / "moments").rglob("*.mlp.safetensors")
    hand = pl.edit(own, FACTS, pl.open_moments(file), pl.ROME, run.hparams, kept.contexts)
    assert kept.facts == FACTS
    for site, delta in hand.deltas.items():
        torch.testing.assert_close(kept.deltas[site], delta, rtol=1e-9, atol=1e-12)


def test_an_edit_in_steps_goes_on_where_it_was_cut(model, tmp_path, made, monkeypatch):
    """And a smaller edit of the first facts has its steps."""
    wanted = go([rome_run(model)], tmp_path / "whole")
    made.clear()
    with monkeypatch.context() as patch:
        cut_after(patch, 2, "steps")
        with pytest.raises(Cut):
            go([rome_run(model)], tmp_path / "cut")
    found = go([rome_run(model), rome_run(model, 4)], tmp_path / "cut")
    same(found[found["run"] == "ROME 6"].reset_index(drop=True), wanted)
    same_rows([rome_run(model)], tmp_path / "cut", tmp_path / "whole")
    steps = [(task.start, task.stop) for task in made if task.kind == "steps"]
    assert steps == [(0, 2), (2, 4), (4, 6)]


def test_every_method_runs(model, tmp_path):
    names = [n for n in pl.METHODS if n != "MEND"]
    ft = pl.FineTuneHparams(layer=1, n_steps=2)
    own = {"FT-W": ft, "FT+L": replace(ft, norm_constraint=0.1)}
    exact = replace(HP, layers=(2,))
    own |= {"ROME": exact, "EMMET": exact}
    runs = [tiny_run(model, method=n, hparams=own.get(n, HP), facts=FACTS[:2]) for n in names]
    table = go(runs, tmp_path)
    assert list(table["run"].unique()) == names
    assert set(table["edits"]) == {2}
    assert table.loc[table["metric"] == "ES", "n"].eq(2).all()


def test_the_manifest_says_how_it_was_made(grid, whole):
    folder, table = whole
    told = json.loads((folder / f"results/{grid[1].digest}.json").read_text(encoding="utf-8"))
    assert told["run"] == grid[1].record()
    assert told["versions"]["torch"] == torch.__version__
    assert told["versions"].keys() > {"python", "transformers", "transformer-lens"}
    assert told["hardware"]["threads"] == 1
    assert told["seconds"].keys() >= {"edit", "answers", "others", "wall"}
    assert (told["engine"], told["name"]) == ("serial", "MEMIT")
    assert told["rows"] == len(pl.rows_of(grid[1], folder))
    assert list(table["run"].unique()) == ["PMET", "MEMIT", "unedited"]


def test_only_results_and_what_is_shared_are_left(grid, whole):
    folder, _ = whole
    left = Counter(p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file())
    del left["locks"]
    assert left == {"results": 6, "targets": 6, "contexts": 1, "moments": 4}  # 2 are factors
    assert not list(folder.rglob("*.part"))


def test_text_and_ability_are_measured(model, tmp_path):
    run = tiny_run(model, metrics=("generation", "ability"), facts=FACTS[:2], n_texts=10)
    table = go([run], tmp_path).set_index("metric")
    assert {"GE", "perplexity", "KL"} <= set(table.index)
    assert set(pl.rows_of(run, tmp_path)["kind"]) == {"generation"}
    same(go([run], tmp_path).set_index("metric"), table)


# -- what is there is not made again --------------------------------------------------------------


def test_what_is_there_is_skipped_without_a_model(grid, whole, monkeypatch):
    folder, table = whole
    monkeypatch.setattr(engine, "Worker", None)
    seen = []
    again = go(
        [replace(r, name=f"new {r.name}") for r in grid], folder, on_run=lambda r, _: seen.append(r)
    )
    same(again.assign(run=table["run"]), table)
    assert seen == grid  # equal but for their names
    assert list(again["run"].unique()) == ["new PMET", "new MEMIT", "new unedited"]


def test_runs_share_what_they_can(model, whole, tmp_path, made):
    """Another λ takes the same targets; another layer's moment is of the same pass."""
    base = tiny_run(model)
    changed = replace(base, hparams=replace(HP, second_moment_weight=10.0))
    go([base, changed, replace(base, hparams=replace(HP, layers=(2,)))], tmp_path)
    kinds = Counter(task.kind for task in made)
    assert kinds == {"contexts": 1, "part": 3, "moments": 2, "targets": 3, "edit": 3, "answers": 6}


@pytest.mark.few("9")
@pytest.mark.parametrize("n", [4, 9, 12])
def test_a_grid_that_was_cut_goes_on(grid, whole, tmp_path, made, monkeypatch, n):
    folder, table = whole
    with monkeypatch.context() as patch:
        cut_after(patch, n)
        with pytest.raises(Cut):
            go(grid, tmp_path)
    before = [task.file for task in made]
    same(go(grid, tmp_path), table)
    same_rows(grid, tmp_path, folder)
    assert max(Counter(task.file for task in made).values()) == 1
    assert len(before) == n


@pytest.mark.slow
def test_moments_that_were_cut_in_the_middle_of_a_shard_go_on(model, tmp_path, monkeypatch):
    """And begin again where what was kept of them is damaged."""
    monkeypatch.setattr(worker, "MOMENTS_KEPT_EVERY", 0.0)
    run = tiny_run(model, n_tokens=10_000, cut=replace(CUT, tokens=10_000))
    read = worker.moment_files.Summing.read
    seen: list[int] = []

    def cut(self, texts, on_tokens=None):
        for done in read(self, texts, on_tokens):
            seen.append(done)
            yield done
            if len(seen) == 2:
                raise Cut

    monkeypatch.setattr(worker.moment_files.Summing, "read", cut)
    for spoilt in (False, True):
        seen.clear()
        with pytest.raises(Cut):
            go([run], tmp_path / str(spoilt))
        (begun,) = tmp_path.glob(f"{spoilt}/moments/*/*.begun")
        if spoilt:
            begun.write_bytes(begun.read_bytes()[:-7])
        go([run], tmp_path / str(spoilt))
        assert (seen[2] == seen[0]) == spoilt
    one, other = (tmp_path / name / "moments" for name in ("False", "True"))
    for file in one.rglob("?.mlp.safetensors"):
        both = [pl.load_moments(path) for path in (file, other / file.relative_to(one))]
        assert torch.equal(*(next(iter(found.values())).total for found in both))


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch, pmet_lens as pl
from pmet_lens.experiments import worker
from grids import tiny_grid
torch.set_num_threads(1)
do = worker.Worker.do
def told(self, task):
    outcome = do(self, task)
    if outcome.seconds:
        sys.stdout.write(f"{{task.kind}} {{task.file}}\\n"); sys.stdout.flush()
    time.sleep({wait})
    return outcome
worker.Worker.do = told
pl.run(tiny_grid({model!r}), {folder!r}, progress=False)
"""


def child(model: str, folder: Path, wait: float = 0.0) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    code = CHILD.format(tests=tests, model=model, folder=str(folder), wait=wait)
    env = {**os.environ, "PYTHONPATH": str(Path(pl.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)


@pytest.mark.slow
def test_a_driver_that_is_killed_loses_nothing_it_had_finished(grid, model, whole, tmp_path, made):
    folder, table = whole
    with child(model, tmp_path, 0.05) as process:
        assert process.stdout is not None
        files = []
        for line in process.stdout:
            files.append(line.split()[1])
            if len(files) == 8:
                break
        process.send_signal(signal.SIGKILL)
    stamps = {f: (tmp_path / f).stat().st_mtime_ns for f in files}
    (tmp_path / "contexts" / f"{Path(files[0]).name}.left.part").write_text("half")
    same(go(grid, tmp_path), table)
    same_rows(grid, tmp_path, folder)
    assert not {task.file for task in made} & set(files)
    kept = {f: at for f, at in stamps.items() if (tmp_path / f).exists()}
    assert kept
    assert all((tmp_path / f).stat().st_mtime_ns == at for f, at in kept.items())


@pytest.mark.slow
def test_two_drivers_on_one_folder_share_the_work(grid, model, whole, tmp_path):
    folder, table = whole
    with child(model, tmp_path) as first, child(model, tmp_path) as second:
        told = [process.communicate(timeout=100)[0].splitlines() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    counts = Counter(line for lines in told for line in lines)
    assert set(counts.values()) == {1}  # nothing was made twice
    same(go(grid, tmp_path), table)
    same_rows(grid, tmp_path, folder)


@pytest.mark.slow
def test_shards_of_a_batch_queue_make_one_grid(grid, whole, tmp_path, made):
    folder, table = whole
    parts = [go(grid, tmp_path, shard=f"{k}/2") for k in (1, 2)]
    assert [list(p["run"].unique()) for p in parts] == [["PMET", "unedited"], ["MEMIT"]]
    same(go(grid, tmp_path), table)
    same_rows(grid, tmp_path, folder)
    assert max(Counter(task.file for task in made).values()) == 1


# -- damage ---------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if how == "a bit" else bytes(data[: len(data) // 2]))


@pytest.mark.few("a bit")
@pytest.mark.parametrize("how", ["a bit", "half"])
def test_damaged_shards_are_made_again(grid, whole, tmp_path, made, monkeypatch, how):
    folder, table = whole
    with monkeypatch.context() as patch:
        cut_after(patch, 1, "answers")
        with pytest.raises(Cut):
            go(grid[:1], tmp_path)
    files = [task.file for task in made]
    assert {task.kind for task in made} == {
        "contexts", "part", "moments", "targets", "edit", "answers",
    }  # fmt: skip
    for file in files:
        if "part-" not in file:
            spoil(tmp_path / file, how)
    with pytest.warns(UserWarning, match=r"is damaged; making it again") as warned:
        found = go(grid[:1], tmp_path)
    assert len([w for w in warned if "is damaged" in str(w.message)]) == len(files) - 3
    same(found, table[table["run"] == "PMET"])
    same_rows(grid[:1], tmp_path, folder)
    # The parts of the text were still whole.
    assert Counter(task.kind for task in made)["part"] == 3


@pytest.mark.few("a bit-parquet", "half-json")
@pytest.mark.parametrize("suffix", ["parquet", "json"])
@pytest.mark.parametrize("how", ["a bit", "half"])
def test_a_damaged_result_is_made_again(grid, tmp_path, suffix, how):
    table = go(grid[2:], tmp_path)
    path = tmp_path / f"results/{grid[2].digest}.{suffix}"
    if (suffix, how) == ("json", "a bit"):
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    else:
        spoil(path, how)
    with pytest.raises(GridError, match="is damaged: run the grid"):
        pl.rows_of(grid[2], tmp_path)
    with pytest.warns(UserWarning, match=r"is damaged; making it again"):
        same(go(grid[2:], tmp_path), table)
    same(go(grid[2:], tmp_path), table)


def test_rows_that_are_not_there_are_not_invented(grid, tmp_path):
    with pytest.raises(GridError, match=r"is not there: run the grid with pl\.run"):
        pl.rows_of(grid[0], tmp_path)


def test_results_of_other_weights_are_not_taken(tmp_path):
    path = saved_model(tmp_path / "model")
    run = tiny_run(path, method=None, hparams=None)
    go([run], tmp_path / "runs")
    saved_model(tmp_path / "model", seed=1)
    for more in ([], [replace(run, seed=1)]):
        with pytest.raises(GridError, match=r"made with other weights.*Name another folder"):
            go([run, *more], tmp_path / "runs")


# -- disks ----------------------------------------------------------------------------------------


@pytest.mark.few("60000")
@pytest.mark.filterwarnings("ignore:second moments could not be written")
@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_full_disk_stops_the_grid_and_loses_nothing(grid, whole, tmp_path, made, limit):
    table = whole[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(FolderError, match=r"could not be written.*Free some space or raise"):
            go(grid, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.rglob("*.part"))
    done = [task.file for task in made]
    made.clear()
    same(go(grid, tmp_path), table)
    assert not {task.file for task in made} & set(done)


def test_a_folder_that_cannot_be_made_is_said_before_the_work(grid, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(engine, "Worker", None)
    with pytest.raises(FolderError, match=r"could not be written.*name a folder you may write"):
        go(grid, tmp_path / "file" / "runs")


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_fails_does_not_take_the_others_along(grid, model, whole, tmp_path):
    table = whole[1]
    long = replace(FACTS[0], subject="Maxtron " * 200)
    bad = tiny_run(model, facts=(long, *FACTS[1:]), name="too long")
    with pytest.raises(GridError, match=r"1 of 4 runs could not.*too long: .*reads at most 256"):
        go([bad, *grid], tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 4 runs could not.*too long: .*reads at most 256"):
        same(go([bad, *grid], tmp_path, strict=False), table)
    with pytest.warns(UserWarning, match="1 of 1 runs"):
        none = go([bad], tmp_path, strict=False)
    assert none.empty
    assert list(none) == list(table)


def test_a_model_that_cannot_be_read_does_not_take_the_others_along(
    grid, whole, tmp_path, monkeypatch
):
    table = whole[1]
    lost = tiny_run("./no/such", method=None, hparams=None, name="lost")
    unedited = table[table["run"] == "unedited"].reset_index(drop=True)
    with pytest.raises(GridError, match=r"1 of 2 runs could not be finished\. lost: .*no/such"):
        go([lost, grid[2]], tmp_path)
    monkeypatch.setattr(engine, "Worker", None)  # all others are there
    same(go(grid[2:], tmp_path), unedited)


def test_engines_that_are_none_are_refused(grid, tmp_path):
    with pytest.raises(GridError, match=r"no engine 'spark'; choose from serial, ray"):
        go(grid, tmp_path, engine="spark")
    with pytest.raises(GridError, match='are for engine="ray"'):
        go(grid, tmp_path, workers=2)
    with pytest.raises(GridError, match="counted twice"):
        go([grid[0], grid[0]], tmp_path)
    with pytest.raises(GridError, match="no shard '3/2'"):
        go(grid, tmp_path, shard="3/2")


# -- progress -------------------------------------------------------------------------------------


def test_bars_and_a_live_table(grid, shards, capsys):
    pl.run(grid, shards)
    out, err = capsys.readouterr()
    assert "grid: 100%" in err
    for name in ("PMET", "MEMIT", "unedited"):
        assert f"{name}:" in err  # a bar of its own
        assert out.count(name) == 1  # one line when it was finished
    assert "collateral" in out


@pytest.mark.slow
def test_every_bar_ends_full(grid, tmp_path, made, monkeypatch):
    """Although runs share shards."""
    told = []
    monkeypatch.setattr(scheduler.Progress, "begin", lambda self, left: told.append(dict(left)))
    go(grid, tmp_path)
    assert told == [Counter(task.run for task in made)]
    assert set(told[0]) == {run.digest for run in grid}


def test_the_table_has_a_line_per_run(whole):
    wide = scheduler.wide(whole[1])
    assert list(wide["run"]) == ["PMET", "MEMIT", "unedited"]
    assert list(wide.columns[:4]) == ["run", "model", "edits", "S"]
    assert wide["collateral"].notna().sum() == 1
    twice = pd.concat([whole[1], whole[1].assign(digest="another")])
    assert len(scheduler.wide(twice)) == 6


def test_quiet_is_quiet(grid, tmp_path, capsys):
    go(grid[2:], tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "grid" not in err


def test_a_lock_is_of_one_file_and_released(tmp_path):
    folder = Folder(tmp_path)
    folder.begin()
    with folder.claimed("a") as first, folder.claimed("a") as second, folder.claimed("b") as other:
        assert (first, second, other) == (True, False, True)
    with folder.claimed("a") as again:
        assert again
