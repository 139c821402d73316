"""An edit is a value: computing it leaves no mark, reverting restores to the bit, files keep it."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import replace

import jaxtyping
import pytest
import torch
from cases import (
    BOTH,
    CONTEXTS,
    FACTS,
    HP,
    SITES,
    bits,
    same_deltas,
    some_moments,
    unchanged,
)
from kept import shared_model
from safetensors.torch import save_file
from tiny import tiny_batch, tiny_model

import pmet_lens as pl
from pmet_lens.editing import targets as targeting
from pmet_lens.editing.locate_and_edit import Edit, edit
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.editing.targets import Targets, optimise
from pmet_lens.models import tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.models.weights import EditError
from pmet_lens.moments.second_moments import Moment

torch.set_num_threads(1)
FAMILIES = ("gpt2", "gptj", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param)


@pytest.fixture(scope="module")
def found(model) -> Edit:
    return edit(model, FACTS, some_moments(model), BOTH, HP, CONTEXTS)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def targets(gpt2) -> Targets:
    return optimise(gpt2, FACTS, pl.PMET, HP, CONTEXTS)


@pytest.fixture(scope="module")
def done(gpt2, targets) -> Edit:
    return edit(gpt2, FACTS, some_moments(gpt2), BOTH, HP, CONTEXTS, targets)


@pytest.fixture
def again(gpt2, targets):
    """The same edit with something else about it."""

    def build(**change) -> Edit:
        given = dict(
            facts=FACTS,
            moments=some_moments(gpt2),
            method=BOTH,
            hparams=HP,
            contexts=CONTEXTS,
            targets=targets,
        )
        return edit(gpt2, **{**given, **change})

    return build


# -- no mark on the model -------------------------------------------------------------------------


@pytest.mark.parametrize("method", [BOTH, pl.MEMIT], ids=["both projections", "MEMIT"])
def test_computing_an_edit_leaves_no_mark(model, method):
    before = bits(model)
    found = edit(model, FACTS, some_moments(model), method, HP, CONTEXTS)
    assert unchanged(model, before)
    assert list(found.deltas) == [s for s in SITES if s.projection in method.write]
    assert all(delta.any() for delta in found.deltas.values())
    assert len(model.live_edits) == 0


def test_neither_does_one_that_fails_half_way(gpt2, again, monkeypatch):
    """Planted: the third of four sites cannot be solved."""
    before, moments = bits(gpt2), some_moments(gpt2)
    moments[SITES[2]] = torch.zeros_like(moments[SITES[2]])
    with pytest.raises(pl.SolveError, match="not positive definite"):
        again(moments=moments, method=replace(BOTH, solver=Exact()))
    assert unchanged(gpt2, before)


@pytest.mark.parametrize("position", ["last_subject", "first_subject", "last"])
def test_an_exact_solver_refuses_twins_before_anything_is_optimised(gpt2, monkeypatch, position):
    """Two facts that the model reads alike up to the edited token have one key at every layer."""

    def optimised(*_: object, **__: object) -> None:
        pytest.fail("they were optimised")

    monkeypatch.setattr(targeting, "optimise", optimised)
    one = pl.Fact("the red house", "{} is in", "Rome")
    other = pl.Fact("the red house", "{} is owned by", "Ann")
    if position == "last":
        other = pl.Fact("the red", "{} house is in", "Ann")
    facts, moments = [FACTS[0], one, other], some_moments(gpt2)
    emmet = replace(pl.EMMET, position=position)
    said = r"'the red house is in' .*facts 1 and 2\) are the same .*use Ridge\(\)"
    with pytest.raises(pl.SolveError, match=said):
        edit(gpt2, facts, moments, emmet, HP, CONTEXTS)
    # A ridge takes them, and so does one after the other.
    with pytest.raises(pytest.fail.Exception):
        edit(gpt2, facts, moments, pl.MEMIT, HP, CONTEXTS)
    with pytest.raises(pytest.fail.Exception):
        edit(gpt2, facts, moments, replace(emmet, at_once=1), HP, CONTEXTS)


def test_twins_are_told_by_what_is_in_front_of_the_edited_token(gpt2):
    one = pl.Fact("the red house", "{} is in", "Rome")
    others = [replace(one, prompt="Where {} is: in"), replace(one, subject="the red barn")]
    assert tokens.twins(gpt2, [one, *others]) == ""
    assert tokens.twins(gpt2, [one, replace(one, prompt="{} is owned by")], "last") == ""
    assert "(facts 0 and 2)" in tokens.twins(gpt2, [one, others[0], one], "last")
    assert tokens.twins(gpt2, [one]) == ""


def test_gradients_may_be_switched_off(gpt2, done, again):
    with torch.no_grad():
        assert same_deltas(again(targets=None), done)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_holds_inside_the_block_and_to_the_bit_not_behind_it(model, found, fails):
    before = bits(model)
    weights = {site: model.weight(site).clone() for site in SITES}

    def use():
        with found.applied(model) as inside:
            assert inside is model
            for site, weight in weights.items():
                assert torch.equal(model.weight(site), weight + found.deltas[site])
                assert not torch.equal(model.weight(site), weight)
            if fails:
                raise KeyError("planted")

    if fails:
        with pytest.raises(KeyError, match="planted"):
            use()
    else:
        use()
    assert unchanged(model, before)


def test_an_edit_changes_its_own_weights_only(gpt2, done):
    before = bits(gpt2)
    with done.applied(gpt2):
        now = gpt2.hf.state_dict()
        changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {gpt2.parameter_name(site) for site in SITES}


def test_edits_are_taken_back_in_any_order(gpt2, done, again):
    before = bits(gpt2)
    other = again(method=replace(BOTH, spread="linear"))
    for first, second in ((done, other), (other, done)):
        done.apply_(gpt2)
        other.apply_(gpt2)
        first.revert_(gpt2)
        weight = before[gpt2.parameter_name(SITES[3])] + second.deltas[SITES[3]]
        assert torch.equal(gpt2.weight(SITES[3]), weight)
        second.revert_(gpt2)
        assert unchanged(gpt2, before)


def test_an_edit_can_be_computed_on_an_edited_model(gpt2, done, again):
    before = bits(gpt2)
    with done.applied(gpt2):
        edited = bits(gpt2)
        second = again(targets=None)
        assert unchanged(gpt2, edited)
        with second.applied(gpt2):
            pass
        assert unchanged(gpt2, edited)
    assert unchanged(gpt2, before)
    assert not same_deltas(second, done)


def test_applying_twice_and_taking_back_what_is_not_there_are_refused(gpt2, done):
    with pytest.raises(EditError, match="not applied"):
        done.revert_(gpt2)
    with done.applied(gpt2), pytest.raises(EditError, match="already; revert it first"):
        done.apply_(gpt2)
    with pytest.raises(EditError, match="not applied"):
        done.revert_(gpt2)


def test_a_change_from_elsewhere_is_seen(done):
    model = tiny_model("gpt2", torch.float64)
    done.apply_(model)
    model.hf.transformer.h[1].mlp.c_proj.weight.data[0, 0] += 1.0
    with pytest.raises(EditError, match=r"1\.mlp was changed by something else"):
        done.revert_(model)


def test_an_edit_of_another_model_is_refused(done):
    before = bits(other := shared_model("llama", torch.float64))
    with pytest.raises(EditError, match="another model"):
        done.apply_(other)
    assert unchanged(other, before)


def test_a_saved_model_keeps_the_edit(model, found, tmp_path):
    ids, mask = tiny_batch()
    with torch.no_grad():
        before = model.hf(input_ids=ids, attention_mask=mask).logits
        with found.applied(model):
            edited = model.hf(input_ids=ids, attention_mask=mask).logits
            model.hf.save_pretrained(tmp_path)
        loaded = type(model.hf).from_pretrained(tmp_path).eval()
        again = loaded(input_ids=ids, attention_mask=mask).logits
        after = model.hf(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.equal(again[real], edited[real])
    assert torch.equal(after[real], before[real])
    assert not torch.allclose(edited[real], before[real], atol=1e-4)


# -- what an edit holds ---------------------------------------------------------------------------


def test_deltas_are_the_product_of_thin_factors(model, found):
    for site, (left, right) in found.factors.items():
        assert left.shape == (model.d_in(site), len(FACTS))
        assert right.shape == (len(FACTS), model.d_model)
        assert left.dtype == right.dtype == torch.float64
        assert torch.equal(found.deltas[site], (left @ right).float())
        assert found.deltas[site].shape == model.weight(site).shape
        assert torch.linalg.matrix_rank(left @ right) == len(FACTS)


def test_an_edit_knows_what_it_was_computed_on(gpt2, done, again):
    for site, digest in done.base.items():
        weight = gpt2.weight(site).contiguous().numpy()
        assert digest == hashlib.sha256(weight.tobytes()).hexdigest()
    with done.applied(gpt2):
        assert not set(again().base.values()) & set(done.base.values())
    assert again().base == done.base


def test_targets_can_be_used_again(gpt2, done, again):
    fresh = again(targets=None)
    assert same_deltas(fresh, done)
    assert same_deltas(again(targets=fresh.targets), done)
    part = again(facts=FACTS[1:], targets=fresh.targets[1:])
    assert not same_deltas(part, done)
    assert same_deltas(part, again(facts=FACTS[1:], targets=part.targets))


def test_factorisations_are_kept_and_used_again(done, again):
    kept = {}
    assert same_deltas(again(factorised=kept), done)
    assert list(kept) == SITES
    assert same_deltas(again(factorised=kept), done)
    poisoned = {
        site: Ridge().factorise(torch.eye(len(C)), 50.0) for site, C in _sizes(done).items()
    }
    assert not same_deltas(again(factorised=poisoned), done)  # so they are what is used


def _sizes(found: Edit) -> dict[Site, torch.Tensor]:
    return {site: left for site, (left, _) in found.factors.items()}


def test_moments_may_be_tensors_or_moments(gpt2, done, again):
    wrapped = {site: Moment(3 * C, 3) for site, C in some_moments(gpt2).items()}
    found = again(moments=wrapped)
    for site, delta in done.deltas.items():
        assert torch.allclose(found.deltas[site], delta, rtol=1e-9, atol=1e-12)
    assert not same_deltas(again(moments={s: m.total for s, m in wrapped.items()}), done)


def test_the_order_of_the_facts_does_not_matter(done, again, targets):
    found = again(facts=FACTS[::-1], targets=None)
    for site, delta in done.deltas.items():
        assert torch.allclose(found.deltas[site], delta, rtol=1e-6, atol=1e-9)
    assert not same_deltas(again(facts=FACTS[::-1]), done)  # the targets of other facts


# -- the layer loop -------------------------------------------------------------------------------


def inputs_and_outputs(model: Model, site: Site, text: str, read: int):
    """What the user's own projection reads and gives at one token, by plain torch hooks."""
    seen = {}
    name = model.parameter_name(site).removesuffix(".weight")
    module = dict(model.hf.named_modules())[name]
    handle = module.register_forward_hook(
        lambda _module, args, out: seen.update(key=args[0][0, read], value=out[0, read])
    )
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen["key"], seen["value"]


def subject_token(model: Model, template: str, subject: str) -> int:
    return int(tokens.encode(model, [tokens.Prompt(template, subject)]).subject[0])


@pytest.mark.parametrize("spread", ["sqrt", "linear"])
def test_the_loop_is_the_algorithm_of_the_paper(gpt2, targets, again, spread):
    """Keys and residuals read with plain hooks, layer after layer, on a model edited by hand."""
    contexts = [*CONTEXTS, "I was { here. {}"]
    found = again(method=replace(pl.PMET, spread=spread), contexts=contexts)
    moments, before = some_moments(gpt2), bits(gpt2)
    for left, site in ((2, Site(1, "mlp")), (1, Site(2, "mlp"))):
        K, R = [], []
        for i, fact in enumerate(FACTS):
            keys = []
            for context in contexts:
                read = subject_token(gpt2, context.replace("{}", fact.prompt), fact.subject)
                text = context.replace("{}", fact.text)
                keys.append(inputs_and_outputs(gpt2, site, text, read)[0])
            K.append(keys[0] / 2 + (keys[1] + keys[2]) / 4)
            read = subject_token(gpt2, fact.prompt, fact.subject)
            now = inputs_and_outputs(gpt2, Site(2, "mlp"), fact.text, read)[1]
            R.append(targets.values["mlp_out"][i] - now)
        K, R = torch.stack(K), torch.stack(R)
        R = R / (math.sqrt(left) if spread == "sqrt" else left)
        system = HP.second_moment_weight * moments[site] + K.T @ K
        want = torch.linalg.solve(system, K.T @ R)
        assert torch.allclose(found.deltas[site], want, rtol=1e-8, atol=1e-10)
        gpt2.weight(site).add_(want)
    gpt2.hf.load_state_dict(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_edit_at_one_layer_gives_the_targets(family):
    """Then the MLP produces, for every fact's plain prompt, just what it was asked to."""
    model = tiny_model(family, torch.float64)
    method = pl.Method(("mlp_out",), ("mlp",), "linear", Exact())
    hp = replace(HP, layers=(2,))
    found = edit(model, FACTS, some_moments(model), method, hp, ["{}"])
    # Llama's norms and GPT-J's attention compute in float32, so batches differ in rounding.
    tolerance = 1e-8 if family == "gpt2" else 1e-5
    for i, fact in enumerate(FACTS):
        read = subject_token(model, fact.prompt, fact.subject)
        want = found.targets.values["mlp_out"][i]
        before = inputs_and_outputs(model, Site(2, "mlp"), fact.text, read)[1]
        with found.applied(model):
            after = inputs_and_outputs(model, Site(2, "mlp"), fact.text, read)[1]
        assert torch.allclose(after, want, atol=tolerance)
        assert not torch.allclose(before, want, atol=0.1)


def test_a_heavy_past_lets_nothing_change(again):
    light, heavy = (again(hparams=replace(HP, second_moment_weight=w)) for w in (1.0, 1e9))
    for site, delta in heavy.deltas.items():
        assert delta.norm() < 1e-6 * light.deltas[site].norm()


@pytest.mark.parametrize(("layer", "words"), [(0, "resid_pre of"), (2, "mlp_out of")])
def test_nan_in_the_model_is_found(layer, words):
    broken = tiny_model("gpt2")
    broken.weight(Site(layer, "mlp"))[0, 0] = float("nan")
    with pytest.raises(pl.ModelError, match=f"{words} layer 2 is not finite .* look for NaN"):
        edit(broken, FACTS, some_moments(broken), pl.PMET, HP, CONTEXTS)


def test_nan_that_only_the_edit_meets(gpt2, targets):
    """The targets are from before; the keys are read now."""
    broken = tiny_model("gpt2", torch.float64)
    broken.weight(Site(0, "attn"))[0, 0] = float("nan")
    with pytest.raises(pl.ModelError, match=r"blocks\.1\.mlp\.out\.hook_in is not finite"):
        edit(broken, FACTS, some_moments(broken), pl.PMET, HP, CONTEXTS, targets)


# -- files ----------------------------------------------------------------------------------------

SOLVERS = [Ridge(), Ridge(weight=3.0), Exact(), NullSpace(threshold=0.7, l2=2.0)]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_is_saved_is_loaded(gpt2, again, tmp_path, solver):
    before = again(method=replace(BOTH, solver=solver))
    before.save(tmp_path / "edit.safetensors")
    after = Edit.load(tmp_path / "edit.safetensors")
    assert same_deltas(after, before)
    for name in ("facts", "method", "hparams", "contexts", "base", "dtype"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.targets is None
    weights = bits(gpt2)
    with before.applied(gpt2):
        edited = bits(gpt2)
    with after.applied(gpt2):
        assert unchanged(gpt2, edited)
    assert unchanged(gpt2, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_deltas_of_a_file_are_rounded_to_the_weights_dtype(dtype, tmp_path):
    model = tiny_model("gpt2", dtype)
    found = edit(model, FACTS[:2], some_moments(model), pl.PMET, HP, ["{}"])
    found.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(str(tmp_path / "edit.safetensors"))
    assert same_deltas(loaded, found)
    assert {delta.dtype for delta in loaded.deltas.values()} == {dtype}


def test_files_that_are_no_edit_are_refused(done, tmp_path):
    path = tmp_path / "edit.safetensors"
    done.save(path)
    whole = path.read_bytes()
    for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(EditError, match=r"edit\.safetensors cannot be read as an edit"):
            Edit.load(path)
    path.write_text("not a safetensors file")
    with pytest.raises(EditError, match="cannot be read as an edit"):
        Edit.load(path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EditError, match="cannot be read as an edit"):
            Edit.load(missing)
    for metadata in (None, {"format": "pt"}, {"pmet_lens": '{"format": "pmet_lens moments 1"}'}):
        save_file({"1.mlp.left": torch.eye(2)}, path, metadata)
        with pytest.raises(EditError, match="is a safetensors file, but not an edit"):
            Edit.load(path)


# -- refusals and warnings ------------------------------------------------------------------------


def test_a_missing_second_moment_is_named(gpt2, again):
    moments = some_moments(gpt2)
    del moments[Site(2, "attn")]
    have, call = r"1\.attn, 1\.mlp, 2\.mlp", r"second_moments\(model, texts, layers=\[1, 2\]\)"
    with pytest.raises(SettingsError, match=rf"of site 2\.attn is missing .*{have}.*{call}"):
        again(moments=moments)
    assert again(moments=moments, method=pl.PMET)  # which does not write there
    with pytest.raises(SettingsError, match=r"1\.attn is missing \(there are: none\)"):
        again(moments={})


def test_a_second_moment_of_another_model_is_named(gpt2, again):
    moments = {**some_moments(gpt2), Site(1, "mlp"): torch.eye(32)}
    with pytest.raises(
        SettingsError, match=r"1\.mlp is \[32, 32\].* keys have 128 .*another model"
    ):
        again(moments=moments)


def test_a_second_moment_is_a_tensor_or_a_moment(gpt2, again):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(SettingsError, match=r"must be a Tensor or a Moment, not .*str"):
            again(moments=dict.fromkeys(SITES, "C"))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("context", ["I am.", "{} {}", "I am {"])
def test_a_context_needs_one_place_for_the_prompt(again, context):
    with pytest.raises(SettingsError, match=r"context .* needs exactly one \{\}"):
        again(contexts=["{}", context])


def test_targets_of_something_else_are_refused(again, targets):
    with pytest.raises(SettingsError, match=r"are for 3 facts at layer 2; .* 2 facts at layer 2"):
        again(facts=FACTS[:2])
    with pytest.raises(SettingsError, match=r"are for 3 facts at layer 2; .* 3 facts at layer 1"):
        again(hparams=replace(HP, layers=(1,)))
    with pytest.raises(SettingsError, match=r"needs targets for resid_post; .*attn_out, mlp_out"):
        again(method=pl.MEMIT)


def test_facts_and_layers_are_checked_first(again):
    with pytest.raises(pl.FactError, match="contradict each other"):
        again(facts=[*FACTS, replace(FACTS[0], target_new="golf")])
    with pytest.raises(SettingsError, match="at most 2"):
        again(hparams=replace(HP, layers=(1, 3)))


def test_an_answer_that_is_there_already_is_told():
    """Planted: the model answers " t" to everything."""
    model = tiny_model("gpt2", torch.float64)
    word = model.tokenizer(" t")["input_ids"]
    with torch.no_grad():
        model.hf.transformer.ln_f.bias.add_(20 * model.hf.lm_head.weight[word[0]])
    known = replace(FACTS[1], target_new="t")
    some = [FACTS[0], known, FACTS[2]]
    with pytest.warns(UserWarning, match=r"already for 1 of 3 facts.*'The mother tongue of Danel"):
        edit(model, some, some_moments(model), pl.PMET, HP, CONTEXTS, check=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit(model, FACTS, some_moments(model), pl.PMET, HP, CONTEXTS, check=False)
