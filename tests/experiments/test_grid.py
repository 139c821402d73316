"""A run is a value: its digest follows from all that its result follows from, and from no more."""

from __future__ import annotations

import dataclasses
import json

import pytest
from grids import CUT, FACTS, HP, OTHERS, tiny_run

import pmet_lens as pl
from pmet_lens.data.facts import FactError
from pmet_lens.editing.method import SettingsError
from pmet_lens.experiments import grid
from pmet_lens.experiments.grid import GridError


@pytest.fixture
def run() -> pl.Run:
    return tiny_run("nowhere")


def test_a_run_is_frozen_and_equal_runs_have_one_digest(run):
    again = tiny_run("nowhere")
    assert run == again
    assert run.digest == again.digest
    assert len(run.digest) == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "elsewhere"},
        {"facts": FACTS[:5]},
        {"facts": FACTS[::-1]},
        {"facts": (dataclasses.replace(FACTS[0], target_new="otherwise"), *FACTS[1:])},
        {"method": "MEMIT"},
        {"method": dataclasses.replace(pl.PMET, spread="linear")},
        {"method": pl.ALPHAEDIT},
        {"method": pl.FT_W, "hparams": pl.FineTuneHparams(layer=1)},
        {"method": None},
        {"hparams": dataclasses.replace(HP, lr=0.3)},
        {"metrics": ("answers", "ability")},
        {"metrics": ("answers", "collateral"), "others": OTHERS},
        {"seed": 1},
        {"n_tokens": 1501},
        {"dtype": "float32"},
        {"template": "{}"},
        {"cut": dataclasses.replace(CUT, targets=3)},
        {"cut": dataclasses.replace(CUT, steps=3)},
        {"group": 2},
        {"metrics": ("generation",), "generate": 2},
        {"metrics": ("ability",), "n_texts": 20},
    ],
)
def test_everything_a_result_follows_from_is_in_the_digest(run, change):
    assert dataclasses.replace(run, **change).digest != run.digest


def test_texts_are_told_apart_by_what_is_in_them(run, tmp_path):
    for name, text in (("a", "one\n"), ("b", "one\n"), ("c", "two\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    a, b, c = (dataclasses.replace(run, texts=str(tmp_path / n)).digest for n in "abc")
    assert a == b
    assert len({a, c, run.digest}) == 3


def test_the_name_is_no_part_of_it(run):
    assert dataclasses.replace(run, name="another").digest == run.digest
    assert run.name == "PMET"
    assert tiny_run("x", method="w/o δ^a").name == "w/o δ^a"
    assert tiny_run("x", method=None).name == "unedited"
    ft = pl.FineTuneHparams(layer=1)
    assert tiny_run("x", method=pl.FineTune(), hparams=ft).name == "FT-W"


def test_known_settings_are_in_the_digest_although_nobody_gave_them():
    run = pl.Run("world", FACTS)
    assert run.hparams == pl.HPARAMS["world"]["PMET"]
    assert run.digest == pl.Run("world", FACTS, "PMET", pl.HPARAMS["world"]["PMET"]).digest
    for name, known in (("FT-W", pl.FT_W.settings("world")), ("MEND", pl.MendHparams())):
        run = pl.Run("world", FACTS, name)
        assert run.hparams == known
        assert run.digest == pl.Run("world", FACTS, name, known).digest
    with pytest.raises(SettingsError, match="no fine-tuning settings for the model 'nowhere'"):
        pl.Run("nowhere", FACTS, "FT-W")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"metrics": ("beauty",)}, GridError, "metrics must be some of answers"),
        ({"metrics": ()}, GridError, "metrics must be some of"),
        ({"others": OTHERS}, GridError, "both or neither"),
        ({"metrics": ("collateral",)}, GridError, "both or neither"),
        ({"n_tokens": 0}, GridError, "n_tokens must be at least 1"),
        ({"group": 0}, GridError, "group must be at least 1"),
        ({"group": 2, "method": None}, GridError, "Groups are of edits"),
        ({"group": 2, "metrics": ("ability",)}, GridError, "Groups are of edits"),
        ({"dtype": "float8"}, GridError, "unknown dtype 'float8'"),
        ({"texts": "no/such/file"}, GridError, "no file of texts"),
        ({"facts": ()}, FactError, "no facts to edit"),
        ({"facts": (), "method": None}, FactError, "no facts to ask for"),
        ({"facts": (*FACTS, FACTS[0])}, FactError, "there twice"),
        ({"method": "PMTE"}, SettingsError, "no method or ablation 'PMTE'"),
        ({"hparams": None}, SettingsError, "no PMET settings for the model 'nowhere'"),
    ],
)
def test_bad_runs_are_refused_when_they_are_made(run, change, error, words):
    with pytest.raises(error, match=words):
        dataclasses.replace(run, **change)


def test_facts_of_different_groups_may_contradict_each_other(run):
    other = dataclasses.replace(FACTS[0], target_new="otherwise")
    assert dataclasses.replace(run, facts=(FACTS[0], other), group=1).edits == 1
    with pytest.raises(FactError, match="contradict"):
        dataclasses.replace(run, facts=(FACTS[0], other), group=2)


def test_a_cut_needs_something_in_every_shard():
    with pytest.raises(GridError, match="at least 1 of answers"):
        pl.Cut(answers=0)
    assert [pl.Cut(tokens=100).parts(n) for n in (1, 100, 101, 10**6)] == [1, 1, 2, 16]


def test_a_run_twice_in_a_grid_is_refused(run):
    other = dataclasses.replace(run, seed=1)
    twice = dataclasses.replace(run, name="again")
    assert grid.check_grid([run, other]) == [run, other]
    with pytest.raises(GridError, match=r"0 \('PMET'\) and 2 \('again'\).*counted twice"):
        grid.check_grid([run, other, twice])
    with pytest.raises(GridError, match="grid is empty"):
        grid.check_grid([])


def test_shards_share_a_grid_out(run):
    runs = [dataclasses.replace(run, seed=i) for i in range(7)]
    shares = [grid.share_of(runs, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(r.seed for own in shares for r in own) == list(range(7))
    assert grid.share_of(runs, None) == runs


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/2", ""])
def test_an_unknown_shard_is_refused(run, shard):
    with pytest.raises(GridError, match="write k/n with k from 1 to n"):
        grid.share_of([run], shard)


def test_a_grid_goes_through_a_file(run, tmp_path):
    runs = [
        run,
        dataclasses.replace(run, method=pl.ALPHAEDIT, name="mine"),
        tiny_run("x", method="MEMIT", metrics=("answers", "collateral"), others=OTHERS),
        tiny_run("x", method=pl.FT_L, hparams=pl.FineTuneHparams(1, norm_constraint=0.1)),
        tiny_run("x", method=pl.MEND, hparams=pl.MendHparams(strength=0.5)),
        tiny_run("x", method=pl.EMMET),
        tiny_run("x", method=None, hparams=None),
    ]
    pl.save_grid(runs, tmp_path / "grid.json")
    again = pl.load_grid(tmp_path / "grid.json")
    assert again == runs
    assert [r.digest for r in again] == [r.digest for r in runs]
    assert [r.name for r in again] == [r.name for r in runs]
    whole = json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))
    assert len(whole["facts"]) == 2  # each list once


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as a grid"),
        ("[]", "cannot be read as a grid"),
        ("{}", "no grid as save_grid writes it"),
        ('{"format": "pmet_lens grid 1"}', "cannot be read as a grid"),
    ],
)
def test_what_is_no_grid_is_refused(tmp_path, text, words):
    path = tmp_path / "grid.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GridError, match=words):
        pl.load_grid(path)
    with pytest.raises(GridError, match="cannot be read as a grid"):
        pl.load_grid(tmp_path / "none.json")


def test_a_method_of_somebody_else_is_not_read_from_a_file(run, tmp_path):
    pl.save_grid([run], tmp_path / "g")
    text = (tmp_path / "g").read_text(encoding="utf-8").replace('"Ridge"', '"os.system"')
    (tmp_path / "g").write_text(text, encoding="utf-8")
    with pytest.raises(GridError, match=r"no 'os\.system' among Method"):
        pl.load_grid(tmp_path / "g")
