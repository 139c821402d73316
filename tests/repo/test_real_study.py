"""The study on real models, on the bundled ones: pieces are kept and gone on with, tables are those
of the pieces, and the one table of statements says what its files say and no more."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import common
import numpy as np
import pandas as pd
import pytest
import real_figures
import real_pages
import real_rows
import real_study
import real_verdicts

import pmet_lens as pl

RESULTS = Path(__file__).parents[2] / "figures" / "results" / "real"
CUT = ("recall", "trace")


def arguments(out: Path, **more: object) -> argparse.Namespace:
    values = {
        "model": "world", "stages": CUT, "facts": 3, "ablated": 2, "traced": 3, "probed": 40,
        "methods": ("MEMIT", "PMET"), "fast": True, "minutes": 10.0, "counterfact": None,
        "zsre": None, "knowns": None, "texts": None, "tokens": 3000, "layers": (), "deepest": 4,
        "tuned_on": 0, "budget": None, "tuned": None, "out": out,
        "results": None, "go_on": False, "device": "cpu", "goal": "S",
    }  # fmt: skip
    return argparse.Namespace(**{**values, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All stages but the statements, which `study.py`'s tests make, of three facts of `world`."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_study, "SIZES", (1, 3))
        patch.setattr(real_study, "SINGLES", 2)
        patch.setattr(real_study, "ABLATIONS", ("PMET", "w/o δ^a"))
        stages = ("recall", "trace", "gain", "edits", "ablations", "many", "strength")
        assert real_study.Study(arguments(out, stages=stages)).run() == "world: done."
    real_pages.collect(out, out / "results")
    return out


def test_settings_that_were_found_before_are_taken(tmp_path):
    known = pl.HPARAMS["world"]["PMET"]
    at = {str(n): asdict(replace(known, clamp=n / 8)) for n in (1, 20)}
    (tmp_path / "world.json").write_text(json.dumps({"PMET": {"why": "found", "spent": 7, **at}}))
    study = real_study.Study(arguments(tmp_path / "out", tuned=tmp_path))
    assert study.settings("PMET", 20) == replace(known, clamp=20 / 8).fast()
    assert study.settings("PMET", 3) == replace(known, clamp=1 / 8).fast()
    assert study.found_before("MEMIT") is None
    table = real_pages.settings(tmp_path / "out" / "world")  # `tune.py` does not say how long
    assert list(table["edits"]) == [1, 20]


def test_a_study_that_was_cut_goes_on(folder, monkeypatch):
    def made(*_: object, **__: object) -> None:
        pytest.fail("it was there")

    with pytest.raises(pl.DataError, match="other options"):
        real_study.Study(arguments(folder, tuned_on=8))
    for name in ("causal_trace", "delta_losses", "arrival", "evaluate", "general_ability"):
        monkeypatch.setattr(pl, name, made)
    monkeypatch.setattr(real_study, "SIZES", (1, 3))
    study = real_study.Study(arguments(folder, stages=("recall", "trace", "gain", "edits")))
    assert study.run() == "world: done."


def test_a_study_stops_when_its_minutes_are_over_or_its_program_is_gone(tmp_path, monkeypatch):
    study = real_study.Study(arguments(tmp_path, minutes=0.0))
    assert "the time is over at recall; a later run goes on" in study.run()
    study.end = float("inf")
    monkeypatch.setattr(real_study, "left_alone", lambda: True)
    assert "a later run goes on" in study.run()
    assert not list(tmp_path.glob("world/*.csv"))


def test_the_tables_are_those_of_the_pieces(folder):
    scores = common.read(folder, "edits")
    both = {"MEMIT", "PMET", real_study.ALONE}
    assert set(scores["run"]) == {"unedited", *both, *(m + real_study.PUBLISHED for m in both)}
    assert set(scores["edits"]) == {0, 1, 3}
    rows = common.read(folder / "world", "rows 3 PMET")
    own = scores[(scores["run"] == "PMET") & (scores["edits"] == 3)].set_index("metric")
    assert own.loc["ES", "mean"] == pl.summarise(rows).loc["ES", "mean"]
    world, names = folder / "world", [f"3 {m}" for m in real_rows.by_steps("MEMIT")[::2]]
    memit = real_pages.at_best({n: common.read(world, f"rows {n}") for n in names}, "3 MEMIT")
    both = [100 * common.read(world, f"others {n}")["correct"] for n in (memit, "3 PMET")]
    assert own.loc["collateral", "difference"] == pytest.approx(
        (both[1] - both[0]).mean(), abs=1e-3
    )
    assert {"EF", "perplexity", "KL"} <= set(own.index)
    arrival = common.read(folder, "arrival")
    nothing = arrival[(arrival["written"] == 0) & arrival["quantity"].isin(["delta", "output"])]
    assert len(nothing) == 2 * len(real_study.GAINS)
    assert (nothing["mean"] == 0).all()
    losses = common.read(folder, "losses")
    pmet = losses[losses["method"] == "PMET"].set_index("added")["mean"]
    assert pmet["all"] < min(pmet["attn_out"], pmet["mlp_out"]) < pmet["nothing"]
    ablated = common.read(folder, "ablations")
    assert set(ablated["edits"]) == {2}
    assert {"PMET", "w/o δ^a", "the last critical layer only"} <= set(ablated["run"])
    assert common.read(folder / "results", "edits").equals(scores)


def test_held_back_more_an_edit_reaches_less(folder):
    """Once the strength is the edit itself; ten times lets less through than a tenth."""
    table = common.read(folder, "strength")
    factors = sorted((*real_study.FACTORS, 1.0))
    for name in (m + steps for m in ("MEMIT", "PMET") for steps in ("", real_study.PUBLISHED)):
        own = table[table["run"] == name]
        assert list(dict.fromkeys(own["factor"])) == factors
        wide = own.pivot(index="factor", columns="metric", values="mean")
        edits = common.read(folder, "edits")
        edit = edits[(edits["run"] == name) & (edits["edits"] == 3)].set_index("metric")["mean"]
        for metric in ("S", "NS", "collateral"):
            assert wide.loc[1.0, metric] == edit[metric]
        assert wide.loc[0.1, "collateral"] <= wide.loc[10.0, "collateral"]
    rows = {
        f: common.read(folder / "world", f"held 3 MEMIT, published steps × {f:g}")
        for f in (0.1, 10.0)
    }
    margins = [own.loc[own["kind"] == "rewrite", "margin"].mean() for own in rows.values()]
    assert margins[0] > margins[1]


def test_what_is_released_takes_the_published_steps(folder):
    """Whatever steps the edits take."""
    study = real_study.Study(arguments(folder))
    known = pl.HPARAMS["world"]["PMET"]
    assert study.released("PMET").n_steps == known.n_steps > study.guess("PMET").n_steps
    changed = {k for k, v in asdict(known.fast()).items() if v != asdict(known)[k]}
    assert changed == set(real_study.STEPS)
    own = study.settings("PMET" + real_study.PUBLISHED, 3)
    assert own.fast() == study.settings("PMET", 3)
    assert all(getattr(own, field) == getattr(known, field) for field in changed)


def test_on_a_real_model_published_steps_are_those_of_each_method(tmp_path):
    """Of a model without settings of its own, whose first guess is a fast one."""
    study = object.__new__(real_study.Study)
    study.args, study.bundled = arguments(tmp_path), False
    study.folder, study.layers = tmp_path, (2, 3)
    for name, steps, lr in (("MEMIT", 25, 0.5), ("PMET", 30, 0.2)):
        tuned = pl.Hparams((1, 2), clamp=0.5).settled(pl.named(name), 100).fast()
        whole = json.dumps({"100": asdict(tuned)} | {"1": asdict(tuned)})
        (tmp_path / f"tuned {name}.json").write_text(whole, encoding="utf-8")
        assert study.guess(name).n_steps == study.settings(name, 100).n_steps == 10
        found = study.settings(name + real_study.PUBLISHED, 100)
        assert (found.n_steps, found.lr, found.step_rule) == (steps, lr, "Adam")
        assert found.prefixes_per_step is None
        assert found.fast() == tuned


def test_methods_are_paired_with_memit_at_its_best_and_ablations_by_the_same_steps(folder):
    found, world = common.read(folder, "edits"), folder / "world"
    found = found[found["edits"] == 3].set_index(["run", "metric"])
    scores = {m: found.loc[(m, "S"), "mean"] for m in real_rows.by_steps("MEMIT")[::2]}
    memit = max(scores, key=lambda m: scores[m])
    for run in set(found.index.get_level_values("run")) - {memit, "unedited"}:
        gap = found.loc[(run, "NS"), "mean"] - found.loc[(memit, "NS"), "mean"]
        assert found.loc[(run, "NS"), "difference"] == pytest.approx(gap, abs=1e-3)
    assert np.isnan(found.loc[(memit, "NS"), "difference"])
    run = "w/o δ^a" + real_study.PUBLISHED
    pieces = (f"ablation 2 {name}{real_study.PUBLISHED}" for name in ("w/o δ^a", "PMET"))
    paths = [real_pages.path_of(world, piece) for piece in pieces]
    mine, other = (pl.summarise(common.read(path.parent, path.stem)) for path in paths)
    ablated = common.read(folder, "ablations")
    row = ablated[(ablated["run"] == run) & (ablated["metric"] == "NS")].iloc[0]
    gap = mine.loc["NS", "mean"] - other.loc["NS", "mean"]
    assert row["difference"] == pytest.approx(gap, abs=1e-3)


@pytest.mark.parametrize("best", ["", real_study.PUBLISHED])
def test_the_steps_that_serve_pmet_best_decide(tmp_path, best):
    def run(name: str, mean: float, gap: float) -> dict[str, object]:
        ends = dict(zip(real_pages.DIFFERENCE, (gap, gap - 2, gap + 2), strict=True))
        return {"model": "gemma-3-270m", "benchmark": "facts", "edits": 100, "run": name,
                "metric": "S", "mean": mean, **ends}  # fmt: skip

    rows = []
    for steps in ("", real_study.PUBLISHED):
        mean, gap = (80.0, -5.0) if steps == best else (70.0, 5.0)
        rows += [run("PMET" + steps, mean, gap), run("w/o δ^a" + steps, 90.0, gap)]
    planted(tmp_path, edits=rows, ablations=rows)
    page = real_verdicts.page(tmp_path)
    for begins in ("PMET beats MEMIT over all", "Without δ^a"):
        assert "−5.0 [−7.0, −3.0]" in line(page, begins)[3]


def test_runs_say_their_steps_where_fast_ones_are_drawn():
    def said(*runs: str) -> list[str]:
        return list(real_figures.said_by_steps(pd.DataFrame({"run": runs}))["run"])

    assert said("PMET", "PMET, published steps") == ["PMET, fast steps", "PMET"]
    assert said("PMET", "PMET, fast steps") == ["PMET", "PMET, fast steps"]
    assert said("PMET") == ["PMET"]


def test_recorded_gains_are_not_made_again(folder, tmp_path):
    made = dict(common.read(folder, "losses").groupby(["settings", "method"]).size())
    study = real_study.Study(arguments(tmp_path, go_on=True, results=folder / "results"))
    found = {name for name in study.elsewhere if name.startswith("losses ")}
    assert found == {f"losses {kind} {method}" for kind, method in made} != set()
    assert len(study.gains_elsewhere()) == 3 * len(found)
    assert not real_study.Study(arguments(tmp_path)).elsewhere
    nowhere = arguments(tmp_path, go_on=True, results=tmp_path / "nowhere")
    assert not real_study.Study(nowhere).elsewhere


def test_each_edited_alone_is_one_row_per_fact(folder):
    rows = common.read(folder / "world", "rows 1 MEMIT")
    assert list(rows["fact"].unique()) == [0, 1]
    assert (rows.loc[rows["kind"] == "rewrite", "correct"] == 1).all()


def test_the_page_shows_every_table_there_is(folder):
    text = (folder / "study.md").read_text(encoding="utf-8")
    for title in ("What the models recall", "What each delta does alone", "Edits", "Ablations"):
        assert f"**{title}**" in text
    assert "**The statements**" not in text
    assert "| world | PMET | released | mlp_out |" in text


def test_rows_replace_what_they_make_again_alone(tmp_path):
    """Another model stays, and so does what this run did not make of the same model."""

    def table(*rows: tuple[str, int, str, int]) -> pd.DataFrame:
        return pd.DataFrame(rows, columns=["model", "edits", "run", "x"]).assign(benchmark="facts")

    old = table(("b", 1, "PMET", 2), ("b", 20, "PMET", 3), ("a", 1, "PMET", 1))
    old.to_csv(tmp_path / "edits.csv", index=False)
    found = real_pages.with_others(table(("b", 1, "PMET", 4)), tmp_path, "edits")
    wanted = table(("a", 1, "PMET", 1), ("b", 1, "PMET", 4), ("b", 20, "PMET", 3))
    pd.testing.assert_frame_equal(found, wanted)
    other_way = table(("b", 1, "PMET", 4))[[*wanted.columns[::-1]]].assign(more=1)
    found = real_pages.with_others(other_way, tmp_path, "edits")
    assert list(found) == [*wanted.columns, "more"]


def test_every_stage_says_when_it_was_made(folder, tmp_path):
    made = common.read(folder, "made")
    stages = ["recall", "trace", "gain", "edits", "ablations", "strength"]
    assert list(made["stage"]) == stages
    earlier = pd.DataFrame({"stage": ["claims"], "made": "1999", "model": "world"})
    earlier.to_csv(tmp_path / "made.csv", index=False)
    real_pages.collect(folder, tmp_path)
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert "\nworld, claims: 1999\n" in page
    assert made["made"].nunique() == 1
    assert page.count(made["made"].iloc[0]) == 1
    took = real_pages.seconds(folder / "world")
    assert made["minutes"].sum() == pytest.approx(sum(took.values()) / 60, rel=1e-3)
    for stage, minutes in zip(made["stage"], made["minutes"], strict=True):
        assert minutes > 0
        assert f"{stage} ({minutes:.1f} minutes)" in page


def test_what_was_made_twice_took_both_times(tmp_path):
    lines = "rows 1 MEMIT\t2.5\nheld 100 PMET × 3\t4.0\nrows 1 MEMIT\t1.5\n"
    (tmp_path / real_pages.SECONDS).write_text(lines, encoding="utf-8")
    assert real_pages.seconds(tmp_path) == {"rows 1 MEMIT": 4.0, "held 100 PMET × 3": 4.0}
    assert real_pages.seconds(tmp_path / "nothing") == {}
    stages = {
        "rows 1 MEMIT": "edits",
        "free 300 PMET": "many",
        "ability 300 unedited": "edits",
        "held 100 PMET × 3": "strength",
        "rows 100 PMET, published steps": "strength",
    }
    assert [real_pages.stage_of(name) for name in stages] == [*stages.values()]


def test_the_stage_of_many_facts_is_told_from_the_edits():
    few, many = ("rows 300 unedited", "rows 100 PMET", "zsre 100 PMET"), ("free 300 PMET",)
    assert real_pages.stages(dict.fromkeys(few)) == ["edits"]
    assert real_pages.stages(dict.fromkeys(("recall x", few[0], *many))) == ["recall", "many"]
    assert real_pages.stages(dict.fromkeys((*many, *few))) == ["edits", "many"]


def test_what_was_refused_and_is_made_now_is_no_longer_said_to_be(folder, tmp_path):
    rows = [("rows 3 PMET", "no", "world"), ("rows 9 PMET", "no", "world"),
            ("rows 3 PMET", "no", "other")]  # fmt: skip
    old = pd.DataFrame(rows, columns=["piece", "why", "model"])
    old.to_csv(tmp_path / "refused.csv", index=False)
    real_pages.collect(folder, tmp_path)
    pd.testing.assert_frame_equal(
        common.read(tmp_path, "refused"), old.iloc[1:].reset_index(drop=True)
    )


def test_what_could_not_be_is_a_line_for_all_that_is_measured_of_it():
    pieces = ("rows 100 EMMET", "rows 20 EMMET", "free 100 EMMET", "zsre 90 ROME", "tuning")
    table = pd.DataFrame({"piece": pieces, "why": "no", "model": "m"})
    table.loc[1, "why"] = "never"
    table.loc[len(table)] = ("rows 300 EMMET", "no", "m")
    assert real_pages._refused(table)[2:] == [
        "| m | EMMET | 100, 300 | no |",
        "| m | EMMET | 20 | never |",
        "| m | ROME | 90 | no |",
        "| m | tuning |  | no |",
    ]


def test_a_method_that_is_measured_elsewhere_is_paired_with_those_that_were(folder, tmp_path):
    """PMET here, MEMIT in an earlier run: the tables are those of one run with both."""
    first, second, results = tmp_path / "a", tmp_path / "b", tmp_path / "results"
    for out, left_out in ((first, "PMET"), (second, "MEMIT")):
        shutil.copytree(folder / "world", out / "world")
        for path in (out / "world").glob("*.csv"):
            if path.stem.split(" ")[0] in real_rows.KINDS and left_out in path.stem:
                path.unlink()
        real_pages.collect(out, results)
    keys = ["benchmark", "edits", "run", "metric"]
    both = (
        common.read(where, "edits").sort_values(keys, ignore_index=True)
        for where in (results, folder)
    )
    pd.testing.assert_frame_equal(*both, rtol=1e-3, atol=0.01)  # margins are kept to 4 digits
    kept = real_rows.stored(results, "world", (folder / "world" / "identity.txt").read_text())
    assert {"rows 3 MEMIT", "rows 3 PMET", "ability 3 PMET"} <= set(kept)
    words = pd.read_csv(real_rows.path_of(results, "world")).select_dtypes(exclude="number")
    assert set(words) == {"piece", "kind", "metric"}  # no prompt, no answer
    assert real_rows.stored(results, "world", "other facts") == {}


def test_what_was_recorded_elsewhere_is_not_made_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(real_study, "SIZES", (1, 3))
    recorded = {"stages": ("edits",), "go_on": True, "results": folder / "results"}
    study = real_study.Study(arguments(tmp_path, **recorded))
    made: list[str] = []
    monkeypatch.setattr(study, "piece", lambda name, make: made.append(name))
    study.run()
    assert not made
    study.elsewhere -= {"rows 3 PMET", "arrival released MEMIT"}
    study.run()
    assert made == ["rows 3 PMET", "arrival released MEMIT"]


def test_rows_of_other_facts_are_replaced(tmp_path):
    one = pd.DataFrame({"fact": [0], "kind": ["rewrite"], "correct": [1.0]})
    real_rows.store(tmp_path, "m", "x", {"rows 1 PMET": one, "recall y": one})
    assert set(real_rows.stored(tmp_path, "m", "x")) == {"rows 1 PMET"}
    real_rows.store(tmp_path, "m", "z", {"rows 1 MEMIT": one})
    assert real_rows.stored(tmp_path, "m", "x") == {}
    found = real_rows.stored(tmp_path, "m", "z")["rows 1 MEMIT"]
    pd.testing.assert_frame_equal(found, one, check_dtype=False)


def test_tuned_settings_are_read_again(folder, monkeypatch):
    """The settings of the number of facts, λ in proportion."""
    study = real_study.Study(arguments(folder))
    study.args.tuned_on, study.args.fast = 8, False
    way = pl.Hparams((1, 2), second_moment_weight=8.0, clamp=0.5).settled(pl.PMET)

    class Found:
        why, spent = "because", 7

        @staticmethod
        def for_edits(n: int) -> pl.Hparams:
            return pl.Hparams(**{**vars(way), "second_moment_weight": float(n)})

    monkeypatch.setattr(pl, "tune", lambda *_, **__: Found())
    try:
        for n in (3, 100):  # the second of the first one's file
            found = study.settings("PMET", n)
            assert (found.second_moment_weight, found.layers, found.clamp) == (n, (1, 2), 0.5)
        monkeypatch.setattr(pl, "tune", None)
        assert study.settings("PMET", 3).second_moment_weight == 3
        table = real_pages.settings(folder / "world")
        assert set(table["method"]) == {"PMET"}
        assert table.set_index("edits").loc[100, "spent"] == 7
    finally:
        (folder / "world" / "tuned PMET.json").unlink()


def test_tuned_deltas_are_looked_at_by_either_steps(tmp_path):
    study = real_study.Study(arguments(tmp_path))
    before = [name for name, _ in study.gain()]
    assert not list(study.gain(study.other_steps))
    whole = json.dumps({"3": asdict(pl.HPARAMS["world"]["PMET"]), "1": {}})
    (study.folder / "tuned PMET.json").write_text(whole, encoding="utf-8")
    more = [name for name, _ in study.gain() if name not in before]
    more += [name for name, _ in study.gain(study.other_steps)]
    kinds = ("tuned PMET", "tuned PMET, published steps")
    assert more == [f"{look} {kind}" for kind in kinds for look in ("losses", "arrival", "answers")]


def test_facts_are_asked_in_several_phrasings_that_the_model_recalls():
    model = pl.load("world")
    facts = pl.recalled(model, pl.counterfact(n=12))
    found = real_study.phrased(model, facts)
    assert [f.subject for f in found] == [f.subject for f in facts]
    assert {f.prompt for f in found} != {f.prompt for f in facts}
    assert len(pl.recalled(model, found)) == len(facts)


def test_subjects_with_several_facts_come_first():
    facts = [pl.Fact(subject, "{} is", "b") for subject in "ABCDBEF"]
    assert [f.subject for f in real_study.of_several(facts, 4)] == ["B", "B", "A", "D"]
    assert [f.subject for f in real_study.of_several(facts, 2)] == ["B", "B"]


def test_a_model_that_is_not_fetched_is_left_out_in_words(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "nobody", "--out", str(tmp_path)])
    real_study.main()
    assert (
        "nobody is left out; pmet-lens models --fetch nobody brings it." in capsys.readouterr().err
    )


# -- the one table --------------------------------------------------------------------------------


def planted(folder: Path, **tables: list[dict[str, object]]) -> None:
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)


def line(text: str, begins: str) -> list[str]:
    """The cells of the four models and the verdict."""
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {begins}")]
    return found.strip("| ").split(" | ")[1:]


def test_without_files_nothing_is_measured_on_real_models(tmp_path):
    text = real_verdicts.page(tmp_path)
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == len(real_verdicts.STATEMENTS)
    for row in rows:
        assert row.strip("| ").split(" | ")[3:5] == ["not measured"] * 2
    assert line(text, "FFN's share is enough")[-1] == "not measured"
    assert line(text, "Where the heads look")[0] == "holds: 0.73 against 0.58"


def test_the_statements_are_those_of_the_study():
    known = set(common.read(RESULTS.parent, "claims")["statement"])
    assert known == {words for words, _ in real_verdicts.CLAIMED}


def test_a_difference_decides_only_beyond_its_interval(tmp_path):
    def run(name: str, gap: tuple[float, float, float]) -> dict[str, object]:
        ends = dict(zip(real_pages.DIFFERENCE, gap, strict=True))
        return {"model": "smollm2-135m", "benchmark": "facts", "edits": 100, "run": name,
                "metric": "S", "mean": 80.0, **ends}  # fmt: skip

    edits = [run("MEMIT", (np.nan,) * 3), run("PMET", (-3.0, -5.0, -1.0))]
    ablations = [run("linear spread", (2.0, -1.0, 4.0)), run("+ W_O", (-9.0, -12.0, -6.0))]
    planted(tmp_path, edits=edits, ablations=ablations)
    text = real_verdicts.page(tmp_path)
    assert line(text, "PMET beats MEMIT over all")[2] == "does not hold: −3.0 [−5.0, −1.0]"
    assert line(text, "With the linear spread")[2] == "open: +2.0 [−1.0, +4.0]"
    assert line(text, "Writing MHSA's weights")[2] == "holds: −9.0 [−12.0, −6.0]"


def test_a_share_of_the_gain_is_that_of_the_losses(tmp_path):
    nll = {"nothing": 10.0, "attn_out": 6.0, "mlp_out": 4.0, "all": 0.0}
    rows = [
        {"model": "gemma-3-270m", "method": "PMET", "settings": "released", "added": a, "mean": v}
        for a, v in nll.items()
    ]
    planted(tmp_path, losses=rows)
    cells = line(real_verdicts.page(tmp_path), "FFN's share is enough")
    assert cells[3] == "does not hold: 0.60 (NLL 4.00 against 0.00)"
    assert cells[-1] == "**does not hold**"
    planted(tmp_path, losses=[row | {"method": "PMET, fast steps"} for row in rows])
    assert line(real_verdicts.page(tmp_path), "FFN's share is enough")[3] == "not measured"


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (["holds", "open", "not measured"], "**holds**"),
        (["holds", "does not hold"], "**differs**"),
        (["open", "not measured"], "**open**"),
        (["not measured"] * 2, "not measured"),
    ],
)
def test_the_verdict_is_that_of_all_models_that_say_something(told, verdict):
    assert real_verdicts.verdict(told) == verdict


@pytest.mark.parametrize("name", ["verdicts", "study", "methods", "known/methods"])
def test_the_committed_pages_are_those_of_the_committed_tables(name):
    made = {"verdicts": real_verdicts.page, "study": real_pages.page, "methods": real_pages.methods}
    page = RESULTS / f"{name}.md"
    assert page.read_text(encoding="utf-8") == made[page.stem](page.parent)


def test_a_run_on_known_facts_is_kept_by_itself(tmp_path):
    out, results = tmp_path / "out", tmp_path / "known"
    out.mkdir()
    rows = [
        {"model": "m", "benchmark": "facts", "edits": 100, "run": "PMET", "metric": "S",
         **dict.fromkeys([*real_pages.INTERVAL, *real_pages.DIFFERENCE], 70.0)}
    ]  # fmt: skip
    planted(out, edits=rows, trace=rows)
    results.mkdir()
    (results / "refused.csv").write_text("of a run before\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no edits of a run"):
        real_pages.keep_known(tmp_path / "nowhere", results)
    assert (results / "refused.csv").exists()  # nothing is lost
    real_pages.keep_known(out, results)
    assert sorted(p.name for p in results.iterdir()) == ["edits.csv", "methods.md"]
    assert "| m | PMET | 70.0" in (results / "methods.md").read_text(encoding="utf-8")


def test_a_method_is_told_by_the_steps_that_serve_it_best(tmp_path):
    rows = [
        {"model": "m", "benchmark": "facts", "edits": n, "run": run, "metric": metric, "mean": mean,
         "ci_low": mean - 1, "ci_high": mean + 1, **dict.fromkeys(real_pages.DIFFERENCE, gap)}
        for n, run, mean, gap in (
            (0, "unedited", 20.0, np.nan), (100, "PMET", 70.0, -5.0),
            (100, "PMET, published steps", 75.0, -1.0), (100, "MEMIT", 76.0, np.nan),
            (100, "MEMIT, published steps", 71.0, -5.0), (20, "PMET", 99.0, 9.0),
        )
        for metric in ("S", "EA")
    ]  # fmt: skip
    planted(tmp_path, edits=rows)
    lines = [row for row in real_pages.methods(tmp_path).splitlines() if row.startswith("| m ")]
    assert [row.split(" | ")[1] for row in lines] == ["unedited", "PMET, published steps", "MEMIT"]
    assert lines[1].startswith("| m | PMET, published steps | 75.0 [74.0, 76.0] | 75 [74, 76] |")
    assert lines[1].endswith("| -1.0 [-1.0, -1.0] |")
    assert lines[2].endswith("|  |")
    assert "No real model" in real_pages.methods(tmp_path / "nowhere")


def test_spans():
    assert real_pages.spans([3, 1, 2, 7, 9, 10]) == "1–3, 7, 9–10"
