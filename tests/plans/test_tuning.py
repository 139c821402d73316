"""Settings by measurement: what is planted is found, what cannot be told apart is said to be so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from cases import CONTEXTS, some_moments
from cases import one_tail as one_tail
from kept import shared_model
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import plotting
from pmet_lens.editing import targets as targeting
from pmet_lens.models import generation
from pmet_lens.models.model import Site
from pmet_lens.plans import goals, search, tuning
from pmet_lens.plans.goals import Judge, Seen
from pmet_lens.plans.search import stages
from pmet_lens.plans.spaces import Space

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:The model recalls only")
HP = pl.Hparams(layers=(0, 1), n_steps=2, clamp=1.0, second_moment_weight=10.0).settled(pl.PMET)
NAMES = ("Mira", "Danel", "Ilmar", "Kel", "Ostria", "Vell", "Tolan", "Orrin")


def facts_of(n: int, start: int = 0) -> list[pl.Fact]:
    pairs = [f"{a} {b}" for a in NAMES for b in NAMES if a != b][start : start + n]
    return [
        pl.Fact(
            name,
            "{} plays the sport of",
            "rugby",
            "tennis",
            (f"The sport of {name} is",),
            (("Mira plays the sport of", "tennis"),),
            relation="sport",
        )
        for name in pairs
    ]


FACTS, LATER = facts_of(10), facts_of(3, 30)


@pytest.fixture(scope="module", autouse=True)
def two_prefixes():
    """As many as a statement about settings needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "sample_contexts", lambda *_, **__: list(CONTEXTS))
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> pl.Bench:
    return new_bench(tmp_path_factory.mktemp("bench"))


def new_bench(folder: Path) -> pl.Bench:
    model = shared_model("gpt2", torch.float64)
    moments = some_moments(model)
    moments[Site(0, "mlp")] = moments[Site(1, "mlp")]  # what they hold does not matter here
    known = {pl.FT_W: pl.FineTuneHparams(layer=1, n_steps=2)}
    return pl.Bench(model, folder, moments=moments, hparams=lambda m: known.get(m, HP))


def plant(monkeypatch, score: Any, right: Any = None) -> list[tuple[Any, int]]:
    """Every setting gives `score(hparams, fact number)`, and harms as `right(hparams)` says.
    Returns the settings and numbers of facts asked for."""
    asked: list[tuple[Any, int]] = []

    def see(self: Judge, trial: pl.Trial, facts: Any, targets: Any) -> Seen:
        hp = trial.hparams
        asked.append((hp, len(facts)))
        per_fact = [score(hp, i) for i in range(len(facts))]
        table = pd.DataFrame(dict.fromkeys(("ES", "PS", "NS"), per_fact))
        rest = () if right is None else tuple(right(hp))
        return Seen(table, rest)

    monkeypatch.setattr(Judge, "see", see)
    return asked


def all_known(_: pl.Model, facts: list[pl.Fact], **__: object) -> pd.DataFrame:
    return pd.DataFrame({"correct": [1.0] * len(facts)})


# -- what is planted is found ---------------------------------------------------------------------


def test_the_planted_best_is_found_and_the_bad_are_dropped_early(bench, monkeypatch):
    """The best: last layer 2, λ 100 for ten facts, twice the clamp. Absurd: λ 1, layer 0."""

    def score(hp, i):
        # λ per fact does not depend on the number of facts.
        wrong = abs(math.log10(hp.second_moment_weight / state["n"] / 10.0))
        return 95 - 20 * wrong - 30 * abs(hp.layers[-1] - 2) - 10 * (hp.clamp != 2) - i % 3

    state = {"n": 0}
    asked = plant(monkeypatch, score)
    see = Judge.see

    def heard(self, trial, facts, targets):
        state["n"] = len(facts)
        return see(self, trial, facts, targets)

    monkeypatch.setattr(Judge, "see", heard)
    found = pl.tune(bench, FACTS, "PMET", budget=100)
    assert found.hparams.layers[-1] == 2
    assert found.hparams.clamp == 2
    assert found.hparams.second_moment_weight == pytest.approx(100.0)
    assert found.hparams.n_steps == HP.n_steps
    table = found.table
    first, last = (table[table["stage"] == stage] for stage in (0, table["stage"].max()))
    bad = first["layers"].str.endswith("0") & ~first["guess"]
    assert bad.any()
    assert not last["layers"].str.endswith("0").any()
    assert (last["second_moment_weight"][~last["guess"]] >= 50).all()
    assert {n for _, n in asked} == {5, 10}
    assert "The first guess is" in found.why
    assert "cannot tell apart" not in found.why
    assert "largest or smallest that was tried" in found.why  # λ 100 is ten times the guess
    assert table["chosen"].sum() == 1
    assert last["guess"].sum() == 1
    best = table[table["chosen"]].iloc[0]
    assert (best[["difference", "difference_low", "difference_high"]] == 0).all()
    guess = last[last["guess"]].iloc[0]
    assert guess["told"]
    assert guess["difference_high"] < 0


def test_settings_that_cannot_be_told_apart_are_said_to_be_so(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 90 - i % 4)
    found = pl.tune(bench, FACTS, "MEMIT")
    assert len(found.ties) > 0
    assert not found.ties["told"].any()
    assert "Not to be told from it" in found.why
    assert "That is the first guess itself" in found.why  # at equal score the guess stands first
    assert found.hparams == HP
    assert "that was tried: there may be better" not in found.why


def test_a_learning_rate_beyond_which_nothing_was_tried_is_told(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 90 - 1e3 * abs(hp.lr - 10 * pl.FineTuneHparams(layer=1).lr))
    found = pl.tune(bench, FACTS, "FT-W", budget=100)
    assert found.hparams.lr == 10 * pl.FineTuneHparams(layer=1).lr
    assert "largest or smallest that was tried" in found.why
    plant(monkeypatch, lambda hp, i: 90 - i % 4)
    assert "that was tried: there may" not in pl.tune(bench, FACTS, "ROME").why


def test_a_difference_within_the_spread_of_facts_is_a_tie(bench, monkeypatch):
    """Four points better on average, but far worse for some facts."""
    noise = np.random.default_rng(0).normal(0, 30, 10)
    plant(monkeypatch, lambda hp, i: 50 + (4 + noise[i] if hp.clamp == 2 else 0))
    found = pl.tune(bench, FACTS, "PMET", goal="ES")
    assert "which these facts cannot tell apart" in found.why or "guess itself" in found.why


def test_a_floor_comes_before_the_score(bench, monkeypatch):
    """The smaller λ the better the edit, and the more else is lost."""
    low = HP.second_moment_weight
    plant(
        monkeypatch,
        lambda hp, i: 95 - 5 * math.log10(hp.second_moment_weight),
        lambda hp: [100] * 9 + [0 if hp.second_moment_weight < low / 4 else 100],
    )
    monkeypatch.setattr(goals.scoring, "recall", all_known)
    free = pl.tune(bench, FACTS, "MEMIT", others=LATER)
    held = pl.tune(bench, FACTS, "MEMIT", goal=pl.Goal(collateral=95), others=LATER)
    assert free.hparams.second_moment_weight == pytest.approx(low / 10)
    assert held.hparams.second_moment_weight > low / 4
    assert held.table.loc[held.table["chosen"], "collateral"].iloc[0] == 100
    assert "at least 95 % of the other facts" in held.why
    under = held.table[held.table["missed"] > 0]
    assert len(under) > 0
    assert under["told"].all()  # under the floor is no tie, however good the score
    none = pl.tune(bench, FACTS, "MEMIT", goal=pl.Goal(collateral=100), others=LATER)
    assert none.table.loc[none.table["chosen"], "missed"].iloc[0] == 0


def test_a_floor_that_nothing_meets_is_said(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 50.0, lambda hp: [100, 0])
    monkeypatch.setattr(goals.scoring, "recall", all_known)
    found = pl.tune(bench, FACTS, "MEMIT", goal=pl.Goal(collateral=95), others=LATER)
    assert "No setting meets the floor" in found.why
    assert "45.0 short" in found.why


def test_a_setting_without_an_edit_is_out(bench, monkeypatch):
    """A singular second moment, as in parallel blocks at layer 0."""
    real = pl.Bench.edit

    def edit(self, trial, facts, targets=None):
        if 0 in trial.hparams.layers:
            raise pl.SolveError("not positive definite")
        return real(self, trial, facts, targets)

    monkeypatch.setattr(pl.Bench, "edit", edit)
    found = pl.tune(bench, FACTS[:8], "PMET", goal="EA")
    assert 0 not in found.hparams.layers
    assert found.table["failed"].str.contains("positive definite").any()
    assert "The first guess gives no edit" in found.why


# -- kept, cut, counted ---------------------------------------------------------------------------


def same(one: pl.Tuned, other: pl.Tuned) -> bool:
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    return (one.hparams, one.why, one.spent) == (other.hparams, other.why, other.spent)


@pytest.mark.slow
def test_kept_targets_change_nothing_and_a_cut_run_goes_on(tmp_path, monkeypatch):
    calls: list[int] = []
    real = targeting.optimise

    def counted(model, facts, *args, **more):
        calls.append(len(facts))
        return real(model, facts, *args, **more)

    monkeypatch.setattr(targeting, "optimise", counted)
    whole = pl.tune(new_bench(tmp_path / "a"), FACTS, "PMET", goal="EA")
    # λ and the layers below the last cost no targets, and no fact is optimised twice.
    assert sum(calls) == whole.spent <= whole.budget == 4 * len(FACTS)
    assert len(whole.table) > 2 * whole.spent / len(FACTS)
    calls.clear()
    again = pl.tune(new_bench(tmp_path / "a"), FACTS, "PMET", goal="EA")
    assert calls == []
    assert same(again, whole)
    edit, left = pl.Bench.edit, [5]

    def cut(self, *args):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return edit(self, *args)

    monkeypatch.setattr(pl.Bench, "edit", cut)
    with pytest.raises(KeyboardInterrupt):
        pl.tune(new_bench(tmp_path / "b"), FACTS, "PMET", goal="EA")
    monkeypatch.setattr(pl.Bench, "edit", edit)
    before = sum(calls)
    assert 0 < before < whole.spent
    assert same(pl.tune(new_bench(tmp_path / "b"), FACTS, "PMET", goal="EA"), whole)
    assert sum(calls) == whole.spent


def test_a_model_without_a_bench_is_tuned_too(tmp_path, monkeypatch):
    model = shared_model("gpt2", torch.float64)
    moments = {Site(n, "mlp"): some_moments(model)[Site(1, "mlp")] for n in range(3)}
    monkeypatch.setattr(tuning.EditInputs, "moments", lambda self, sites: moments)
    plain = pl.tune(model, FACTS[:8], "PMET", goal="EA", hparams=HP)
    kept = pl.tune(model, FACTS[:8], "PMET", goal="EA", hparams=HP, folder=tmp_path)
    assert same(plain, kept)
    assert (tmp_path / "targets").is_dir()
    assert "the settings given" in plain.why


def test_fast_steps_search_and_the_published_ones_confirm(bench):
    found = pl.tune(bench, FACTS, "PMET", goal="EA", fast=True)
    assert found.table["stage"].iloc[-1] == "published"
    assert found.hparams.step_rule == "Adam"
    assert found.hparams.n_steps == HP.n_steps
    assert "confirmed with the method's own" in found.why
    assert found.spent <= found.budget


def test_a_guess_with_fast_steps_leaves_nothing_to_confirm(bench):
    """What a confirmation would cost is spent on more settings."""
    guess = pl.Trial("PMET", hparams=HP.fast())
    found = pl.tune(bench, FACTS, guess, goal="EA", fast=True)
    assert "published" not in set(found.table["stage"])
    assert "confirmed" not in found.why
    assert found.hparams == found.hparams.fast()
    confirmed = pl.tune(bench, FACTS, "PMET", goal="EA", fast=True)
    first = [(table["stage"] == 0).sum() for table in (found.table, confirmed.table)]
    assert first[0] > first[1]


@pytest.mark.parametrize("dear", [False, True])
@pytest.mark.parametrize("confirmed", [False, True])
@pytest.mark.parametrize("n", [8, 10, 20, 37, 100])
@pytest.mark.parametrize("share", [6, 12, 25])
def test_a_plan_keeps_its_budget_and_ends_with_all_facts(n, share, dear, confirmed):
    plan = stages(n, 40, share * n, dear, confirmed)
    sizes, groups = zip(*plan, strict=True)
    new = sizes if dear else np.diff([0, *sizes])
    assert np.dot(groups, new) + n * confirmed <= share * n
    assert sizes[-1] == n
    assert sizes[0] >= search.FEW or len(sizes) == 1
    assert list(groups) == sorted(groups, reverse=True)
    assert groups[-1] == max(2, math.ceil(groups[0] / 2 ** (len(sizes) - 1)))
    more = stages(n, 40, share * n + 10 * n, dear, confirmed)
    assert more[0][1] >= groups[0]


def test_methods_that_keep_no_targets_count_every_try(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 50.0)
    for method in ("ROME", pl.VARIANTS["targets refreshed"], "FT-W"):
        found = pl.tune(bench, FACTS, method, budget=80)
        tried = found.table["facts"]
        assert found.space.dear
        assert found.spent == tried.sum()
        assert found.spent <= 80


@pytest.mark.parametrize("method", ["FT-W", "ROME"])
def test_what_is_optimised_with_the_edit_is_judged_without_targets(bench, method):
    judge = Judge(bench, pl.Goal("EA"), (), "here")
    seen = judge.see(pl.Trial(method), FACTS[:2], lambda: pytest.fail("they are not read"))
    assert seen.failed == ""
    assert len(seen.table) == 2


# -- what is searched -----------------------------------------------------------------------------


def space(method: Any, hp: Any = HP) -> Space:
    return Space(method, hp, 30, frozenset(range(29)))


def test_groups_are_those_whose_targets_differ():
    hp = replace(HP, layers=(4, 5, 6, 7))
    groups = space(pl.PMET, hp).groups()
    assert groups[0] == hp
    assert len(set(groups)) == len(groups)
    assert {one.layers[-1] for one in groups} >= {3, 5, 7, 9, 11}
    assert {one.reference_norm for one in groups} == {"own stream", "resid_post"}
    assert {one.second_moment_weight for one in groups} == {hp.second_moment_weight}
    assert {one.reference_norm for one in space(pl.MEMIT, hp).groups()} == {"own stream"}
    near = space(pl.PMET, hp).near(hp, False, False)
    assert {one.layers[-1] for one in near} == {7}
    assert {len(one.layers) for one in near} == {2, 4, 6}
    assert all(0.1 <= one.second_moment_weight / hp.second_moment_weight <= 10 for one in near)
    assert space(pl.ROME, hp).near(hp, True, False) == [hp]
    l2 = {one.null_space_l2 for one in space(pl.ALPHAEDIT, hp).near(hp, True, False)}
    assert l2 == {hp.null_space_l2 * f for f in (0.1, 1, 10)}


def test_the_bound_of_fine_tuning_is_tried_before_all_else():
    """Four settings are what a budget of four targets per fact affords, and with a bound that is
    too small for the model, or reached too slowly, no other setting edits anything."""
    hp = pl.FineTuneHparams(layer=7, lr=5e-4, norm_constraint=5e-4)
    groups = space(pl.named("FT+L"), hp).groups()
    assert [one.norm_constraint / hp.norm_constraint for one in groups[:4]] == [1, 10, 3, 30]
    assert all(one.lr == one.norm_constraint for one in groups[:4])
    assert {one.lr for one in groups if one.norm_constraint == hp.norm_constraint} > {hp.lr}
    free = space(pl.named("FT-W"), replace(hp, norm_constraint=None)).groups()
    assert {one.norm_constraint for one in free} == {None}
    assert {one.lr / hp.lr for one in free} == {1, 3, 10, 1 / 3}


def test_layers_without_a_second_moment_are_left_out():
    hp = replace(HP, layers=(4, 5, 6))
    few = Space(pl.PMET, hp, 30, frozenset(range(4, 8)))
    # 8, two above, has none, and below 4 nothing has.
    assert {one.layers for one in few.groups()} == {(4, 5, 6), (4,)}
    assert {one.layers for one in few.near(hp, False, False)} == {(4, 5, 6), (6,)}


def test_settings_are_for_so_many_edits(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 50.0)
    found = pl.tune(bench, FACTS, "PMET", n_edits=100)
    assert found.hparams.second_moment_weight == 10 * HP.second_moment_weight
    assert found.for_edits(10).second_moment_weight == HP.second_moment_weight
    assert found.edits == 100


# -- what is refused ------------------------------------------------------------------------------


def test_facts_that_are_edited_later_are_refused(bench):
    with pytest.raises(pl.FactError, match="'Mira Danel plays the sport of' is tuned on"):
        pl.tune(bench, FACTS, edited=[FACTS[0]])
    other = replace(FACTS[0], prompt="The sport of {} is", target_new="golf")
    with pytest.raises(pl.FactError, match="is tuned on and edited"):  # the same relation
        pl.tune(bench, FACTS, edited=[other])
    with pytest.raises(pl.FactError, match="is tuned on and edited"):
        pl.compare(bench, {"PMET": pl.Trial()}, [other, *LATER], tune_on=FACTS)
    tuning.refuse_overlap(FACTS, [replace(other, relation="another")])


def test_too_little_is_refused_in_a_sentence(bench):
    with pytest.raises(pl.FactError, match="at least 8 facts, better 40; there are 7"):
        pl.tune(bench, FACTS[:7])
    with pytest.raises(pl.FactError, match=r"too few for a budget of 1000 .* Give 40 facts"):
        pl.tune(bench, FACTS, budget=1000)
    with pytest.raises(pl.SettingsError, match="does not try two settings on 10 facts: give"):
        pl.tune(bench, FACTS, budget=10)
    with pytest.raises(pl.SettingsError, match="Mend has nothing to tune"):
        pl.tune(bench, FACTS, "MEND")
    with pytest.raises(pl.SettingsError, match="no metric 'SS' to tune for"):
        pl.tune(bench, FACTS, goal="SS")
    with pytest.raises(pl.SettingsError, match="0 to 100"):
        pl.Goal(collateral=101)
    with pytest.raises(pl.SettingsError, match="ratio from 1 on"):
        pl.Goal(perplexity=0.5)
    with pytest.raises(pl.SettingsError, match="needs other facts that the model knows"):
        pl.tune(bench, FACTS, goal=pl.Goal(collateral=90), others=LATER)
    bare = [replace(f, paraphrases=()) for f in FACTS]
    with pytest.raises(pl.SettingsError, match="no prompts for PS"):
        pl.tune(bench, bare)


@pytest.mark.filterwarnings("default:The model recalls only")
def test_a_user_hears_that_the_model_does_not_recall_the_facts(bench, monkeypatch):
    plant(monkeypatch, lambda hp, i: 50.0)
    with pytest.warns(UserWarning, match="recalls only 0 of these 10 facts"):
        found = pl.tune(bench, FACTS)
    assert "Take pl.recalled(model)" in found.why
    blank = [replace(f, target_true=None) for f in FACTS]
    assert "have no target_true" in pl.tune(bench, blank).why


# -- goals ----------------------------------------------------------------------------------------


def test_a_goal_may_be_of_free_answers_and_of_several_metrics():
    assert pl.Goal().parts == ("ES", "PS", "NS")
    assert not pl.Goal().free
    goal = pl.Goal(("EF", "NF"))
    assert goal.free
    assert goal.statistic == "harmonic"
    table = pd.DataFrame({"EF": [100.0, 50.0], "NF": [50.0, 100.0]})
    assert Seen(table).rank(goal)[1] == pytest.approx(75.0)


def test_what_was_seen_is_read_as_it_was_written():
    table = pd.DataFrame({"ES": [100.0, 1 / 3], "PS": [np.nan, 0.1]})
    seen = Seen(table, (100.0, 0.0), 1.25)
    again = Seen.of_plain(seen.plain())
    pd.testing.assert_frame_equal(again.table, table, check_exact=True)
    assert (again.right, again.growth, again.failed) == (seen.right, seen.growth, "")


# -- a fair comparison ----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_method_gets_the_same_budget(bench):
    trials = {"PMET": pl.Trial(), "FT-W": pl.Trial(pl.FT_W)}
    heard: dict[str, pl.Tuned] = {}
    table = pl.compare(
        bench, trials, LATER, baseline="PMET", tune_on=FACTS, budget=70, front=True, goal="EA",
        on_tuned=heard.__setitem__,
    )  # fmt: skip
    assert table.attrs == {"tuned_on": 10, "budget": 70, "goal": "EA"}
    assert set(table["budget"]) == {70}
    assert list(heard) == list(trials)
    for name, tuned in heard.items():
        own = table[table["run"] == name]
        assert set(own["spent"]) == {tuned.spent}
        assert set(own["settings"]) == {repr(tuned.hparams)}
        assert tuned.spent <= 70
    assert table.loc[table["run"] == "FT-W", "difference"].notna().all()
    # The edit is that of the tuned settings, for as many facts as are edited.
    hp = heard["PMET"].hparams
    assert heard["PMET"].edits == len(LATER)
    with bench.edit(
        pl.Trial(hparams=hp), LATER, bench.targets(pl.Trial(hparams=hp), LATER)
    ).applied(bench.model):
        want = pl.summarise(pl.evaluate(bench.model, LATER))["mean"]
    got = table[table["run"] == "PMET"].set_index("metric")["mean"]
    assert got.to_numpy() == pytest.approx(want[got.index].to_numpy(), abs=1e-6)


def test_a_budget_without_facts_to_tune_on_is_refused(bench):
    with pytest.raises(pl.SettingsError, match="pass tune_on="):
        pl.compare(bench, {"PMET": pl.Trial()}, FACTS, budget=5)


RUNS = {
    "best edit": (100, 60, 80),
    "most kept": (90, 99, 95),
    "between": (95, 80, 90),
    "beaten": (95, 79, 90),
    "twin": (95, 80, 90),
}


def planted_runs() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": run, "metric": m, "mean": v, "ci_low": v - 5, "ci_high": v + 5}
            for run, values in RUNS.items()
            for m, v in zip(("ES", "NS", "collateral"), values, strict=True)
        ]
    )


def test_the_front_is_what_nothing_beats():
    found = pl.pareto(planted_runs())
    assert list(found.index[~found["front"]]) == ["beaten"]
    assert list(found.columns) == ["ES", "NS", "collateral", "front"]
    two = pl.pareto(planted_runs(), ("ES", "NS"))
    assert list(two.index[two["front"]]) == ["best edit", "most kept", "between", "twin"]
    one = pl.pareto(planted_runs(), ("NS", "nowhere"))
    assert list(one.index[one["front"]]) == ["most kept"]
    with pytest.raises(pl.SettingsError, match="has all of PS"):
        pl.pareto(planted_runs(), ("PS",))


def test_a_line_goes_through_every_strength_in_their_order():
    rows = [
        {"run": run, "factor": f, "metric": m, "mean": v, "ci_low": v - 5, "ci_high": v + 5}
        for run in ("MEMIT", "PMET")
        for f, values in ((10.0, (20, 90)), (0.1, (80, 30)), (1.0, (60, 50)))
        for m, v in zip(("PS", "NS"), values, strict=True)
    ]
    ax = plotting.trade_lines(pd.DataFrame(rows), Figure().subplots(), "NS", "PS", "factor")
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert set(lines) == {"MEMIT", "PMET"}
    for line in lines.values():
        assert list(line.get_xdata()) == [30, 50, 90]
        assert list(line.get_ydata()) == [80, 60, 20]
    large = [line for line in ax.lines if line.get_markersize() > 5]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in large] == [(50, 60)] * 2
    assert [text.get_text() for text in ax.texts] == ["0.1"] * 2


def test_pictures_show_the_front_and_what_was_tried(bench, monkeypatch):
    ax = Figure().subplots()
    table = planted_runs()
    front = pl.pareto(table)["front"]
    table["front"] = table["run"].map(front)
    plotting.front(table, ax)
    named = {text.get_text() for text in ax.texts}
    assert named == {run for run in RUNS if front[run]}
    plant(monkeypatch, lambda hp, i: 90 - abs(math.log(hp.clamp)) - i)
    found = pl.tune(bench, FACTS, "PMET")
    ax = plotting.tuning_dots(found.table, Figure().subplots())
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert shown[0] == found.table.loc[found.table["chosen"], "setting"].iloc[0]
    assert "<table" in found._repr_html_()
    assert repr(found).startswith("Tuned on 10 facts")
