"""Every family people edit: the same promises, on a tiny random model of each.

What the six families of `tiny.FAMILIES` are held to test by test, all of them are held to here at
once, from the logits to a whole PMET edit, kept, undone and saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kept import shared_model
from pair import CONTEXTS, FACTS, HP
from tiny import FAMILIES, MORE, close, plain_logits, refused, tiny_batch, tiny_hf, tiny_model

import pmet_lens as pl
from pmet_lens.editing import targets
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
WINDOW = 20
"""Shorter than the longest prompt, longer than the padding (a query that sees padding alone is NaN
in float64, in plain transformers too)."""
SITES = [Site(layer, projection) for layer in HP.layers for projection in ("attn", "mlp")]


@pytest.fixture(scope="module", params=(*FAMILIES, *MORE))
def model(request) -> Model:
    return shared_model(request.param, torch.float64, window=WINDOW)


@pytest.fixture(scope="module")
def single(model) -> Model:
    """The same in float32: some families round what they read anew into float64."""
    return shared_model(model.name, window=WINDOW)


@pytest.fixture(scope="module")
def edit(model) -> pl.Edit:
    return pl.edit(model, FACTS, moments(model), pl.PMET, HP, CONTEXTS)


def moments(model: Model) -> dict[Site, torch.Tensor]:
    """Of more random keys than there are dimensions."""
    found = {}
    for site in SITES:
        generator = torch.Generator().manual_seed(site.layer)
        d_in = model.d_in(site)
        text = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
        found[site] = text.T @ text / len(text)
    return found


def weights(model: Model) -> dict[Site, torch.Tensor]:
    return {site: model.weight(site).clone() for site in SITES}


def same(one: dict[Site, torch.Tensor], other: dict[Site, torch.Tensor]) -> bool:
    return all(torch.equal(one[site], other[site]) for site in SITES)


def test_logits_are_those_of_the_plain_model(model):
    ids, mask = tiny_batch()
    with torch.no_grad():
        ours = model.forward(ids, mask)[mask.bool()]
    # Some wrapped norms and rotary angles are computed in another precision.
    assert close(ours, plain_logits(model, ids, mask)[mask.bool()], 1e-6)


def test_value_is_key_times_weight_plus_bias(model):
    ids, mask = tiny_batch()
    parameters = dict(model.hf.named_parameters())
    for site, stream in zip(SITES, ("attn_out", "mlp_out") * 2, strict=True):
        seen = {}
        hooks = [
            (model.key_hook(site), lambda key, seen=seen: seen.update(key=key)),
            (
                model.stream_hook(site.layer, stream),
                lambda value, seen=seen: seen.update(value=value),
            ),
        ]
        with torch.no_grad():
            model.forward(ids, mask, hooks=hooks, stop_at_layer=site.layer + 1)
        name = model.parameter_name(site)
        bias = parameters.get(name.removesuffix("weight") + "bias", 0.0)
        assert close(seen["key"] @ model.weight(site) + bias, seen["value"], 1e-12)
        assert model.weight(site).data_ptr() == parameters[name].data_ptr()


def test_gradient_of_a_delta_is_that_of_plain_hooks(model):
    ids, mask = tiny_batch()
    at = torch.tensor([[0, 9], [1, 7], [2, 5]])
    for stream, projection in (("attn_out", "attn"), ("mlp_out", "mlp")):
        delta = torch.zeros(model.d_model, dtype=model.dtype, requires_grad=True)

        def push(value, delta=delta):
            at_third = torch.zeros(value.shape[:2], dtype=value.dtype)
            at_third[:, 3] = 1
            return value + at_third[..., None] * delta

        hooks = [(model.stream_hook(1, stream), push)]
        logits = model.forward(ids, mask, hooks=hooks, at=at)
        ours = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)[0]
        name = model.parameter_name(Site(1, projection)).removesuffix(".weight")

        def plainly(_module, _args, out, push=push):
            return push(out.reshape(*ids.shape, -1)).reshape(out.shape)  # OPT flattens its tokens

        handle = model.hf.get_submodule(name).register_forward_hook(plainly)
        logits = model.hf(input_ids=ids, attention_mask=mask).logits[at[:, 0], at[:, 1]]
        handle.remove()
        theirs = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)[0]
        assert close(ours, theirs, 1e-5)
        assert theirs.abs().max() > 1e-4


@pytest.mark.few("gpt2", "gptj", "gemma2", "qwen3", "phi")
def test_the_fast_way_finds_what_the_whole_model_finds(model, edit):
    plain = targets.optimise(model, FACTS, pl.PMET, HP, CONTEXTS, fast=False)
    assert edit.targets is not None
    for stream, value in plain.values.items():
        got = edit.targets.values[stream]
        assert close(got, value, 1e-5)
        assert not close(got, plain.clean[stream], 1e-2)


@pytest.mark.few("gpt2", "gptj", "gemma2", "qwen3", "phi")
def test_an_edit_is_kept_undone_and_saved(single, tmp_path):
    model = single
    edit = pl.edit(model, FACTS, moments(model), pl.PMET, HP, CONTEXTS)
    ids, mask = tiny_batch()
    before, real = weights(model), mask.bool()
    clean = plain_logits(model, ids, mask)
    edit.save(tmp_path / "edit.safetensors")
    again = pl.Edit.load(tmp_path / "edit.safetensors")
    edit.apply_(model)
    edited, changed = weights(model), plain_logits(model, ids, mask)
    assert not close(changed[real], clean[real], 1e-4)
    model.hf.save_pretrained(tmp_path / "merged")
    edit.revert_(model)
    assert same(weights(model), before)
    assert torch.equal(plain_logits(model, ids, mask), clean)
    with again.applied(model):
        assert same(weights(model), edited)
    merged = type(model.hf).from_pretrained(tmp_path / "merged", dtype=model.dtype).eval()
    with torch.no_grad():
        loaded = merged(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(loaded[real], changed[real])


@pytest.mark.few("gpt2", "llama", "gptj")
def test_an_adapter_says_what_the_edited_model_says(single, tmp_path):
    from peft import PeftModel

    method = replace(pl.PMET, write=("attn", "mlp"))
    edit = pl.edit(single, FACTS, moments(single), method, HP, CONTEXTS)
    ids, mask = tiny_batch()
    clean = plain_logits(single, ids, mask)[mask.bool()]
    with edit.applied(single):
        wanted = plain_logits(single, ids, mask)[mask.bool()]
    edit.to_peft(tmp_path)
    served = PeftModel.from_pretrained(tiny_hf(single.name, window=WINDOW), str(tmp_path))
    with torch.no_grad():
        got = served(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        with served.disable_adapter():
            off = served(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        merged: Any = served.merge_and_unload()
        within = merged(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert close(got, wanted, 1e-5)
    assert close(within, wanted, 1e-5)
    assert torch.equal(off, clean)
    assert not close(wanted, clean, 1e-3)


@pytest.mark.few("gpt2", "neox", "gemma3")
def test_both_components_can_be_written(model):
    method = replace(pl.PMET, write=("attn", "mlp"))
    before = weights(model)
    found = pl.edit(model, FACTS, moments(model), method, HP, CONTEXTS)
    assert set(found.factors) == set(SITES)
    assert same(weights(model), before)


def test_what_is_no_single_matrix_is_refused_with_the_reason():
    from tiny import tiny_tokenizer

    with refused("mixture of experts"):
        pl.load(tiny_hf("mixtral"), tiny_tokenizer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", (*FAMILIES, *MORE))
def test_half_precision_says_the_same_of_a_block(family, dtype) -> None:
    """What a change of a stream does in its layer, and whether a past can be used, is found by
    trying, and is not rounding. OLMo, which TransformerLens 4.3 cannot run in half precision, is
    refused."""
    if family.startswith("olmo"):
        with refused(rf"cannot run '{family}' in .*: load it with dtype=\"float32\""):
            tiny_model(family, dtype)
        return
    exact, half = (shared_model(family, d, window=WINDOW) for d in (torch.float64, dtype))
    for stream in ("attn_out", "mlp_out"):
        assert half.enters_output(stream) == exact.enters_output(stream)
    assert half.parallel_blocks == exact.parallel_blocks
    assert half.from_layer(1).has_past == exact.from_layer(1).has_past
