"""The study of settings: its grid goes on where it was cut, and what was found is written down."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tune

import pmet_lens as pl

HP = replace(pl.HPARAMS["world"]["MEMIT"], n_steps=2)


@pytest.fixture
def study(tmp_path: Path, monkeypatch) -> tune.Study:
    """Eight held-out facts of `world`, two last layers, two λ; `pl.tune` says the first is best."""
    values = {
        "model": "world", "facts": 2, "tuned_on": 8, "budget": None, "goal": "S", "layers": None,
        "deepest": 4, "texts": None, "tokens": 13_000, "device": "cpu", "fast": False,
        "out": tmp_path, "methods": ("MEMIT",),
    }  # fmt: skip
    space = SimpleNamespace(
        weight="second_moment_weight",
        centre=HP,
        groups=lambda: [HP, replace(HP, layers=(2, 3))],
        scaled=lambda hp, factor: replace(hp, second_moment_weight=10 * factor),
    )
    table = pd.DataFrame({"stage": [0, 1], "score": [50.0, 60.0]})
    found = SimpleNamespace(space=space, table=table, for_edits=lambda n: space.scaled(HP, n / 8))
    monkeypatch.setattr(pl, "tune", lambda *_, **__: found)
    monkeypatch.setattr(tune, "GRID", (1.0, 10.0))
    return tune.Study(argparse.Namespace(**values))


def test_a_grid_tries_every_combination_once(study, capsys, monkeypatch):
    table = study.grid("MEMIT")
    assert list(table["settings"]) == [
        f"layers {layers}, clamp {HP.clamp:.3g}, of {HP.reference_norm}, second_moment_weight {λ}"
        for layers in ("1 2 3", "2 3")
        for λ in (10, 100)
    ]
    assert (table["facts"] == 8).all()
    assert table["mean"].between(0, 100).all()
    assert f"tuned 60.0, best of 4 {table['mean'].max():.1f}" in capsys.readouterr().err

    judged = pd.read_csv(study.folder / "judged_MEMIT.csv")
    assert set(judged["run"]) == {"first guess", "tuned", "best of the grid"}
    same = judged[judged["run"] == "first guess"]  # the planted search found the guess
    assert (same["difference"] == 0).all()
    assert (judged["edits"] == 2).all()

    held_out, edit = study.held_out, study.bench.edit

    def again(trial, facts, *rest):
        assert facts is not held_out, "it was there"
        return edit(trial, facts, *rest)

    monkeypatch.setattr(study.bench, "edit", again)
    pd.testing.assert_frame_equal(study.grid("MEMIT"), table)


def test_a_grid_is_made_without_the_comparison(study, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "Study", lambda args: study)
    monkeypatch.setattr(study, "table", lambda: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(tune, "RESULTS", tmp_path / "results")
    study.args.grid, study.args.record = ["MEMIT"], True
    monkeypatch.setattr("sys.argv", ["tune.py", "--grid", "MEMIT", "--record"])
    tune.main()
    kept = pd.read_csv(tmp_path / "results" / "grid_MEMIT.csv")
    assert len(kept) == 4
    assert set(kept["model"]) == {"world"}
    assert (tmp_path / "results" / "judged_MEMIT.csv").exists()


def test_settings_are_written_for_every_number_of_facts():
    at = lambda n: replace(HP, second_moment_weight=float(n))  # noqa: E731
    found = SimpleNamespace(why="so", spent=80, for_edits=at)
    told = tune.of_sizes(found, (20, 1))
    assert list(told) == ["why", "spent", "1", "20"]
    assert pl.Hparams(**told["20"]) == at(20)


def test_a_table_of_one_model_takes_the_place_of_its_former_one(tmp_path):
    folder, results = tmp_path / "world", tmp_path / "results"
    folder.mkdir()
    (folder / "tune.md").write_text("page", encoding="utf-8")
    for value, names in ((1, ["world", "other"]), (2, ["world"])):
        pd.DataFrame({"model": names, "mean": value}).to_csv(folder / "compared.csv", index=False)
        tune.merge(folder, results, ("compared",), "tune.md")
    kept = pd.read_csv(results / "compared.csv").set_index("model")["mean"]
    assert kept.to_dict() == {"other": 1, "world": 2}
    assert (results / "world.md").read_text(encoding="utf-8") == "page"
