"""Each method's own defaults, what an edit is told to be made with, and what is said after it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from kept import bundled, shared_model

import pmet_lens as pl
from pmet_lens.editing.method import RELEASED, kind_of
from pmet_lens.experiments import target_files

FACTS = [
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Kel"),
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby"),
    pl.Fact("Ilmar", "The tower of {} stands in", "Ostria"),
]
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def model() -> pl.Model:
    return shared_model("llama", torch.float64)


@pytest.fixture(scope="module")
def moments(model: pl.Model) -> dict[pl.Site, torch.Tensor]:
    sites = [pl.Site(n, p) for n in LAYERS for p in ("attn", "mlp")]
    return {s: torch.eye(model.d_in(s), dtype=torch.float64) for s in sites}


def same(a: pl.Edit, b: pl.Edit) -> bool:
    return all(torch.equal(a.deltas[s], b.deltas[s]) for s in {**a.deltas, **b.deltas})


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("PMET", "MEMIT", "ROME", "EMMET", "AlphaEdit", "+ W_O"))
def test_what_is_left_open_is_as_released_for_the_method(name: str) -> None:
    """GPT-J's settings, where the number of edits is the one they were released for."""
    method = pl.named(name)
    assert isinstance(method, pl.Method)
    known = pl.HPARAMS["gpt-j-6b"][kind_of(method)]
    assert pl.Hparams(known.layers).settled(method) == known
    assert pl.Hparams(known.layers).settled(method).settled(pl.MEMIT) == known


@pytest.mark.parametrize(("name", "each"), [("PMET", 0.6), ("MEMIT", 1.5), ("AlphaEdit", 1.5)])
def test_the_weight_of_the_second_moment_fits_the_number_of_facts(name: str, each: float) -> None:
    for n in (1, 3, 200, 10_000):
        found = pl.Hparams(LAYERS).settled(pl.named(name), n)  # type: ignore[arg-type]
        assert found.second_moment_weight == pytest.approx(each * n)


def test_what_was_given_wins_and_stays_given() -> None:
    hparams = replace(pl.Hparams(LAYERS, lr=0.3), clamp=2.0)
    assert hparams.given == {
        "layers": LAYERS,
        "lr": 0.3,
        "clamp": 2.0,
        "reference_norm": "own stream",
        "step_rule": "Adam",
        "prefixes_per_step": None,
    }
    found = hparams.settled(pl.MEMIT, 4)
    assert (found.lr, found.clamp) == (0.3, 2.0)
    assert (found.n_steps, found.easing, found.second_moment_weight) == (25, 1.0, 6.0)
    assert "lr=0.3" in repr(hparams)
    assert "n_steps" not in repr(hparams)
    given = pl.Hparams(LAYERS, second_moment_weight=6000.0, n_steps=30)
    assert given.settled(pl.MEMIT, 4).second_moment_weight == 6000
    assert given.settled(pl.MEMIT, 4).n_steps == 30
    assert set(RELEASED) == {"PMET", "MEMIT", "ROME"}


def test_known_settings_leave_nothing_open() -> None:
    for kinds in pl.HPARAMS.values():
        for hparams in kinds.values():
            assert hparams.settled(pl.ROME, 1) == hparams


@pytest.mark.parametrize("name", ("PMET", "MEMIT", "ROME", "EMMET"))
def test_an_edit_says_what_it_was_made_with(model, moments, name: str) -> None:
    method = pl.named(name)
    assert isinstance(method, pl.Method)
    one = kind_of(method) == "ROME"
    hparams = pl.Hparams((2,) if one else LAYERS)
    together = 1 if name == "ROME" else len(FACTS)
    edit = pl.edit(model, FACTS, moments, name, hparams, ["{}"], check=False)
    assert edit.hparams == hparams.settled(method, together)
    assert edit.hparams.given.keys() >= {"n_steps", "second_moment_weight", "easing"}
    again = pl.edit(model, FACTS, moments, method, edit.hparams, ["{}"], check=False)
    assert same(edit, again)


def test_targets_have_the_name_of_what_they_were_made_with(model) -> None:
    def key(hparams: pl.Hparams) -> str:
        return target_files.key("w", FACTS, pl.MEMIT, hparams, ["{}"])

    assert key(pl.Hparams(LAYERS)) == key(pl.Hparams(LAYERS).settled(pl.MEMIT, 3))
    assert key(pl.Hparams(LAYERS)) != key(pl.Hparams(LAYERS).settled(pl.PMET, 3))


def test_a_run_of_a_grid_is_settled_before_it_has_a_name(tmp_path) -> None:
    def run(hparams: pl.Hparams) -> pl.Run:
        return pl.Run(model="some/model", facts=FACTS, method="MEMIT", hparams=hparams)

    made = run(pl.Hparams(LAYERS))
    assert made.hparams == pl.Hparams(LAYERS).settled(pl.MEMIT, 3)
    assert made.digest == run(made.hparams).digest
    pl.save_grid([made], tmp_path / "g.json")
    assert pl.load_grid(tmp_path / "g.json")[0].digest == made.digest


def test_settings_of_another_kind_are_refused_in_words(model, moments) -> None:
    with pytest.raises(pl.SettingsError, match="takes Hparams"):
        pl.edit(model, FACTS, moments, "PMET", pl.FineTuneHparams(layer=1), ["{}"])


# -- how many are answered ------------------------------------------------------------------------


def test_an_edit_tells_how_many_facts_are_answered(world_moments) -> None:
    world, facts, moments = bundled("world"), pl.counterfact(n=3), world_moments("world")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = pl.edit(world, facts, moments, hparams=pl.hparams_for(world, "PMET").fast())
    with edit.applied(world):
        said = pl.evaluate(world, facts).query("kind == 'rewrite'")["correct"].sum()
    assert edit.answered == said >= 2
    assert f"{edit.answered} of them answered" in repr(edit)
    assert edit.receipt(world).facts["said"].sum() == said


def test_a_warning_where_less_than_half_are(model, moments) -> None:
    weak = pl.Hparams(LAYERS, second_moment_weight=1e9)
    with pytest.warns(UserWarning, match=r"only 0 of 3 facts.*second_moment_weight") as caught:
        edit = pl.edit(model, FACTS, moments, "PMET", weak, ["{}"])
    assert edit.answered == 0
    assert caught[0].filename.endswith(("test_own_defaults.py", "_decorator.py"))


def test_nobody_is_asked_in_inner_loops(model, moments, monkeypatch) -> None:
    hparams = pl.Hparams(LAYERS, n_steps=2)
    targets = pl.optimise(model, FACTS, "PMET", hparams, ["{}"])
    asked: list[int] = []
    monkeypatch.setattr("pmet_lens.evaluation.scoring.answered", lambda _, f: asked.append(len(f)))
    assert pl.edit(model, FACTS, moments, "PMET", hparams, ["{}"], targets).answered is None
    assert pl.edit(model, FACTS, moments, "PMET", hparams, ["{}"], check=False).answered is None
    pl.edit_sequentially(model, FACTS, moments, "PMET", hparams, ["{}"], batch_size=1)
    assert asked == []


# -- rounding -------------------------------------------------------------------------------------


def test_a_receipt_says_how_much_of_the_change_rounding_took() -> None:
    narrow = shared_model("llama", torch.bfloat16)
    moments = {pl.Site(n, "mlp"): torch.eye(48, dtype=torch.float64) for n in LAYERS}
    hparams = pl.Hparams(LAYERS, n_steps=3, second_moment_weight=0.1)
    edit = pl.edit(narrow, FACTS, moments, "PMET", hparams, ["{}"], check=False)
    receipt = edit.receipt(narrow)
    for site, (left, right) in edit.factors.items():
        before = narrow.weight(site).clone()
        with edit.applied(narrow):
            written = narrow.weight(site).double() - before.double()
        exact = (left @ right).double()
        lost = float((written - exact).norm() / exact.norm())
        row = receipt.sites[receipt.sites["site"] == str(site)]
        assert row["rounded"].item() == pytest.approx(lost)
        assert lost > 0.01
    assert "% of the change at" in receipt.rounding
    assert receipt.rounding in repr(receipt)
    assert receipt.rounding in receipt._repr_html_()


def test_nothing_is_said_where_rounding_took_nothing(model, moments) -> None:
    edit = pl.edit(
        model, FACTS, moments, "PMET", pl.Hparams(LAYERS, n_steps=3), ["{}"], check=False
    )
    receipt = edit.receipt(model)
    assert (receipt.sites["rounded"] < 1e-10).all()
    assert receipt.rounding == ""


def test_released_settings_of_models_people_use() -> None:
    """Field by field, as in the files named beside them (AlphaEdit's and EasyEdit's hparams)."""
    known = pl.HPARAMS
    five, fields = (4, 5, 6, 7, 8), ("layers", "n_steps", "lr", "clamp", "weight_decay")
    fields += ("kl_weight", "second_moment_weight")
    for name, kind, wanted in (
        ("meta-llama-3-8b", "MEMIT", (five, 25, 0.1, 0.75, 0.5, 0.0625, 15000)),
        ("qwen2.5-7b", "MEMIT", (five, 25, 0.5, 4, 1e-3, 0.0625, 15000)),
        ("mistral-7b-v0.1", "MEMIT", (five, 25, 0.5, 4, 1e-3, 0.0625, 15000)),
        ("llama-2-7b-hf", "MEMIT", (five, 25, 0.5, 4, 1e-3, 0.0625, 15000)),
        ("llama-3.2-3b", "PMET", (five, 25, 0.5, 1, 0.5, 0.0625, 15000)),
    ):
        assert tuple(getattr(known[name][kind], f) for f in fields) == wanted
    for name, wanted in (
        ("meta-llama-3-8b", ((5,), 25, 0.5, 4, 1e-3, 0.0625)),
        ("qwen2.5-7b", ((5,), 25, 0.5, 4, 1e-3, 0.0625)),
        ("mistral-7b-v0.1", ((5,), 25, 0.5, 4, 1e-3, 0.0625)),
        ("gpt2-large", ((12,), 20, 0.5, 4, 0.5, 0.0625)),
        ("gpt2-medium", ((8,), 20, 0.5, 3, 0.5, 0.0625)),
    ):
        assert tuple(getattr(known[name]["ROME"], f) for f in fields[:-1]) == wanted
        assert known[name]["ROME"].easing == 1
