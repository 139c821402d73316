"""The adapter adds nothing and loses nothing: same logits, same weights, same gradients as HF."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import (
    FAMILIES,
    PARALLEL,
    close,
    plain_logits,
    refused,
    tiny_batch,
    tiny_hf,
    tiny_model,
    tiny_tokenizer,
)

from pmet_lens.models import loading
from pmet_lens.models import model as model_file
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
SITES = [Site(layer, projection) for layer in (0, 2) for projection in ("attn", "mlp")]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return tiny_model("gpt2")


# -- the same numbers as the plain model ---------------------------------------------------------


def test_logits_are_those_of_the_plain_model(model):
    ids, mask = tiny_batch()
    real = mask.bool()
    with torch.no_grad():
        ours = model.forward(ids, mask)
    assert close(ours[real], plain_logits(model, ids, mask)[real], 1e-6)
    assert not torch.allclose(ours[real], plain_logits(model, ids + 1, mask)[real])


@pytest.mark.parametrize("site", SITES, ids=str)
def test_value_is_key_times_weight_plus_bias(model, site):
    ids, mask = tiny_batch()
    seen = {}
    stream = {"attn": "attn_out", "mlp": "mlp_out"}[site.projection]
    hooks = [
        (model.key_hook(site), lambda key: seen.update(key=key)),
        (model.stream_hook(site.layer, stream), lambda value: seen.update(value=value)),
    ]
    with torch.no_grad():
        model.forward(ids, mask, hooks=hooks, stop_at_layer=site.layer + 1)
    bias = dict(model.hf.named_parameters()).get(model.parameter_name(site)[:-6] + "bias", 0.0)
    assert seen["key"].shape == (*ids.shape, model.d_in(site))
    assert model.weight(site).shape == (model.d_in(site), model.d_model)
    assert close(seen["key"] @ model.weight(site) + bias, seen["value"], 1e-6)
    other = model.weight(Site(site.layer + 1, site.projection))
    assert not torch.allclose(seen["key"] @ other + bias, seen["value"], atol=1e-3)


def test_streams_of_a_block_add_up(model):
    """resid_post - resid_pre is attn_out + mlp_out, unless a post-norm stands between."""
    ids, mask = tiny_batch()
    seen = {}
    streams = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    hooks = [
        (model.stream_hook(1, stream), lambda v, stream=stream: seen.update({stream: v}))
        for stream in streams
    ]
    with torch.no_grad():
        out = model.forward(ids, mask, hooks=hooks, stop_at_layer=2)
    assert torch.equal(out, seen["resid_post"])
    total = seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"]
    same = torch.allclose(total, seen["resid_post"], atol=1e-5)
    assert same == (model.name != "gemma2")


def test_parallel_blocks_are_found_by_trying(model):
    assert model.parallel_blocks == (model.name in PARALLEL)


def test_parallel_is_not_read_off_the_family():
    """NeoX can be configured either way; the name of the architecture does not tell."""
    hf = tiny_hf("neox")
    hf.config.use_parallel_residual = False
    for block in hf.gpt_neox.layers:
        block.use_parallel_residual = False
    assert not loading.load(hf, tiny_tokenizer()).parallel_blocks


def test_only_the_asked_logits_are_computed(model):
    ids, mask = tiny_batch()
    at = torch.tensor([[0, 9], [1, 3], [2, 0], [0, 0]])
    shapes = []
    with torch.no_grad():
        whole = model.forward(ids, mask)
        hooks = [("unembed.hook_out", lambda value: shapes.append(value.shape[:-1]))]
        some = model.forward(ids, mask, hooks=hooks, at=at)
    assert shapes == [(1, 4)]
    assert close(some, whole[at[:, 0], at[:, 1]], 1e-6)
    assert not torch.allclose(some, whole[at[:, 0], at[:, 1]].roll(1, 0))


# -- the twin shares weights and leaves the user's model alone ------------------------------------


@pytest.mark.parametrize("site", SITES, ids=str)
def test_weight_is_a_live_view_of_the_users_parameter(model, site):
    parameter = dict(model.hf.named_parameters())[model.parameter_name(site)]
    view = model.weight(site)
    assert parameter is model.parameter(site)
    assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert not view.requires_grad


def test_an_edit_reaches_both_models_and_survives_saving(tmp_path):
    for family in FAMILIES:
        model = tiny_model(family)
        ids, mask = tiny_batch()
        real = mask.bool()
        before = plain_logits(model, ids, mask)
        model.weight(Site(1, "mlp"))[:, ::2] += 0.1  # not a constant: a layer norm would drop it
        after = plain_logits(model, ids, mask)
        assert not torch.allclose(before[real], after[real], atol=1e-4)
        with torch.no_grad():
            assert close(model.forward(ids, mask)[real], after[real], 1e-6)
        model.hf.save_pretrained(tmp_path / family)
        reloaded = type(model.hf).from_pretrained(tmp_path / family).eval()
        with torch.no_grad():
            again = reloaded(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(again[real], after[real]), family


def test_the_users_model_is_left_as_it_was(model):
    hf = tiny_hf(model.name).train()
    frozen = next(hf.parameters()).requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in hf.state_dict().items()}
    modules = [type(module) for module in hf.modules()]
    config = hf.config.to_dict()
    ours = loading.load(hf, tiny_tokenizer())
    ids, mask = tiny_batch()
    delta = torch.zeros(32, requires_grad=True)
    hooks = [(ours.stream_hook(1, "mlp_out"), lambda value: value + delta)]
    ours.forward(ids, mask, hooks=hooks).sum().backward()
    ours.from_layer(2)
    assert state.keys() == hf.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in hf.state_dict().items())
    assert modules == [type(module) for module in hf.modules()]
    assert config == hf.config.to_dict()
    assert all(module.training for module in hf.modules())
    assert not any(module.training for module in ours.bridge.modules())
    assert [p for p in hf.parameters() if not p.requires_grad] == [frozen]
    assert all(parameter.grad is None for parameter in hf.parameters())
    assert not any(module._forward_hooks for module in hf.modules())


def test_a_copy_with_weights_of_its_own_is_refused(monkeypatch):
    """Planted fault: a plain deep copy, whose edits the user's model would never see."""
    monkeypatch.setattr(model_file, "copy_sharing_weights", copy.deepcopy)
    with refused("does not share the weight"):
        tiny_model("gpt2")


# -- gradients ------------------------------------------------------------------------------------


def hf_gradients(model: Model, ids, mask, at):
    """The same deltas on the same quantities, by plain torch hooks on the user's model."""
    delta = torch.zeros(2, model.d_model, requires_grad=True)
    modules = dict(model.hf.named_modules())

    def hook(n):
        def forward_hook(_module, _args, out):
            value = out.reshape(*ids.shape, -1)  # OPT flattens batch and token here
            value = torch.cat([value[:, :3], value[:, 3:4] + delta[n], value[:, 4:]], 1)
            return value.reshape(out.shape)

        return forward_hook

    names = [model.parameter_name(Site(1, projection)) for projection in ("attn", "mlp")]
    owners = [modules[name.removesuffix(".weight")] for name in names]
    handles = [owner.register_forward_hook(hook(n)) for n, owner in enumerate(owners)]
    logits = model.hf(input_ids=ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    return torch.autograd.grad(logits[at[:, 0], at[:, 1]].logsumexp(-1).sum(), delta)[0]


def test_gradient_of_a_delta_is_that_of_plain_hooks(model):
    ids, mask = tiny_batch()
    at = torch.tensor([[0, 9], [1, 7], [2, 5]])
    delta = torch.zeros(2, model.d_model, requires_grad=True)

    def hook(n):
        return lambda v: torch.cat([v[:, :3], v[:, 3:4] + delta[n], v[:, 4:]], 1)

    hooks = [
        (model.stream_hook(1, stream), hook(n)) for n, stream in enumerate(("attn_out", "mlp_out"))
    ]
    logits = model.forward(ids, mask, hooks=hooks, at=at)
    ours = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)[0]
    theirs = hf_gradients(model, ids, mask, at)
    assert close(ours, theirs, 1e-5)
    assert theirs.abs().max() > 1e-3
    # 1-method.md, section 10: in parallel blocks both deltas enter the same sum.
    assert torch.allclose(theirs[0], theirs[1], atol=1e-5) == model.parallel_blocks


def test_names():
    assert loading.load(tiny_hf("gptj"), tiny_tokenizer()).name == "gptj"
    assert tiny_model("neox").name == "neox"


def test_sites_are_ordered_and_parse_what_they_print():
    sites = [Site(10, "attn"), Site(2, "mlp"), Site(2, "attn")]
    assert [str(site) for site in sorted(sites)] == ["2.attn", "2.mlp", "10.attn"]
    assert all(Site.parse(str(site)) == site for site in sites)
    for wrong in ("5", "mlp.5", "-1.mlp", "5.mlp.out", "5.ffn"):
        with refused("site|projection"):
            Site.parse(wrong)


# -- refusals, each in words ----------------------------------------------------------------------


def test_layers_streams_and_projections_are_checked(gpt2):
    with refused("layers 0 to 3"):
        gpt2.weight(Site(4, "mlp"))
    with refused("layers 0 to 3"):
        gpt2.stream_hook(-1, "mlp_out")
    with refused("attn_in, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post"):
        gpt2.stream_hook(1, "ffn_out")
    with refused("attn, mlp"):
        Site(1, "ffn")
    with refused("count from 0"):
        Site(-1, "mlp")
    assert gpt2.check_layer(3) == 3


def test_what_cannot_be_edited_is_refused():
    with refused("needs its tokenizer"):
        loading.load(tiny_hf("gpt2"))
    with refused("pad_token = tokenizer.eos_token"):
        loading.load(tiny_hf("gpt2"), tiny_tokenizer(pad=False))
    with refused(r"hf\.to"):
        loading.load(tiny_hf("gpt2"), tiny_tokenizer(), dtype="float64")
    with refused("mixture of experts"):
        loading.load(tiny_hf("mixtral"), tiny_tokenizer())
    quantised = tiny_hf("llama")
    down = quantised.model.layers[1].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with refused("quantised"):
        loading.load(quantised, tiny_tokenizer())


def test_importing_the_model_is_light():
    import subprocess
    import sys

    code = (
        "import sys, pmet_lens.models.loading, pmet_lens.models.activations; "
        "sys.exit(bool({'transformers', 'transformer_lens'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
