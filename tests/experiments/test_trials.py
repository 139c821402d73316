"""Methods by name, targets as files, and tables of trials that compute each thing once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cases import CONTEXTS, FACTS, HP, bits, same_deltas, some_moments, unchanged
from cases import one_tail as one_tail
from kept import shared_model
from safetensors.torch import save_file
from tiny import FAMILIES, tiny_model

import pmet_lens as pl
from pmet_lens.data import datasets, file_format
from pmet_lens.data.facts import FactError
from pmet_lens.editing import targets
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.methods import SHORT_NAMES, named
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.editing.targets import Targets, joined, optimise
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.experiments import target_files
from pmet_lens.experiments.trials import KEPT, Bench, Trial, ablations
from pmet_lens.models.generation import sample_contexts
from pmet_lens.models.model import Model, Site
from pmet_lens.models.tokens import PLAIN
from pmet_lens.models.weights import EditError
from pmet_lens.moments import second_moments
from pmet_lens.plans.comparing import compare

torch.set_num_threads(1)
KNOWN = [replace(fact, target_true=fact.target_true or "Vell") for fact in FACTS]
OTHERS = [
    pl.Fact(text, "{}", None, "t")
    for text in ("Kel", "The capital of Vell is", "Danel plays", "Ilmar and Kel are", "Mira")
]


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def whole(gpt2) -> Targets:
    return optimise(gpt2, FACTS, pl.PMET, HP, CONTEXTS)


def same(one: Targets | None, other: Targets | None) -> bool:
    """Equal to the bit, histories with their missing values included."""
    assert one is not None
    assert other is not None
    pd.testing.assert_frame_equal(one.history, other.history, check_exact=True)
    assert (one.layer, one.position) == (other.layer, other.position)
    return all(
        list(a) == list(b) and all(torch.equal(a[s], b[s]) and a[s].dtype == b[s].dtype for s in a)
        for a, b in ((one.values, other.values), (one.clean, other.clean))
    )


def method_of(name: str) -> pl.Method:
    method = named(name)
    assert isinstance(method, pl.Method)
    return method


def off(got: Targets, want: Targets) -> float:
    assert set(got.values) == set(want.values)
    return max(float((got.values[s] - want.values[s]).abs().max()) for s in want.values)


def counting(monkeypatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function that goes on doing its work."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(module, name)

    def heard(*args, **more):
        calls.append(args)
        return real(*args, **more)

    monkeypatch.setattr(module, name, heard)
    return calls


# -- methods by name ------------------------------------------------------------------------------


def test_a_name_is_that_of_a_method_or_an_ablation():
    for known in (pl.METHODS, pl.ABLATIONS):
        for name, method in known.items():
            assert named(name) is method
    assert pl.METHODS.keys() & pl.ABLATIONS.keys() == {"PMET", "MEMIT"}
    for name in pl.METHODS.keys() & pl.ABLATIONS.keys():
        assert pl.METHODS[name] is pl.ABLATIONS[name]  # so that a name means one thing


@pytest.mark.parametrize("name", ["pmet", "", "PMET "])
def test_an_unknown_name_is_told_the_known_ones(name):
    with pytest.raises(SettingsError, match="There is no method or ablation") as error:
        named(name)
    methods, _, rest = str(error.value).partition("Ablations: ")
    assert repr(name) in methods
    assert methods.partition("Methods: ")[2] == ", ".join(pl.METHODS) + ". "
    short = {full: name for name, full in SHORT_NAMES.items()}
    extra = [f"{n!r} ({short[n]})" for n in pl.ABLATIONS if n not in pl.METHODS]
    assert rest == ", ".join(extra) + "."


@pytest.mark.parametrize("name", ["PMET", "at the last token", "no_attn_delta"])
def test_a_name_edits_as_its_method_does(gpt2, name):
    moments = some_moments(gpt2)
    by_name = pl.edit(gpt2, FACTS, moments, name, HP, CONTEXTS)
    by_value = pl.edit(gpt2, FACTS, moments, named(name), HP, CONTEXTS)
    assert same_deltas(by_name, by_value)
    assert by_name.method == by_value.method == named(name)


def test_the_name_of_a_method_with_its_own_algorithm_works_too(gpt2):
    hp = pl.FineTuneHparams(layer=2, n_steps=2)
    by_name = pl.edit(gpt2, FACTS, None, "FT-W", hp)
    assert same_deltas(by_name, pl.edit(gpt2, FACTS, None, pl.FT_W, hp))


def test_an_edit_by_an_unknown_name_is_refused(gpt2):
    with pytest.raises(SettingsError, match="There is no method or ablation 'PMETT'"):
        pl.edit(gpt2, FACTS, some_moments(gpt2), "PMETT", HP, CONTEXTS)


# -- targets of several lists ---------------------------------------------------------------------


def test_joined_slices_are_the_whole(whole):
    assert same(joined([whole[:1], whole[1:]]), whole)
    assert same(joined([whole[:2], whole[2:]]), whole)
    assert same(joined([whole]), whole)
    assert same(joined([whole[i : i + 1] for i in range(len(whole))]), whole)


def test_joined_targets_are_those_of_the_facts_in_that_order(whole):
    turned = joined([whole[2:], whole[:2]])
    assert len(turned) == 3
    for stream in whole.values:
        assert torch.equal(turned.values[stream], whole.values[stream][[2, 0, 1]])
        assert torch.equal(turned.delta(stream), whole.delta(stream)[[2, 0, 1]])
    for new, old in enumerate([2, 0, 1]):
        own, theirs = turned[new : new + 1].history, whole[old : old + 1].history
        pd.testing.assert_frame_equal(own, theirs, check_exact=True)
    assert list(turned.history.index) == list(range(len(turned.history)))


def test_joined_targets_keep_layer_and_position(whole):
    parts = [replace(whole, position="last", layer=1)[:1], replace(whole, position="last")[1:]]
    assert joined(parts).position == "last"
    assert joined(parts).layer == 1


# -- targets as files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PMET", "MEMIT", "at the first subject token", "w/o δ^a"])
def test_targets_are_read_as_they_were_written(gpt2, tmp_path, name):
    path = tmp_path / "targets.safetensors"
    found = optimise(gpt2, FACTS, method_of(name), HP, CONTEXTS)
    target_files.save(found, path)
    again = target_files.load(path)
    assert same(again, found)
    assert again.history.isna().any(axis=None) == (len(found.values) == 2)  # cosines of nothing
    assert again.position == method_of(name).position
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    target_files.save(again, str(path))
    assert same(target_files.load(str(path)), found)


def test_an_edit_of_many_facts_goes_on_where_it_was_cut(gpt2, tmp_path, monkeypatch):
    moments, kept = some_moments(gpt2), pl.KeptTargets(tmp_path / "run", part=1)
    found, optimise = [], targets.optimise

    def cut(model, facts, *rest, **more):
        if len(found) == 2:
            raise KeyboardInterrupt
        found.append(facts[0])
        return optimise(model, facts, *rest, **more)

    monkeypatch.setattr(targets, "optimise", cut)
    before = bits(gpt2)
    with pytest.raises(KeyboardInterrupt):
        pl.edit(gpt2, FACTS, moments, pl.PMET, HP, CONTEXTS, kept)
    assert unchanged(gpt2, before)
    found.pop()  # one more, then no further
    edit = pl.edit(gpt2, FACTS, moments, pl.PMET, HP, CONTEXTS, kept)
    assert found == [FACTS[0], FACTS[2]]
    assert edit.answered is not None
    again = pl.edit(gpt2, FACTS, moments, pl.PMET, HP, CONTEXTS, kept)
    assert same(again.targets, edit.targets)
    assert same_deltas(again, edit)
    monkeypatch.undo()
    whole = pl.edit(gpt2, FACTS, moments, pl.PMET, HP, CONTEXTS, pl.KeptTargets(tmp_path))
    for stream, value in whole.targets.values.items():
        assert torch.allclose(value, edit.targets.values[stream], atol=1e-9)


def test_targets_that_cannot_be_kept_are_not_begun(gpt2, tmp_path):
    (tmp_path / "file").touch()
    given = gpt2, FACTS, some_moments(gpt2), pl.PMET, HP, CONTEXTS
    with pytest.raises(EditError, match=r"Targets cannot be kept in .*file"):
        pl.edit(*given, pl.KeptTargets(tmp_path / "file"))
    with pytest.raises(FactError, match="part must be a number of facts"):
        pl.edit(*given, pl.KeptTargets(tmp_path, part=0))


def test_every_reason_to_stop_is_kept(tmp_path, whole):
    path = tmp_path / "targets.safetensors"
    reasons = [target_files.STOPPED[i % 3] for i in range(len(whole.history))]
    said = [i % 2 == 0 for i in range(len(whole.history))]
    found = replace(whole, history=whole.history.assign(stopped=reasons, said=said))
    assert set(reasons) == {"", "goal", "steps"}
    target_files.save(found, path)
    assert same(target_files.load(path), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_keep_the_dtype(tmp_path, dtype):
    found = optimise(shared_model("gpt2", dtype), FACTS[:2], pl.PMET, HP, [PLAIN])
    target_files.save(found, tmp_path / "t")
    assert same(target_files.load(tmp_path / "t"), found)


def test_slices_can_be_written(tmp_path, whole):
    for chosen in (slice(1, None), slice(None, None, 2)):
        target_files.save(whole[chosen], tmp_path / "t")
        assert same(target_files.load(tmp_path / "t"), whole[chosen])


def test_an_edit_with_targets_from_a_file_is_the_edit(gpt2, tmp_path, whole):
    target_files.save(whole, tmp_path / "t")
    given = (gpt2, FACTS, some_moments(gpt2), pl.PMET, HP, CONTEXTS)
    assert same_deltas(
        pl.edit(*given, targets=target_files.load(tmp_path / "t")), pl.edit(*given, targets=whole)
    )


def test_files_that_hold_no_targets_are_refused(gpt2, tmp_path, whole):
    path = tmp_path / "t.safetensors"
    target_files.save(whole, path)
    written = path.read_bytes()
    for kept in (0, 7, 100, len(written) // 2, len(written) - 1):
        path.write_bytes(written[:kept])
        with pytest.raises(EditError, match=r"t\.safetensors cannot be read as targets"):
            target_files.load(path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EditError, match="cannot be read as targets"):
            target_files.load(missing)
    for metadata in (None, {"format": "pt"}, {"pmet_lens": '{"format": "pmet_lens moments 1"}'}):
        save_file({"values.mlp_out": torch.eye(2)}, path, metadata)
        with pytest.raises(EditError, match="is a safetensors file, but not targets saved"):
            target_files.load(path)
    made = pl.edit(gpt2, FACTS, some_moments(gpt2), pl.PMET, HP, CONTEXTS, whole)
    made.save(path)
    with pytest.raises(EditError, match="not targets saved"):
        target_files.load(path)
    target_files.save(whole, path)
    with pytest.raises(EditError, match="is a safetensors file, but not an edit"):
        pl.Edit.load(path)


def test_a_file_that_cannot_be_written_whole_does_not_appear(tmp_path, whole, monkeypatch):
    """Planted: the disk is full after half of it."""
    path = tmp_path / "t.safetensors"

    def full(tensors, filename, metadata=None):
        save_file(tensors, filename, metadata)
        whole = Path(filename).read_bytes()
        Path(filename).write_bytes(whole[: len(whole) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(file_format, "save_file", full)
    with pytest.raises(EditError, match=r"could not be written to .*No space left"):
        target_files.save(whole, path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    target_files.save(whole, path)
    assert same(target_files.load(path), whole)


# -- names of files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key(gpt2) -> Callable[..., str]:
    """The name of the usual targets with something else about them."""

    def of(model: Model = gpt2, **change) -> str:
        settled = HP.settled(pl.PMET)  # else another solver takes other strengths
        given: dict[str, Any] = dict(facts=FACTS, method=pl.PMET, hparams=settled)
        given["contexts"] = CONTEXTS
        given |= change
        prefixes = given.pop("contexts")
        return target_files.key(target_files.identity(model), **given, prefixes=prefixes)

    return of


SAME_TARGETS: dict[str, dict[str, Any]] = {
    "λ": {"hparams": replace(HP, second_moment_weight=9.0)},
    "null space": {"hparams": replace(HP, null_space_threshold=9.0, null_space_l2=3.0)},
    "earlier layers": {"hparams": replace(HP, layers=(0, 2))},
    "no earlier layers": {"hparams": replace(HP, layers=(2,))},
    "spread": {"method": replace(pl.PMET, spread="linear")},
    "solver": {"method": replace(pl.PMET, solver=Exact())},
    "null space solver": {"method": replace(pl.PMET, solver=NullSpace())},
    "written": {"method": replace(pl.PMET, write=("attn", "mlp"))},
    "at once": {"method": replace(pl.PMET, at_once=1)},
    "what is only measured": {
        "facts": [replace(f, case_id=3, paraphrases=("z",), target_true="q") for f in FACTS]
    },
    "list of contexts": {"contexts": tuple(CONTEXTS)},
}


@pytest.mark.parametrize("name", SAME_TARGETS)
def test_targets_that_are_the_same_have_one_name(gpt2, key, whole, name):
    change = SAME_TARGETS[name]
    assert key(**change) == key()
    settled = HP.settled(pl.PMET)
    given = {"facts": FACTS, "method": pl.PMET, "hparams": settled, "contexts": CONTEXTS}
    again = optimise(gpt2, **{**given, **change})
    assert off(again, whole) == 0


OTHER_STRENGTHS: dict[str, Any] = {
    "layers": (1,),
    "easing": 0.5,
    "reference_norm": "resid_post",
    "prefixes_per_step": 1,
    "step_rule": "falling",
}
UNREAD = {"second_moment_weight", "null_space_threshold", "null_space_l2"}


@pytest.mark.parametrize("name", [f.name for f in fields(pl.Hparams) if f.name not in UNREAD])
def test_every_other_strength_gives_another_name(key, name):
    value = OTHER_STRENGTHS[name] if name in OTHER_STRENGTHS else getattr(HP, name) + 1
    assert key(hparams=replace(HP, **{name: value})) != key()


OTHER_TARGETS: dict[str, dict[str, Any]] = {
    "streams": {"method": replace(pl.PMET, delta_at=("mlp_out",))},
    "layer output": {"method": pl.MEMIT},
    "first subject token": {"method": replace(pl.PMET, position="first_subject")},
    "last token": {"method": replace(pl.PMET, position="last")},
    "answer": {"facts": [replace(FACTS[0], target_new="golf"), *FACTS[1:]]},
    "prompt": {"facts": [replace(FACTS[0], prompt="{} plays"), *FACTS[1:]]},
    # One text, but the subject ends elsewhere in it.
    "subject's end": {"facts": [pl.Fact("Mira", "{} Tolan plays the sport of", "rugby")]},
    "subject": {"facts": [pl.Fact("Mira Tolan", "{} plays the sport of", "rugby")]},
    "order": {"facts": FACTS[::-1]},
    "fewer": {"facts": FACTS[:2]},
    "prefixes": {"contexts": ["{}", "I. {}"]},
    "no prefixes": {"contexts": [PLAIN]},
    "prefixes of a seed": {"contexts": 0},
    "prefixes of another seed": {"contexts": 1},
}


def test_everything_else_gives_names_of_their_own(key):
    names = {name: key(**change) for name, change in OTHER_TARGETS.items()}
    assert len({key(), *names.values()}) == 1 + len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_change_of_a_weight_gives_another_name(key, family):
    """Of one bit, in whatever parameter, and back again."""
    model = tiny_model(family)
    parameters = list(model.hf.parameters())
    want = key(model)
    for parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        with torch.no_grad():
            flat = parameter.view(-1)
            was = flat[-1].clone()
            flat[-1] = torch.nextafter(was, was + 1)
            assert key(model) != want
            flat[-1] = was
        assert key(model) == want


def test_models_have_names_of_their_own(key):
    models = [tiny_model("gpt2"), tiny_model("gpt2", torch.float64), tiny_model("gpt2", seed=1)]
    assert len({key(m) for m in models}) == 3
    assert key(tiny_model("gpt2")) == key(models[0])


# -- a long run -----------------------------------------------------------------------------------


def in_shards(model: Model, folder: Path, shard: int = 1, facts=FACTS, **more) -> Targets:
    return target_files.optimise(model, facts, pl.PMET, HP, CONTEXTS, folder, shard, **more)


@pytest.mark.parametrize("shard", [1, 2, 125])
def test_shards_together_are_the_whole(gpt2, whole, tmp_path, shard):
    heard = []
    found = in_shards(gpt2, tmp_path, shard, on_facts=lambda *n: heard.append(n))
    assert off(found, whole) < 1e-9
    assert (found.layer, found.position) == (whole.layer, whole.position)
    for stream, clean in whole.clean.items():
        assert (found.clean[stream] - clean).abs().max() < 1e-9
    pd.testing.assert_frame_equal(found.history, whole.history, rtol=1e-7, atol=1e-9)
    assert heard == [(min(n + shard, 3), 3) for n in range(0, 3, shard)]
    assert len(list(tmp_path.iterdir())) == len(heard)


def test_what_is_there_is_not_optimised_again(gpt2, tmp_path, monkeypatch):
    folder = tmp_path / "made" / "by the run"
    first = in_shards(gpt2, folder)
    calls = counting(monkeypatch, targets, "optimise")
    assert same(in_shards(gpt2, folder), first)
    assert calls == []
    # A fact that is added is optimised, and none beside it.
    more = [*FACTS, replace(FACTS[0], subject="Kel")]
    again = in_shards(gpt2, folder, facts=more)
    assert [call[1] for call in calls] == [more[3:]]
    assert same(again[:3], first)


def test_a_run_that_was_cut_goes_on(gpt2, tmp_path, monkeypatch):
    """Planted: it ends while the third fact is at work."""
    real = targets.optimise

    def cut(model, facts, *rest):
        if facts == FACTS[2:]:
            raise KeyboardInterrupt
        return real(model, facts, *rest)

    monkeypatch.setattr(targets, "optimise", cut)
    with pytest.raises(KeyboardInterrupt):
        in_shards(gpt2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    calls = counting(monkeypatch, targets, "optimise")
    found = in_shards(gpt2, tmp_path)
    assert [call[1] for call in calls] == [FACTS[2:]]
    assert same(found, in_shards(gpt2, tmp_path / "in one go"))


def test_targets_of_an_edited_model_are_its_own(gpt2, whole, tmp_path):
    clean = in_shards(gpt2, tmp_path, 3)
    made = pl.edit(gpt2, FACTS, some_moments(gpt2), pl.PMET, HP, CONTEXTS, whole)
    with made.applied(gpt2):
        edited = in_shards(gpt2, tmp_path, 3)
    assert off(edited, clean) > 1e-3
    assert same(in_shards(gpt2, tmp_path, 3), clean)


# -- rows of a table ------------------------------------------------------------------------------

STRONG = pl.Hparams(layers=(3, 4, 5, 6), clamp=0.8, second_moment_weight=70.0)


def changed(trial: Trial) -> set[str]:
    """What of a trial is not as in PMET."""
    assert isinstance(trial.method, pl.Method)
    usual = Trial()
    method = {
        f.name
        for f in fields(pl.Method)
        if getattr(trial.method, f.name) != getattr(usual.method, f.name)
    }
    return method | set(trial.change) | (set() if trial.prefixes else {"prefixes"})


def test_pmet_comes_first_and_is_as_it_is():
    rows = ablations(STRONG)
    assert next(iter(rows)) == "PMET"
    assert rows["PMET"] == Trial() == Trial(pl.PMET, {}, True)


def test_every_row_differs_from_pmet_in_one_thing():
    rows = ablations(STRONG)
    # The other end of the table, and the row between: both optimise the layer output.
    ends = {"MEMIT": {"delta_at", "spread"}, "TL hidden state, sqrt spread": {"delta_at"}}
    for name, trial in rows.items():
        if name != "PMET":
            assert changed(trial) == ends[name] if name in ends else len(changed(trial)) == 1, name
    assert set(pl.ABLATIONS) < set(rows)
    texts = {repr(trial) for trial in rows.values()}
    assert len(texts) == len(rows)


def test_strengths_are_relative_to_those_of_the_model():
    rows = ablations(STRONG)
    changes = {name: dict(trial.change) for name, trial in rows.items() if trial.change}
    assert changes == {
        "the last critical layer only": {"layers": (6,)},
        "the last 2 critical layers": {"layers": (5, 6)},
        "the last 3 critical layers": {"layers": (4, 5, 6)},
        "half the clamp": {"clamp": pytest.approx(0.4)},
        "twice the clamp": {"clamp": pytest.approx(1.6)},
        "a tenth of λ": {"second_moment_weight": pytest.approx(7.0)},
        "ten times λ": {"second_moment_weight": pytest.approx(700.0)},
    }
    assert [name for name, trial in rows.items() if not trial.prefixes] == ["without prefixes"]
    alone = ablations(replace(STRONG, layers=(4,)))
    assert rows.keys() - alone.keys() == {name for name in changes if name.startswith("the last")}


def test_every_row_is_a_valid_setting(bench):
    for trial in ablations(HP).values():
        assert bench.hparams(trial) == replace(HP, **trial.change)


# -- the bench ------------------------------------------------------------------------------------

ROME_HP = replace(HP, layers=(2,), easing=1.0)


FT_HP = pl.FineTuneHparams(layer=2, n_steps=2)


def settings(method: Any) -> Any:
    if not isinstance(method, pl.Method):
        return FT_HP
    return ROME_HP if isinstance(method.solver, Exact) else HP


def some_texts() -> list[str]:
    """Enough different tokens for second moments of full rank."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(33, 127, (12, 60), generator=generator)
    return ["".join(map(chr, row)) for row in letters.tolist()]


def new_bench(model: Model, folder: Path) -> Bench:
    return Bench(model, folder, some_texts(), hparams=settings)


@pytest.fixture(scope="module")
def bench(gpt2, tmp_path_factory) -> Bench:
    return new_bench(gpt2, tmp_path_factory.mktemp("bench"))


def test_a_bench_has_the_moments_of_all_layers_below_the_last(gpt2, bench):
    sites = {Site(layer, part) for layer in range(3) for part in ("attn", "mlp")}
    assert set(bench.moments) == sites
    want = pl.second_moments(gpt2, some_texts(), [0, 1, 2])
    for site in sites:
        assert bench.moments[site].count == want[site].count
        assert torch.equal(bench.moments[site].total, want[site].total)


def test_a_bench_may_have_the_moments_of_some_layers(gpt2, bench):
    found = Bench(gpt2, bench.folder, some_texts(), hparams=settings, layers=[1]).moments
    assert set(found) == {Site(1, "attn"), Site(1, "mlp")}
    for site, moment in found.items():
        torch.testing.assert_close(moment.total, bench.moments[site].total)


def test_the_bundled_texts_are_taken_where_none_are_given(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "texts", lambda: iter(["Mira Tolan plays.", "The tower of Kel."]))
    found = Bench(gpt2, tmp_path, n_tokens=7).moments
    want = pl.second_moments(gpt2, ["Mira Tolan plays.", "The tower of Kel."], [2], n_tokens=7)
    assert found[Site(2, "mlp")].count == 7
    assert torch.equal(found[Site(2, "mlp")].total, want[Site(2, "mlp")].total)


def test_a_second_bench_computes_nothing_again(gpt2, tmp_path, monkeypatch):
    folder = tmp_path / "made" / "here"
    moments = counting(monkeypatch, second_moments.Summing, "moments")
    optimised = counting(monkeypatch, targets, "optimise")
    first = new_bench(gpt2, folder)
    made = first.targets(Trial(), FACTS)
    assert (len(moments), len(optimised)) == (1, 1)
    second = new_bench(gpt2, folder)
    again = second.targets(Trial(), FACTS)
    assert (len(moments), len(optimised)) == (1, 1)
    assert same(again, made)
    assert second.contexts == first.contexts == sample_contexts(gpt2)
    for site, moment in first.moments.items():
        assert torch.equal(second.moments[site].total, moment.total)
    edits = [b.edit(Trial(), FACTS, t) for b, t in ((first, made), (second, again))]
    assert same_deltas(*edits)
    # λ and the number of layers do not reach the targets; the clamp does.
    second.targets(Trial(change={"second_moment_weight": 3.0}), FACTS)
    second.targets(Trial(change={"layers": (2,)}), FACTS)
    assert len(optimised) == 1
    second.targets(Trial(change={"clamp": 1.0}), FACTS)
    assert len(optimised) == 2


def test_moments_cut_while_written_are_computed_again(gpt2, tmp_path, monkeypatch):
    """Planted: the first attempt ends before the file is whole."""

    def cut(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(file_format, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        new_bench(gpt2, tmp_path)
    monkeypatch.undo()
    assert new_bench(gpt2, tmp_path).moments[Site(2, "mlp")].count > 500


def test_targets_tell_how_far_they_are(bench):
    heard = []
    bench.targets(Trial(), FACTS, lambda *n: heard.append(n))
    assert heard == [(3, 3)]


@pytest.mark.parametrize("name", ["PMET", "ROME", "EMMET"])
def test_an_edit_at_the_bench_is_the_plain_edit(gpt2, bench, name):
    trial = Trial(named(name))
    made = bench.edit(trial, FACTS, bench.targets(trial, FACTS))
    plain = pl.edit(gpt2, FACTS, bench.moments, name, bench.hparams(trial), bench.contexts)
    assert same_deltas(made, plain)
    assert made.facts == tuple(FACTS)
    assert made.method == named(name)


def test_an_edit_finds_the_targets_that_are_kept_or_keeps_them(gpt2, tmp_path, monkeypatch):
    bench = new_bench(gpt2, tmp_path)
    made = bench.edit(Trial(), FACTS)
    found = list((tmp_path / "targets").iterdir())
    assert found
    monkeypatch.setattr(targets, "optimise", lambda *_, **__: pytest.fail("they are kept"))
    assert same_deltas(bench.edit(Trial(), FACTS), made)
    assert same_deltas(bench.edit(Trial(), FACTS, lambda *_: bench.targets(Trial(), FACTS)), made)
    assert list((tmp_path / "targets").iterdir()) == found


@pytest.mark.filterwarnings("ignore:The model recalls only")
def test_facts_that_no_setting_can_edit_are_refused_before_targets_are_found(
    gpt2, bench, monkeypatch
):
    """An exact solver and two facts about one subject: an edit, a comparison and a search say so
    at once, and one fact after the other can be edited."""
    twins = [FACTS[0], replace(FACTS[0], prompt="{} was built by"), FACTS[1]]
    monkeypatch.setattr(targets, "optimise", lambda *_, **__: pytest.fail("targets were found"))
    said = r"facts 0 and 1\) are the same up to the edited token"
    with pytest.raises(pl.SolveError, match=said):
        bench.edit(Trial("EMMET"), twins)
    with pytest.raises(pl.SolveError, match=said):
        pl.compare(bench, {"EMMET": Trial("EMMET")}, twins, baseline="EMMET")
    twins += [replace(twins[0], prompt=f"{{}} is number {n} of") for n in range(5)]
    with pytest.raises(pl.SettingsError, match=r"No setting that was tried .* are the same up to"):
        pl.tune(bench, twins, "EMMET", 64, goal="EA")
    with pytest.raises(pytest.fail.Exception, match="targets were found"):
        bench.edit(Trial("MEMIT"), twins)


def test_what_differs_in_a_trial_is_what_its_edit_has(gpt2, bench):
    usual, small = bench.targets(Trial(), FACTS), Trial(change={"clamp": 0.01})
    rows = [
        (small, replace(HP, clamp=0.01), bench.contexts, bench.targets(small, FACTS)),
        (Trial(prefixes=False), HP, [PLAIN], None),
        (Trial(change={"layers": (2,)}), replace(HP, layers=(2,)), bench.contexts, usual),
        (
            Trial(change={"second_moment_weight": 50.0}),
            replace(HP, second_moment_weight=50.0),
            bench.contexts,
            usual,
        ),
    ]
    edits = [bench.edit(Trial(), FACTS, usual)]
    for trial, hp, contexts, own in rows:
        made = bench.edit(trial, FACTS, own)
        assert (made.hparams, made.contexts) == (hp, tuple(contexts))
        assert same_deltas(made, pl.edit(gpt2, FACTS, bench.moments, pl.PMET, hp, contexts, own))
        site = Site(2, "mlp")
        assert not any(torch.equal(made.deltas[site], other.deltas[site]) for other in edits)
        edits.append(made)


def test_factorisations_are_computed_once_for_every_setting(gpt2, bench, monkeypatch):
    """For the last few settings, that is: memory is bounded."""
    monkeypatch.setattr(bench, "_kept", {})
    calls = counting(monkeypatch, Ridge, "factorise")
    trials = [Trial(change={"second_moment_weight": 1.0 + n}) for n in range(KEPT + 2)]
    found = bench.targets(Trial(), FACTS)
    edits = [bench.edit(trial, FACTS, found) for trial in trials]
    n = len(HP.layers)
    assert len(calls) == n * len(trials)
    assert len(bench._kept) == KEPT
    assert same_deltas(bench.edit(trials[-1], FACTS, found), edits[-1])
    assert len(calls) == n * len(trials)
    assert same_deltas(bench.edit(trials[0], FACTS, found), edits[0])
    assert len(calls) == n * (1 + len(trials))


def test_another_weight_in_the_same_null_space_asks_for_no_eigenvectors(gpt2, bench, monkeypatch):
    """And gives the bits of an edit that asks for its own."""
    monkeypatch.setattr(bench, "_kept", {})
    eigh = counting(monkeypatch, torch.linalg, "eigh")

    def trial(l2: float, threshold: float = 1e9) -> Trial:
        return Trial(replace(pl.ALPHAEDIT, solver=NullSpace(threshold, l2)))

    found = bench.targets(trial(1.0), FACTS)
    edits = [bench.edit(trial(l2), FACTS, found) for l2 in (1.0, 3.0)]
    assert len(eigh) == len(HP.layers)
    own = [
        pl.edit(gpt2, FACTS, bench.moments, trial(l2).method, HP, bench.contexts, found)
        for l2 in (1.0, 3.0)
    ]
    assert all(same_deltas(made, wanted) for made, wanted in zip(edits, own, strict=True))
    assert not same_deltas(*edits)
    before = len(eigh)
    bench.edit(trial(1.0, 1e8), FACTS, found)
    assert len(eigh) == before + len(HP.layers)


def test_a_method_with_its_own_algorithm_has_no_targets(gpt2, bench):
    trial = Trial(pl.FT_W, {"lr": 1e-3})
    hp = replace(FT_HP, lr=1e-3)
    assert bench.hparams(trial) == hp
    assert bench.targets(trial, FACTS) is None
    made = bench.edit(trial, FACTS)
    assert same_deltas(made, pl.edit(gpt2, FACTS, None, pl.FT_W, hp))
    assert not same_deltas(made, pl.edit(gpt2, FACTS, None, pl.FT_W, FT_HP))


@pytest.mark.slow
def test_strengths_are_those_known_for_the_model(bench, monkeypatch):
    monkeypatch.setattr(bench.model, "name", "gpt2-xl")
    usual = Bench(bench.model, bench.folder, some_texts())
    assert usual.hparams(Trial(pl.MEMIT)) == pl.HPARAMS["gpt2-xl"]["MEMIT"]
    assert usual.hparams(Trial(change={"clamp": 9.0})) == replace(
        pl.HPARAMS["gpt2-xl"]["PMET"], clamp=9.0
    )
    assert usual.hparams(Trial(pl.FT_W)) is None  # it looks them up itself
    monkeypatch.setattr(bench.model, "name", "my own")
    with pytest.raises(SettingsError, match="no PMET settings for the model 'my own'"):
        usual.hparams(Trial())


def test_a_chain_shows_the_model_after_every_step(gpt2, bench):
    before, seen = bits(gpt2), []
    site = Site(2, "mlp")
    bench.chain(Trial(pl.MEMIT), FACTS, lambda n: seen.append((n, gpt2.weight(site).clone())), 2)
    assert unchanged(gpt2, before)
    steps = pl.edit_sequentially(
        gpt2, FACTS, bench.moments, pl.MEMIT, HP, bench.contexts, batch_size=2
    )
    assert [n for n, _ in seen] == [2, 3]
    weight = gpt2.weight(site).clone()
    for (_, shown), step in zip(seen, steps, strict=True):
        weight += step.deltas[site]
        assert torch.equal(shown, weight)
    with pytest.raises(TypeError, match="does not edit in steps"):
        bench.chain(Trial(pl.FT_W), FACTS, seen.append)


# -- tables ---------------------------------------------------------------------------------------

TRIALS = {
    "without prefixes": Trial(prefixes=False),
    "PMET": Trial(),
    "ROME": Trial(pl.ROME),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Bench:
    """Of a model that leans to " t", so that edits reach the answers to other prompts."""
    model = tiny_model("gpt2", torch.float64)
    weights, word = model.hf.state_dict(), model.tokenizer(" t").input_ids[0]
    weights["transformer.ln_f.bias"] += 6 * weights["lm_head.weight"][word]
    return new_bench(model, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def compared(planted) -> tuple[pd.DataFrame, list[tuple[int, int]], bool]:
    heard: list[tuple[int, int]] = []
    before = bits(planted.model)
    table = compare(planted, TRIALS, KNOWN, OTHERS, on_trial=lambda *n: heard.append(n))
    return table, heard, unchanged(planted.model, before)


def test_comparing_leaves_the_model_as_it_was(planted, compared):
    assert compared[2]
    assert len(planted.model.live_edits) == 0


def test_every_trial_is_told_in_its_order(compared):
    table, heard, _ = compared
    assert list(table["run"].unique()) == list(TRIALS)
    assert heard == [(n, 3) for n in (1, 2, 3)]
    assert list(table.columns) == [
        "run", "metric", "mean", "ci_low", "ci_high", "n",
        "difference", "difference_low", "difference_high",
    ]  # fmt: skip
    for _, own in table.groupby("run"):
        assert "collateral" in set(own["metric"])
        assert {"ES", "EA", "EM"} <= set(own["metric"])
        assert not own["metric"].duplicated().any()


@pytest.fixture(scope="module")
def measured(planted) -> dict[str, tuple[pd.DataFrame, Any]]:
    """Measured again with plain edits: the rows of `evaluate`, and 100 per other fact right."""
    out = {}
    for name, trial in TRIALS.items():
        hp = planted.hparams(trial)
        contexts = planted.contexts if trial.prefixes else [PLAIN]
        made = pl.edit(planted.model, KNOWN, planted.moments, trial.method, hp, contexts)
        with made.applied(planted.model):
            rows = scoring.evaluate(planted.model, KNOWN)
            right = 100 * scoring.recall(planted.model, OTHERS)["correct"].to_numpy()
        out[name] = (rows, right)
    return out


def test_the_rows_are_those_of_the_edited_model(compared, measured):
    for name, (rows, right) in measured.items():
        want = metrics.summarise(rows)
        own = compared[0][compared[0]["run"] == name].set_index("metric")
        assert list(own.index) == [*want.index, "collateral"]
        got = own.loc[want.index, list(want.columns)]
        assert got.to_numpy() == pytest.approx(want.to_numpy(), rel=1e-6, abs=1e-6)
        collateral = own.loc["collateral", ["mean", "ci_low", "ci_high", "n"]]
        assert list(collateral) == [right.mean(), *metrics.bootstrap(right), len(OTHERS)]


def test_collateral_is_compared_fact_by_fact(compared, measured):
    gaps = {name: own[1] - measured["PMET"][1] for name, own in measured.items() if name != "PMET"}
    assert any(gap.any() for gap in gaps.values())
    for name, gap in gaps.items():
        own = compared[0][compared[0]["run"] == name].set_index("metric")
        assert list(own.loc["collateral", DIFFERENCE]) == [gap.mean(), *metrics.bootstrap(gap)]


def test_a_difference_is_paired(compared, measured):
    for name, (rows, _) in measured.items():
        if name != "PMET":
            want = metrics.paired(rows, measured["PMET"][0])
            own = compared[0][compared[0]["run"] == name].set_index("metric")
            got = own.loc[want.index, DIFFERENCE].to_numpy()
            columns = ["mean", "ci_low", "ci_high"]
            assert got == pytest.approx(want[columns].to_numpy(), rel=1e-6, abs=1e-6)


DIFFERENCE = ["difference", "difference_low", "difference_high"]


def test_the_baseline_has_no_difference_and_the_others_have(compared):
    table = compared[0]
    of_it = table["run"] == "PMET"
    assert table.loc[of_it, DIFFERENCE].isna().all(axis=None)
    assert table.loc[~of_it, DIFFERENCE].notna().all(axis=None)


def test_a_paired_difference_is_the_difference_of_the_means(compared):
    table = compared[0]
    means = table.pivot(index="metric", columns="run", values="mean")
    rows = table[table["run"] != "PMET"]
    pairs = zip(rows["metric"], rows["run"], strict=True)
    want = [means.loc[metric, run] - means.loc[metric, "PMET"] for metric, run in pairs]
    assert rows["difference"].to_numpy() == pytest.approx(want, abs=1e-9)
    assert (rows["difference_low"] <= rows["difference"] + 1e-9).all()
    assert (rows["difference"] <= rows["difference_high"] + 1e-9).all()
    assert rows["difference"].abs().max() > 1


def test_several_baselines_are_those_of_each_and_nothing_is_measured_twice(planted, monkeypatch):
    made, edit = [], planted.edit
    monkeypatch.setattr(planted, "edit", lambda *args: (made.append(args[0]), edit(*args))[1])
    both = compare(planted, TRIALS, KNOWN, OTHERS, ("ROME", "PMET"), front=True)
    assert len(made) == len(TRIALS)
    for name in ("ROME", "PMET"):
        own = both[both["against"] == name].drop(columns="against").reset_index(drop=True)
        alone = compare(planted, TRIALS, KNOWN, OTHERS, name, front=True)
        pd.testing.assert_frame_equal(own, alone)
    with pytest.raises(KeyError, match="MEMIT"):
        compare(planted, TRIALS, KNOWN, OTHERS, ("ROME", "MEMIT"))


def test_a_trial_does_not_differ_from_its_like(planted):
    table = compare(planted, {"a": Trial(), "b": Trial()}, KNOWN, OTHERS, baseline="a")
    twin = table[table["run"] == "b"]
    assert (twin[DIFFERENCE] == 0).all(axis=None)
    assert set(twin["metric"]) == set(table.loc[table["run"] == "a", "metric"])


def test_without_other_facts_there_is_no_collateral(planted, compared):
    table = compare(planted, {"without prefixes": Trial(prefixes=False), "PMET": Trial()}, KNOWN)
    want = compared[0].query("run in ['without prefixes', 'PMET'] and metric != 'collateral'")
    pd.testing.assert_frame_equal(table, want.reset_index(drop=True))


def test_a_baseline_that_is_no_trial_is_refused(bench):
    with pytest.raises(KeyError, match="PMET"):
        compare(bench, {"ROME": Trial(pl.ROME)}, KNOWN)
