"""Probes read what is there, change only what they are told to, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from kept import shared_model
from tiny import FAMILIES, refused, tiny_batch

from pmet_lens.models.activations import add_at, read_streams
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
ROWS = torch.arange(3)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2")


def test_reads_are_the_rows_of_the_full_activations(model):
    ids, mask = tiny_batch()
    early, late = torch.tensor([0, 3, 2]), torch.tensor([9, 7, 5])
    wanted = {(0, "resid_pre"): early, (2, "mlp_out"): late, (1, "attn_out"): late}
    full = {}
    hooks = [
        (model.stream_hook(*key), lambda v, key=key: full.update({key: v.clone()}))
        for key in wanted
    ]
    with torch.no_grad():
        model.forward(ids, mask, hooks=hooks)
    found = read_streams(model, ids, mask, wanted)
    assert list(found) == list(wanted)
    for key, positions in wanted.items():
        assert torch.equal(found[key], full[key][ROWS, positions])
        assert not torch.equal(found[key], full[key][ROWS, positions - 1])
        assert found[key].untyped_storage().nbytes() == found[key].nbytes  # no big tensor kept


@pytest.mark.parametrize("projection, stream", [("attn", "attn_out"), ("mlp", "mlp_out")])
def test_keys_give_the_streams(model, projection, stream):
    ids, mask = tiny_batch()
    positions = torch.tensor([4, 0, 5])
    site = Site(2, projection)
    keys = read_streams(model, ids, mask, {site: positions})[site]
    values = read_streams(model, ids, mask, {(2, stream): positions})[2, stream]
    bias = dict(model.hf.named_parameters()).get(model.parameter_name(site)[:-6] + "bias", 0.0)
    assert keys.shape == (3, model.d_in(site))
    assert torch.allclose(keys @ model.weight(site) + bias, values, atol=1e-5)
    assert not torch.allclose(keys.roll(1, 0) @ model.weight(site) + bias, values, atol=1e-3)


def test_a_key_follows_an_edit_below_it(gpt2):
    ids, mask = tiny_batch()
    positions = torch.tensor([4, 0, 5])
    site, below, above = Site(2, "mlp"), Site(1, "mlp"), Site(3, "mlp")
    before = read_streams(gpt2, ids, mask, {site: positions})[site]
    for changed, moves in ((below, True), (above, False)):
        kept = gpt2.parameter(changed).detach().clone()
        gpt2.weight(changed)[:, ::2] += 0.1
        assert torch.equal(read_streams(gpt2, ids, mask, {site: positions})[site], before) != moves
        gpt2.parameter(changed).data.copy_(kept)
    assert torch.equal(read_streams(gpt2, ids, mask, {site: positions})[site], before)


def test_reading_stops_at_the_highest_layer_needed(gpt2):
    ids, mask = tiny_batch()
    ran = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _a, n=n: ran.append(n))
        for n, block in enumerate(b.original_component for b in gpt2.bridge.blocks)
    ]
    read_streams(gpt2, ids, mask, {(1, "mlp_out"): ROWS})
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_nothing_is_recorded_and_nothing_stays(gpt2):
    ids, mask = tiny_batch()
    found = read_streams(gpt2, ids, mask, {(3, "resid_post"): ROWS})
    assert not found[3, "resid_post"].requires_grad
    assert not any(point.fwd_hooks for point in gpt2.bridge.hook_dict.values())
    assert read_streams(gpt2, ids, mask, {}) == {}


def test_a_delta_is_added_there_and_nowhere_else(model):
    ids, mask = tiny_batch()
    positions = torch.tensor([4, 0, 5])
    delta = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0))
    seen = []
    name = model.stream_hook(1, "mlp_out")
    with torch.no_grad():
        model.forward(ids, mask, hooks=[(name, seen.append)])
        hooks = [(name, add_at(delta, positions)), (name, seen.append)]
        model.forward(ids, mask, hooks=hooks)
    clean, changed = seen
    expected = torch.zeros_like(clean)
    expected[ROWS, positions] = delta
    assert torch.allclose(changed - clean, expected, atol=1e-5)
    untouched = torch.ones(clean.shape[:2], dtype=torch.bool)
    untouched[ROWS, positions] = False
    assert torch.equal(changed[untouched], clean[untouched])


def test_adding_leaves_the_given_activation_alone_and_is_differentiable():
    value = torch.randn(3, 5, 4)
    kept = value.clone()
    delta = torch.zeros(2, 4, requires_grad=True)
    shared = torch.tensor([0, 1, 0])  # prompts 0 and 2 belong to one fact
    out = add_at(delta[shared], torch.tensor([1, 0, 4]))(value)
    weights = torch.arange(60.0).reshape(3, 5, 4)
    (out * weights).sum().backward()
    assert torch.equal(value, kept)
    assert torch.equal(delta.grad[0], weights[0, 1] + weights[2, 4])
    assert torch.equal(delta.grad[1], weights[1, 0])


def test_a_change_cannot_reach_the_past(model):
    ids, mask = tiny_batch(rows=1)
    at = torch.tensor([[0, n] for n in range(10)])
    hook = add_at(torch.full((1, model.d_model), 3.0).cumsum(1), torch.tensor([5]))
    with torch.no_grad():
        clean = model.forward(ids, mask, at=at)
        changed = model.forward(ids, mask, hooks=[(model.stream_hook(1, "mlp_out"), hook)], at=at)
    moved = (clean - changed).abs().amax(1) > 1e-4
    assert not moved[:5].any()
    assert moved[5:].all() or (model.name == "gemma2" and moved[5:].any())  # its window is 5 tokens


@pytest.mark.parametrize("positions", ([10, 0, 0], [0, 8, 0], [-1, 0, 0], [0, 0]))
def test_positions_outside_the_text_are_refused(gpt2, positions):
    ids, mask = tiny_batch()  # rows of 10, 8 and 6 tokens
    with refused("position"):
        read_streams(gpt2, ids, mask, {(1, "mlp_out"): torch.tensor(positions)})


@pytest.mark.parametrize("positions", ([10, 0, 0], [-1, 0, 0], [0, 0]))
def test_deltas_outside_the_batch_are_refused(gpt2, positions):
    ids, mask = tiny_batch()
    hook = add_at(torch.zeros(len(positions), 32), torch.tensor(positions))
    with refused("do not fit"):
        gpt2.forward(ids, mask, hooks=[(gpt2.stream_hook(1, "mlp_out"), hook)])


def test_layers_and_streams_that_do_not_exist_are_refused(gpt2):
    ids, mask = tiny_batch()
    with refused("layers 0 to 3"):
        read_streams(gpt2, ids, mask, {(4, "mlp_out"): ROWS})
    with refused("unknown stream"):
        read_streams(gpt2, ids, mask, {(1, "mlp"): ROWS})
