"""`make paper`: results are kept, those of other code refused, and tables say what is in them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import fig_sequential
import numpy as np
import pandas as pd
import paper
import paper_tables
import pytest
from kept import bundled
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import plotting

MODELS = ("world", "world-sequential")


def numbers(mean: float, **columns: object) -> dict[str, object]:
    return {**columns, "mean": mean, "ci_low": mean - 1, "ci_high": mean + 1, "n": 10}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Small tables with every column the figures read."""
    metrics = (*paper_tables.COLUMNS["counterfact"], "score")
    scaling = [
        numbers(50.0 + n, model=m, benchmark=b, run=r, edits=n, load=n / 1280, metric=k)
        for m, b, r, n, k in product(
            MODELS, ("counterfact", "zsre"), ("unedited", *pl.METHODS), (1, 10), metrics
        )
    ]
    effects = {"PMET": np.nan, "w/o δ^a": -5.0, "+ W_O": 0.5, "linear spread": 4.0, "MEMIT": -1.0}
    ablations = [
        numbers(90.0, model=m, run=r, edits=200, metric=k, difference=d)
        | {"difference_low": d - 1.5, "difference_high": d + 1.5}
        for m, (r, d), k in product(MODELS, effects.items(), ("S", "ES", "PS", "NS", "collateral"))
    ]
    weights = [
        numbers(80.0, model=m, run=r, edits=100, metric=k, second_moment_weight=w)
        for m, r, k, w in product(MODELS, ("PMET", "MEMIT"), ("S", "ES", "PS"), (1.0, 10.0))
    ]
    layers = [
        numbers(80.0, model=m, run="PMET", edits=100, metric="S", layers=text, last=last)
        for m, (text, last) in product(MODELS, (("3", 3), ("2 3", 3), ("4", 4)))
    ]
    sequential = [
        numbers(80.0, model=m, run=r, edits=n, metric=k, batch=20, collapsed=n == 40)
        for m, r, n, k in product(
            MODELS, ("PMET", "PMET, protected"), (20, 40), fig_sequential.METRICS
        )
    ]
    made = {"scaling": scaling, "ablations": ablations, "lambda": weights, "layers": layers}
    for name, rows in {**made, "sequential": sequential}.items():
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "provenance.txt").write_text("today, here.\n", encoding="utf-8")
    return tmp_path


def test_a_result_that_is_there_is_not_made_again(tmp_path):
    made = []

    def make() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"metric": ["NA", "S"], "mean": [1.0, 2.0]})

    first, again = (paper.kept(tmp_path / "a.csv", make) for _ in range(2))
    assert len(made) == 1
    pd.testing.assert_frame_equal(first, again)
    assert list(again["metric"]) == ["NA", "S"]


def test_a_result_that_was_cut_is_made_again(tmp_path):
    def cut() -> pd.DataFrame:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paper.kept(tmp_path / "a.csv", cut)
    assert not (tmp_path / "a.csv").exists()
    assert len(paper.kept(tmp_path / "a.csv", lambda: pd.DataFrame({"metric": ["S"]}))) == 1


def test_results_of_other_code_are_refused_and_fresh_forgets_them(tmp_path):
    out = tmp_path / "out"
    paper.prepare(out, fresh=False)
    paper.prepare(out, fresh=False)  # the same code goes on
    (out / "made_by.json").write_text("{}", encoding="utf-8")
    (out / "old.csv").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"results of other code.*--fresh"):
        paper.prepare(out, fresh=False)
    paper.prepare(out, fresh=True)
    assert not (out / "old.csv").exists()


def test_the_time_of_all_sittings_is_added_up(tmp_path):
    assert paper.spent(tmp_path) == 0
    (tmp_path / "minutes.txt").write_text("12.5\n", encoding="utf-8")
    assert paper.spent(tmp_path) == 12.5


def test_every_method_stands_in_the_plan_at_every_load(monkeypatch):
    monkeypatch.setattr(paper, "ROME_MOST", 10)
    size = paper.Size(grid=(1, 10, 32), main=(32,), zsre=(10, 32))
    model = bundled("world")
    bench = type("B", (), {"model": model, "settings": staticmethod(lambda m: None)})()
    keys = [(table, key) for table, key, _ in paper.jobs(bench, size)]
    assert len(set(keys)) == len(keys)
    assert {table for table, _ in keys} == {*paper.TABLES} - {"scaling"}
    cells = list(paper.scaling("world", size))
    there = {(benchmark, n, run.name) for benchmark, n, run in cells}
    assert len(there) == len(cells)
    for benchmark, grid in (("counterfact", size.grid), ("zsre", size.zsre)):
        for n, method in product(grid, ("unedited", *pl.METHODS)):
            assert ((benchmark, n, method) in there) == (method != "ROME" or n <= 10)
    for _, n, run in cells:
        assert n == run.edits or (run.method is None and run.edits == 0)
        assert len(run.facts) == max(n, 20)
        assert ("ability" in run.metrics) == (n > 10)


def test_an_edit_without_a_solution_is_left_out_and_no_other(tmp_path, monkeypatch):
    """Two records of one subject give one key: an exact solver cannot, and says so."""
    first = pl.counterfact(n=1)[0]
    other = replace(first, prompt="{} is", target_true="elsewhere", target_new="nowhere")
    own = {"n_tokens": 3_000, "metrics": ("answers",)}
    runs = {m: pl.Run("world", (first, other), m, **own) for m in ("EMMET", None)}
    bar = paper.tqdm(disable=True)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 runs could not be finished"):
        table = paper.made([("zsre", 2, run) for run in runs.values()], tmp_path, 1280, bar)
    assert set(table["run"]) == {"unedited"}
    bad = replace(runs["EMMET"], name="PMET")
    with (
        pytest.warns(UserWarning, match="1 of 1"),
        pytest.raises(SystemExit, match="Runs of PMET"),
    ):
        paper.made([("zsre", 2, bad)], tmp_path, 1280, bar)


@pytest.mark.parametrize("name", sorted(paper_tables.FIGURES))
def test_every_figure_draws_from_its_tables(tables, name):
    figure = paper_tables.FIGURES[name](tables)
    assert isinstance(figure, Figure)
    assert all(ax.has_data() or ax.images for ax in figure.axes)
    assert "Quick" not in figure.get_suptitle()
    (tables / "provenance.txt").write_text("today. Quick: few facts.\n", encoding="utf-8")
    assert paper_tables.FIGURES[name](tables).get_suptitle().startswith("Quick run")


def test_the_main_table_has_every_method_of_both_models_and_benchmarks(tables):
    text = paper_tables.main_table(tables)
    for name, run in product(MODELS, ("unedited", *pl.METHODS)):
        assert text.count(f"| {name} | 10 (0.01) | {run} | 60.0 [59.0, 61.0] |") == 2
    assert "today, here." in text


def test_the_ablation_table_gives_size_sign_and_verdict(tables):
    lines = paper_tables.ablation_table(tables).splitlines()
    by_run = {line.split(" | ")[1]: line for line in lines if line.startswith("| world |")}
    assert "**-5.0 [-6.5, -3.5]**" in by_run["w/o δ^a"]
    assert by_run["w/o δ^a"].endswith("| worse | agrees |")
    assert by_run["+ W_O"].endswith("| little | agrees |")
    assert by_run["linear spread"].endswith("| worse | the opposite |")
    assert by_run["MEMIT"].endswith("| worse | not told apart from 0 |")
    assert "PMET (the values)" in by_run


def test_a_line_per_method_with_its_own_look(tables):
    table = paper_tables.read(tables, "scaling")
    own = table[(table["model"] == "world") & (table["benchmark"] == "counterfact")]
    ax = plotting.load_lines(own, Figure().subplots(), "S")
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines]
    assert len(set(looks)) == len(looks) == 1 + len(pl.METHODS)
    assert list(ax.lines[1].get_ydata()) == [51.0, 60.0]


def test_a_broken_model_is_marked_where_it_broke(tables):
    table = paper_tables.read(tables, "sequential")
    ax = plotting.step_lines(table[table["model"] == "world"], Figure().subplots(), "ES")
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[40], [40]]


def test_differences_are_drawn_with_their_intervals_and_the_baseline_is_left_out(tables):
    table = paper_tables.read(tables, "ablations")
    ax = plotting.effect_dots(table[table["model"] == "world"], Figure().subplots(), ("S",))
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "w/o δ^a",
        "+ W_O",
        "linear spread",
        "MEMIT",
    ]
    (drawn,) = ax.containers
    assert list(drawn.lines[0].get_xdata()) == [-5.0, 0.5, 4.0, -1.0]


def test_results_of_other_code_are_told_apart(tmp_path, monkeypatch):
    """A change in any room counts, one of the pictures does not."""
    for file in ("__init__.py", "editing/solvers.py", "plotting/plots.py", "bundled/world.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(paper.pl, "__file__", str(tmp_path / "__init__.py"))
    before = paper.code()
    (tmp_path / "plotting/plots.py").write_text("2")
    assert paper.code() == before
    (tmp_path / "editing/solvers.py").write_text("2")
    assert paper.code() != before
