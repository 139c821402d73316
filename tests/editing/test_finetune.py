"""Fine-tuning is Adam on one weight, within its bound, and leaves no mark."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from cases import FACTS, bits, unchanged
from kept import bundled, shared_model
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.editing.finetune import HPARAMS, FineTune, FineTuneHparams, rewrites
from pmet_lens.editing.method import SettingsError
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
HP = FineTuneHparams(layer=2, lr=2e-2, n_steps=40)
SITE = Site(2, "mlp")
FAMILIES = ("gpt2", "gptj")  # Conv1D and Linear


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


def history(model: Model, method=FineTune(), **change):  # noqa: B008
    seen = []
    hp = replace(HP, **change)
    found = method.edit(model, FACTS, hparams=hp, on_step=lambda n, x: seen.append((n, x["loss"])))
    return found, seen


def test_the_loss_falls_and_the_new_answers_are_said(model):
    before, flags = bits(model), [p.requires_grad for p in model.hf.parameters()]
    found, seen = history(model)
    assert unchanged(model, before)
    assert flags == [p.requires_grad for p in model.hf.parameters()]
    assert all(p.grad is None for p in model.hf.parameters())
    losses = torch.stack([x for _, x in seen])
    assert losses.shape[1] == len(FACTS)
    # The norm in front of a tiny unembedding keeps probabilities small: 3 nats are its limit.
    assert (losses[-1] < 0.6 * losses[0]).all()
    said = pl.evaluate(model, FACTS).query("kind == 'rewrite'")["correct"]
    assert not said.any()
    with found.applied(model):
        after = pl.evaluate(model, FACTS).query("kind == 'rewrite'")["correct"]
        assert after.sum() >= max(2, said.sum() + 1)
        now = model.hf.state_dict()
        changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert changed == {model.parameter_name(SITE)}
    assert unchanged(model, before)


def test_the_hook_says_what_the_changed_weight_says(model):
    """The loss of the last pass, once more with the change as it was then in the weight."""
    short, _ = history(model, n_steps=3)
    _, seen = history(model, n_steps=4)
    with short.applied(model), torch.no_grad():
        losses = -likelihood.answers(model, tokens.encode(model, rewrites(FACTS)), mean=True)
    assert torch.allclose(losses, seen[-1][1], rtol=1e-10)


def test_an_exception_in_between_leaves_no_mark(model):
    before, flags = bits(model), [p.requires_grad for p in model.hf.parameters()]

    def fail(step, losses):
        if step == 2:
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        FineTune().edit(model, FACTS, hparams=HP, on_step=fail)
    assert unchanged(model, before)
    assert flags == [p.requires_grad for p in model.hf.parameters()]


@pytest.mark.parametrize(("decay", "size"), [(0.0, 64), (0.5, 64), (0.0, 2)])
def test_it_is_plain_adam_on_the_hugging_face_parameter(model, decay, size):
    """Against a loop that knows nothing of hooks: transformers, autograd and torch's own Adam."""
    found, _ = history(model, n_steps=5, weight_decay=decay, batch_size=size, stop_loss=0.0)
    before = bits(model)
    batch, parameter = tokens.encode(model, rewrites(FACTS)), model.parameter(SITE)
    optimiser = torch.optim.Adam([parameter], lr=HP.lr, weight_decay=decay)
    for _ in range(5):
        for rows in torch.arange(len(FACTS)).split(size):
            own = batch[rows]
            log_p = model.hf(own.ids, attention_mask=own.mask).logits.log_softmax(-1)
            taken = -log_p.gather(-1, own.labels.clamp(min=0)[..., None])[..., 0] * own.scored
            optimiser.zero_grad()
            (taken.sum(1) / own.scored.sum(1)).mean().backward()
            optimiser.step()
    change = model.weight(SITE) - (parameter_before(model, before))
    with torch.no_grad():
        parameter.copy_(before[model.parameter_name(SITE)])
    model.hf.zero_grad(set_to_none=True)
    assert change.abs().max() > 1e-2
    # Adam divides by the root of the squared gradient: the sign of a rounding error is a full step.
    assert torch.allclose(found.deltas[SITE], change, rtol=1e-5, atol=1e-8)
    assert unchanged(model, before)


def parameter_before(model: Model, before) -> torch.Tensor:
    stored = before[model.parameter_name(SITE)]
    return stored if stored.shape == model.weight(SITE).shape else stored.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [5e-5, 1e-3, 0.1 + 0.2])
def test_the_bound_holds_exactly_where_constrained_and_only_there(dtype, bound):
    model = tiny_model("gpt2", dtype)
    kept, seen = history(model, FineTune(constrained=True), norm_constraint=bound, n_steps=6)
    free, _ = history(model, n_steps=6)
    change = (kept.factors[SITE][0] @ kept.factors[SITE][1]).abs().max()
    assert float(change) <= bound
    if bound < 0.01:
        assert float(change) > 0.99 * bound
        assert float(free.deltas[SITE].abs().max()) > 2 * bound
    assert seen[-1][1].mean() < seen[0][1].mean()


def test_it_stops_when_a_pass_is_good_enough(model):
    found, seen = history(model, stop_loss=4.0)
    assert seen[-1][1].mean() < 4
    assert all(x.mean() >= 4 for _, x in seen[:-1])
    assert [n for n, _ in seen] == list(range(len(seen)))
    nothing, once = history(model, stop_loss=1e3)
    assert len(once) == 1
    assert not nothing.deltas[SITE].any()
    assert found.deltas[SITE].any()


def test_the_edit_is_a_value_like_any_other(model, tmp_path):
    found, _ = history(model, n_steps=2)
    assert found.method == FineTune()
    assert found.hparams == replace(HP, n_steps=2)
    left, right = found.factors[SITE]
    assert left.dtype == right.dtype == torch.float64
    assert torch.equal(right, torch.eye(model.d_model).double())
    found.save(tmp_path / "ft.safetensors")
    again = pl.Edit.load(tmp_path / "ft.safetensors")
    assert torch.equal(again.deltas[SITE], found.deltas[SITE])
    assert again.method.name == "FineTune"
    assert again.hparams.values == asdict(found.hparams)


def test_gradients_may_be_switched_off(model):
    with torch.no_grad():
        inside, _ = history(model, n_steps=2)
    assert torch.equal(inside.deltas[SITE], history(model, n_steps=2)[0].deltas[SITE])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer": -1}, "layer must be a whole number ≥ 0"),
        ({"n_steps": 0}, "n_steps must be a whole number ≥ 1"),
        ({"batch_size": 0}, "batch_size must be a whole number ≥ 1"),
        ({"lr": 0.0}, "must be greater than 0"),
        ({"lr": math.nan}, "lr must be a number ≥ 0"),
        ({"norm_constraint": 0.0}, "must be greater than 0"),
        ({"norm_constraint": -1.0}, "norm_constraint must be a number ≥ 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a number ≥ 0"),
        ({"stop_loss": math.inf}, "stop_loss must be a number ≥ 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, match):
    with pytest.raises(SettingsError, match=match):
        replace(HP, **change)


def test_bound_and_method_belong_together():
    model = tiny_model()
    with pytest.raises(SettingsError, match="constrained FineTune needs a norm_constraint"):
        FineTune(constrained=True).edit(model, FACTS, hparams=HP)
    with pytest.raises(SettingsError, match=r"norm_constraint=0\.1"):
        FineTune().edit(model, FACTS, hparams=replace(HP, norm_constraint=0.1))
    with pytest.raises(SettingsError, match=r"no fine-tuning settings for the model 'gpt2'"):
        FineTune().edit(model, FACTS)
    with pytest.raises(pl.ModelError, match="layer 9 does not exist"):
        FineTune().edit(model, FACTS, hparams=replace(HP, layer=9))
    with pytest.raises(pl.FactError, match="no facts to edit"):
        FineTune().edit(model, [], hparams=HP)
    for own in HPARAMS.values():
        assert all(bounded == (hp.norm_constraint is not None) for bounded, hp in own.items())


def test_the_listed_methods_edit_a_bundled_model_through_the_front_door(tmp_path):
    model, facts = bundled("world"), pl.counterfact(n=2)
    before = bits(model)
    for name in ("FT-W", "FT+L"):
        found = pl.edit(model, facts, None, pl.METHODS[name])
        with found.applied(model):
            assert pl.summarise(pl.evaluate(model, facts)).loc["ES", "mean"] == 100
        found.save(tmp_path / "edit.safetensors")
        again = pl.Edit.load(tmp_path / "edit.safetensors")
        assert all(torch.equal(again.deltas[s], found.deltas[s]) for s in found.deltas)
        again.save(tmp_path / "again.safetensors")
        assert pl.Edit.load(tmp_path / "again.safetensors").method == again.method
    assert unchanged(model, before)
