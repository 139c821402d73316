"""A copy runs like its model, alone or from a block on, and no hook outlives its pass."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    FAMILIES,
    N_LAYERS,
    close,
    plain_logits,
    refused,
    tiny_batch,
    tiny_hf,
    tiny_model,
    tiny_tokenizer,
)

from pmet_lens.models import bridge, loading
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return tiny_model("gpt2")


def n_hooks(model: Model) -> int:
    points = {id(p): p for p in model.bridge.hook_dict.values()}.values()
    return sum(len(p.fwd_hooks) + len(p._forward_hooks) for p in points)


def test_dropout_is_off_in_the_copy_only():
    hf = tiny_hf("gpt2").train()
    model = loading.load(hf, tiny_tokenizer())
    ids, mask = tiny_batch()
    with torch.no_grad():
        assert torch.equal(model.forward(ids, mask), model.forward(ids, mask))
    assert not torch.equal(plain_logits(model, ids, mask), plain_logits(model, ids, mask))


def test_no_gradient_is_recorded_for_weights(model):
    ids, mask = tiny_batch()
    assert any(p.requires_grad for p in model.hf.parameters())
    assert not model.forward(ids, mask).requires_grad
    assert model.hf(input_ids=ids, attention_mask=mask).logits.requires_grad


# -- the tail -------------------------------------------------------------------------------------


@pytest.mark.few("*-dtype0-*", "gpt2-*")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_tail_gives_the_logits_of_the_whole_model(family, dtype, tolerance):
    model = tiny_model(family, dtype)
    ids, mask = tiny_batch()
    real = mask.bool()
    at = torch.tensor([[0, 9], [1, 7]])
    for first in range(N_LAYERS):
        kept = []
        push = torch.linspace(-1, 1, 32, dtype=dtype)
        changed = [(model.stream_hook(first, "attn_out"), lambda v: v + push)]  # noqa: B023
        record = [(model.stream_hook(first, "resid_pre"), kept.append)]
        tail = model.from_layer(first)
        with torch.no_grad():
            whole = model.forward(ids, mask, hooks=record)
            assert close(tail.forward(kept[0], mask)[real], whole[real], tolerance)
            assert close(tail.forward(kept[0], mask, at=at), whole[at[:, 0], at[:, 1]], tolerance)
            pushed = model.forward(ids, mask, hooks=changed)
            assert close(tail.forward(kept[0], mask, hooks=changed)[real], pushed[real], tolerance)
            assert not torch.allclose(whole[real], pushed[real])
            assert not torch.allclose(tail.forward(kept[0] + push, mask)[real], whole[real])


def test_tail_has_the_live_weights_and_only_its_own_layers(gpt2):
    tail = gpt2.from_layer(2)
    residual, mask, ran = torch.randn(1, 3, 32), torch.ones(1, 3).long(), []
    handles = [
        block.register_forward_hook(lambda *_, n=n: ran.append(n))
        for blocks in (gpt2._plain.all, gpt2._wrapped.blocks.all)
        for n, block in enumerate(blocks)
    ]
    watched = [(gpt2.stream_hook(2, "mlp_out"), lambda v: None)]  # makes it run wrapped
    with torch.no_grad():
        before = [tail.forward(residual, mask, hooks=hooks) for hooks in ((), watched)]
        assert ran == 2 * [*range(2, N_LAYERS)]
        with gpt2.restored([Site(3, "mlp")]):
            gpt2.weight(Site(3, "mlp")).add_(0.1)
            after = [tail.forward(residual, mask, hooks=hooks) for hooks in ((), watched)]
    for handle in handles:
        handle.remove()
    for one, other in zip(before, after, strict=True):
        assert not torch.allclose(one, other)
    with refused("below block 2"):
        hooks = [(gpt2.stream_hook(1, "mlp_out"), lambda v: v)]
        tail.forward(residual, torch.ones(1, 3).long(), hooks=hooks)
    with refused("layers 0 to 3"):
        gpt2.from_layer(N_LAYERS)


def test_a_tail_that_differs_from_the_whole_model_is_refused(monkeypatch):
    """Planted fault: the block list begins one block too late."""
    gpt2, begin = tiny_model("gpt2"), bridge.Blocks._begin
    monkeypatch.setattr(bridge.Blocks, "_begin", lambda self, n: begin(self, n + (n > 0)))
    with refused("run the whole model"):
        gpt2.from_layer(2)


def test_a_tail_below_those_that_were_tried_is_compared_again(monkeypatch):
    """Planted fault: where block 1 is to be the first, the list begins one block too late."""
    gpt2, begin = tiny_model("gpt2"), bridge.Blocks._begin
    gpt2.from_layer(2)  # the middle, where everything is tried
    monkeypatch.setattr(bridge.Blocks, "_begin", lambda self, n: begin(self, n + (n == 1)))
    assert gpt2.from_layer(3).has_past
    with refused("run the whole model"):
        gpt2.from_layer(1)


# -- hooks never stay -----------------------------------------------------------------------------


def test_hooks_are_gone_after_a_pass_and_after_an_exception(gpt2):
    ids, mask = tiny_batch()
    flags = [p.requires_grad for p in gpt2.hf.parameters()]
    calls = []

    def failing(value):
        calls.append(n_hooks(gpt2))
        raise RuntimeError("as planned")

    before = n_hooks(gpt2)
    gpt2.forward(ids, mask, hooks=[(gpt2.stream_hook(1, "mlp_out"), lambda v: v + 1)])
    assert n_hooks(gpt2) == before
    with pytest.raises(RuntimeError, match="as planned"):
        gpt2.forward(ids, mask, hooks=[(gpt2.stream_hook(1, "mlp_out"), failing)])
    assert calls[0] > before == n_hooks(gpt2)
    assert flags == [p.requires_grad for p in gpt2.hf.parameters()]
    with torch.no_grad():
        assert close(
            gpt2.forward(ids, mask)[mask.bool()], plain_logits(gpt2, ids, mask)[mask.bool()], 1e-6
        )


def test_hooks_of_one_name_run_in_order_and_keys_can_be_replaced(model):
    ids, mask = tiny_batch()
    site = Site(1, "attn")
    order, seen = [], {}
    hooks = [
        (model.key_hook(site), lambda key: order.append(1) or key * 0),
        (model.key_hook(site), lambda key: order.append(2) or seen.update(key=key)),
        (model.stream_hook(1, "attn_out"), lambda value: seen.update(value=value)),
    ]
    with torch.no_grad():
        model.forward(ids, mask, hooks=hooks, stop_at_layer=2)
    assert order == [1, 2]
    assert seen["key"].abs().max() == 0
    assert (seen["value"] == seen["value"][0, 0]).all()  # the bias, or nothing


def test_batches_and_hooks_are_checked(gpt2):
    ids, mask = tiny_batch()
    with refused("pad on the right"):
        gpt2.forward(ids, mask.flip(1))
    with refused("pad on the right"):
        gpt2.forward(ids, torch.zeros_like(mask))
    with refused("differ in shape"):
        gpt2.forward(ids, mask[:, :-1])
    with refused("no hook 'blocks.1.nowhere'"):
        gpt2.forward(ids, mask, hooks=[("blocks.1.nowhere", lambda v: v)])
    late = [(gpt2.stream_hook(2, "mlp_out"), lambda v: v)]
    with refused("would never run"):
        gpt2.forward(ids, mask, hooks=late, stop_at_layer=2)
    with refused("1 to 4"):
        gpt2.forward(ids, mask, stop_at_layer=5)


def test_a_copy_is_whole_again_after_a_tail_has_run(gpt2):
    """Also where a hook fails: modules, their mode, the config."""
    blocks, ids = gpt2._wrapped.blocks, torch.zeros(1, 3).long()
    before = [(name, module.training) for name, module in gpt2.bridge.named_modules()]
    tail, residual = gpt2.from_layer(2), torch.zeros(1, 3, 32)

    def fail(value):
        assert len(blocks.parent.h) == N_LAYERS - 2
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        tail.forward(residual, torch.ones_like(ids), hooks=[(gpt2.stream_hook(3, "mlp_out"), fail)])
    tail.forward(residual, torch.ones_like(ids))
    assert [(name, module.training) for name, module in gpt2.bridge.named_modules()] == before
    assert list(blocks.parent.h) == blocks.all
