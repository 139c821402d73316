"""MEND: gradients in two factors, an editor that begins as the identity, and one that learns."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FACTS, bits, unchanged
from kept import shared_model
from safetensors.torch import save_file
from tiny import tiny_batch, tiny_model

import pmet_lens as pl
from pmet_lens.editing.finetune import rewrites
from pmet_lens.editing.mend import Mend, MendEditor, MendHparams, gradients
from pmet_lens.editing.mend_training import MendTraining, edited, objective, train_editor
from pmet_lens.editing.method import SettingsError
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.models.weights import EditError

torch.set_num_threads(1)
SITES = (Site(1, "mlp"), Site(2, "mlp"))
LOCALITY = [tokens.Prompt("The harbour city of Vell stands in", None, "Ilmar")]
BUNDLED = Path(pl.__file__).parent / "bundled" / "mend"


@pytest.fixture(scope="module", params=["gpt2", "neox"])  # Conv1D and Linear
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


def editor_for(model: Model, rate: float = 0.5, noise: float = 0.0) -> MendEditor:
    editor = MendEditor.of(model, SITES, rank=4, rate=rate)
    with torch.no_grad():
        for p in editor.parameters():
            p.add_(noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return editor


def true_gradients(model: Model, fact: pl.Fact) -> dict[Site, torch.Tensor]:
    """From transformers and autograd alone, as `[d_in, d_model]`."""
    batch = tokens.encode(model, rewrites([fact]))
    log_p = model.hf(batch.ids, attention_mask=batch.mask).logits.log_softmax(-1)
    taken = -log_p.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    found = torch.autograd.grad(
        taken[batch.scored].mean(), [model.parameter(site) for site in SITES]
    )
    return {
        site: g if g.shape == model.weight(site).shape else g.T
        for site, g in zip(SITES, found, strict=True)
    }


def test_keys_and_output_gradients_multiply_to_the_weight_gradient(model):
    before, flags = bits(model), [p.requires_grad for p in model.hf.parameters()]
    pairs, losses = gradients(model, FACTS, SITES)
    assert unchanged(model, before)
    assert flags == [p.requires_grad for p in model.hf.parameters()]
    assert all(p.grad is None for p in model.hf.parameters())
    for i, fact in enumerate(FACTS):
        for site, wanted in true_gradients(model, fact).items():
            u, delta = pairs[site]
            assert torch.allclose(u[i].T @ delta[i], wanted, rtol=0, atol=1e-10)
            assert not torch.allclose(u[i].T @ delta[i - 1], wanted, rtol=0, atol=1e-4)
    with torch.no_grad():
        batch = tokens.encode(model, rewrites(FACTS))
        assert torch.allclose(losses, -likelihood.answers(model, batch, mean=True))


def test_a_fresh_editor_is_a_plain_gradient_step(model, tmp_path):
    editor_for(model).save(tmp_path / "e.safetensors")
    found = Mend(str(tmp_path / "e.safetensors")).edit(model, FACTS)
    double = Mend(str(tmp_path / "e.safetensors")).edit(model, FACTS, hparams=MendHparams(2.0))
    for site in SITES:
        step = -0.5 * sum(true_gradients(model, fact)[site] for fact in FACTS)  # type: ignore
        assert torch.allclose(found.deltas[site], step, rtol=0, atol=1e-6)  # editor: float32
        assert torch.allclose(double.deltas[site], 2 * step, rtol=0, atol=1e-6)
        assert step.abs().max() > 1e-3
    editor_for(model, noise=0.1).save(tmp_path / "e.safetensors")
    other = Mend(str(tmp_path / "e.safetensors")).edit(model, FACTS)
    assert not torch.allclose(other.deltas[SITES[0]], found.deltas[SITES[0]], atol=1e-3)


def test_in_float64_the_identity_is_exact(model):
    pairs, _ = gradients(model, FACTS, SITES)
    for site, (left, right) in editor_for(model).double()(pairs).items():
        u, delta = pairs[site]
        assert torch.equal(left, u)
        assert torch.equal(right, -0.5 * delta)


def test_the_rank_is_at_most_the_number_of_tokens(model, tmp_path):
    editor_for(model, noise=0.1).save(tmp_path / "e.safetensors")
    read = int(tokens.encode(model, rewrites(FACTS[:1])).mask.sum())
    assert read < model.d_model
    found = Mend(str(tmp_path / "e.safetensors")).edit(model, FACTS[:1])
    for site in SITES:
        left, right = found.factors[site]
        assert left.shape[1] == right.shape[0] <= read
        assert 1 < torch.linalg.matrix_rank(left @ right) <= read
    many = Mend(str(tmp_path / "e.safetensors")).edit(model, FACTS)
    assert many.factors[SITES[0]][1].shape == (model.d_model, model.d_model)


def test_the_edit_of_many_is_the_sum_of_single_ones(model, tmp_path):
    editor_for(model, noise=0.1).save(tmp_path / "e.safetensors")
    method = Mend(str(tmp_path / "e.safetensors"))
    many = method.edit(model, FACTS)
    singles = [method.edit(model, [fact]) for fact in FACTS]
    for site in SITES:
        total = sum(edit.deltas[site] for edit in singles)
        assert torch.allclose(many.deltas[site], total, atol=1e-6)  # type: ignore
        assert not torch.allclose(many.deltas[site], singles[0].deltas[site], atol=1e-3)


def test_the_hooks_answer_as_the_changed_weights_do(model, tmp_path):
    """What training sees of an edit is what the edit does."""
    editor = editor_for(model, rate=2.0, noise=0.1)
    editor.save(tmp_path / "e.safetensors")
    pairs, _ = gradients(model, FACTS, SITES)
    ids, mask = tiny_batch(rows=3)
    with torch.no_grad():
        seen = model.forward(ids, mask, hooks=edited(model, editor(pairs), torch.tensor([0, 1, 1])))
        plain = model.forward(ids, mask)
        for row, i in enumerate([0, 1, 1]):
            with Mend(str(tmp_path / "e.safetensors")).edit(model, [FACTS[i]]).applied(model):
                now = model.forward(ids[row : row + 1], mask[row : row + 1])[0]
            real = mask[row].bool()
            assert torch.allclose(seen[row][real], now[real], atol=1e-4)
            assert not torch.allclose(seen[row][real], plain[row][real], atol=1e-2)


def test_the_locality_loss_is_zero_without_an_edit_and_not_with_one(model):
    asked, local = rewrites(FACTS), LOCALITY * 3
    with torch.no_grad():
        edit, kl = objective(model, editor_for(model, rate=0.0), FACTS, asked, local)
        batch = tokens.encode(model, asked)
        assert float(kl) == pytest.approx(0, abs=1e-6)
        assert float(edit) == pytest.approx(
            -float(likelihood.answers(model, batch, mean=True).mean()), rel=1e-5
        )
        after, moved = objective(model, editor_for(model, rate=0.5), FACTS, asked, local)
    assert float(moved) > 1e-3
    assert float(after) < float(edit)


TRAINING = MendTraining(
    n_steps=30, batch_size=3, lr=1e-2, rate_lr=1e-2, rank=8, rate=1e-3, check_every=10
)


def trained(model: Model, **change) -> MendEditor:
    return train_editor(model, FACTS, LOCALITY, FACTS, SITES, replace(TRAINING, **change))


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_model_alone():
    model = tiny_model("gptj")
    before, flags = bits(model), [p.requires_grad for p in model.hf.parameters()]
    rows = []
    editor = train_editor(
        model,
        FACTS,
        LOCALITY,
        FACTS,
        SITES,
        TRAINING,
        rows.append,
    )
    assert unchanged(model, before)
    assert flags == [p.requires_grad for p in model.hf.parameters()]
    assert all(p.grad is None for p in model.hf.parameters())
    assert rows == editor.curve
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert min(row["loss"] for row in rows) < 0.8 * rows[0]["loss"]
    assert all(p.grad is None or not p.isnan().any() for p in editor.parameters())
    again = trained(model).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in editor.state_dict().items())
    other = trained(model, seed=1, n_steps=10).state_dict()
    assert not torch.equal(other["down"], again["down"])


def test_the_best_editor_is_kept_and_training_stops_early():
    """Planted: a learning rate that can only do harm."""
    model = tiny_model("gptj")
    editor = trained(model, lr=50.0, rate_lr=50.0, check_every=1, patience=3)
    losses = [row["loss"] for row in editor.curve]
    assert len(losses) < 31
    assert min(losses) not in losses[-3:]


def test_normalised_inputs_have_mean_zero_and_spread_one(model):
    editor, (pairs, _) = editor_for(model).double(), gradients(model, FACTS, SITES)
    editor.normalise([pairs])
    u, delta = pairs[SITES[0]]
    there = delta.any(-1)
    z = (torch.cat([u, delta], -1)[there] - editor.mean[0]) / editor.spread[0]
    assert torch.allclose(z.mean(0), torch.zeros(()).double(), atol=1e-6)
    assert torch.allclose(z.std(0), torch.ones(()).double(), atol=1e-6)
    assert not there.all()  # padding has no gradient, and is not counted
    assert not editor(pairs)[SITES[0]][1][~there].any()


def test_an_editor_computes_the_equations_of_the_paper():
    """3a and 3b, site by site, written out for one token with numbers that differ everywhere."""
    site, generator = Site(2, "mlp"), torch.Generator().manual_seed(3)
    editor = MendEditor((Site(1, "mlp"), site), 3, 2, rank=2, rate=0.5).double()
    with torch.no_grad():
        for tensor in editor.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    u, delta = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, -0.75])
    pairs = {s: (u[None, None].double(), delta[None, None].double()) for s in editor.sites}
    left, right = editor(pairs)[site]
    now = {name: value.numpy() for name, value in editor.state_dict().items()}
    z = (np.concatenate([u, delta]) - now["mean"][1]) / now["spread"][1]
    for k in range(2):
        inner = z @ now["down"][k] @ now["up"][k] + now["bias"][k]
        z = z + np.maximum(0, now["scale"][k, 1] * inner + now["shift"][k, 1])
    np.testing.assert_allclose(left.detach().numpy()[0, 0], z[:3], rtol=1e-12)
    np.testing.assert_allclose(right.detach().numpy()[0, 0], -now["rate"][1] * z[3:], rtol=1e-12)


def test_a_file_keeps_the_editor(model, tmp_path):
    editor = editor_for(model, noise=0.1)
    editor.curve = [{"step": 0.0, "loss": 1.0}]
    editor.save(tmp_path / "e.safetensors")
    again = MendEditor.load(tmp_path / "e.safetensors")
    assert (again.sites, again.curve, again.rank) == (SITES, editor.curve, 4)
    assert (again.model_name, again.embedding) == (model.name, editor.embedding)
    for name, tensor in editor.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    again.check(model)


def test_an_editor_of_another_model_is_refused(tmp_path):
    model, path = tiny_model("gpt2"), tmp_path / "e.safetensors"
    editor_for(model).save(path)
    before = bits(other := tiny_model("gpt2", seed=1))
    for wrong in (other, tiny_model("llama")):
        with pytest.raises(EditError, match=r"trained for another model \('gpt2'\)"):
            Mend(str(path)).edit(wrong, FACTS)
    assert unchanged(other, before)
    precise = tiny_model("gpt2")
    precise.hf.double()
    assert MendEditor.load(path).embedding == MendEditor.of(precise, SITES).embedding


def test_a_model_edited_by_something_else_is_still_the_same(tmp_path):
    model, path = tiny_model("gpt2"), tmp_path / "e.safetensors"
    editor_for(model).save(path)
    first = Mend(str(path)).edit(model, FACTS[:1])
    with first.applied(model):
        second = Mend(str(path)).edit(model, FACTS[1:])
    assert not torch.equal(
        second.deltas[SITES[0]], Mend(str(path)).edit(model, FACTS[1:]).deltas[SITES[0]]
    )


def test_what_is_no_editor_is_refused(tmp_path):
    model = tiny_model("gpt2")
    with pytest.raises(EditError, match=r"no MEND editor for the model 'gpt2'.*train_editor"):
        Mend().edit(model, FACTS)
    with pytest.raises(EditError, match="cannot be read as a MEND editor"):
        MendEditor.load(tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(EditError, match="not a MEND editor"):
        MendEditor.load(tmp_path / "a.safetensors")
    with pytest.raises(SettingsError, match=r"needs MLP sites.*1\.attn"):
        MendEditor.of(model, [Site(1, "attn")])
    for strength in (0.0, -1.0, math.nan):
        with pytest.raises(SettingsError, match="greater than 0"):
            MendHparams(strength)
    with pytest.raises(pl.FactError, match="no facts to edit"):
        Mend().edit(model, [])


def test_the_edit_is_a_value_like_any_other(tmp_path):
    model, path = tiny_model("gpt2"), tmp_path / "e.safetensors"
    editor_for(model).save(path)
    seen = []
    found = Mend(str(path)).edit(model, FACTS, on_step=lambda n, x: seen.append((n, x["loss"])))
    assert [(n, len(loss)) for n, loss in seen] == [(0, len(FACTS))]
    assert (found.method, found.hparams) == (Mend(str(path)), MendHparams())
    found.save(tmp_path / "edit.safetensors")
    again = pl.Edit.load(tmp_path / "edit.safetensors")
    assert all(torch.equal(again.deltas[s], found.deltas[s]) for s in SITES)
    assert (again.method.name, again.method.values) == ("Mend", asdict(found.method))


@pytest.mark.few("world")
@pytest.mark.parametrize("name", sorted(path.stem for path in BUNDLED.glob("*.safetensors")))
def test_the_bundled_editor_edits_a_fact(name):
    model = pl.load(name)
    facts = pl.counterfact(n=3)
    before = pl.summarise(pl.evaluate(model, facts))["mean"]
    rows = []
    for i, fact in enumerate(facts):
        with Mend().edit(model, [fact]).applied(model):
            rows.append(pl.evaluate(model, [fact]).assign(fact=i))
    after = {i: pl.summarise(r.assign(fact=0))["mean"] for i, r in enumerate(rows)}
    assert before["ES"] == 0
    assert sum(table["ES"] for table in after.values()) >= 200


def test_bundled_editors_are_small():
    assert sum(path.stat().st_size for path in BUNDLED.glob("*.safetensors")) <= 5_000_000
    for path in BUNDLED.glob("*.safetensors"):
        curve = MendEditor.load(path).curve
        assert min(row["loss"] for row in curve) < 0.7 * curve[0]["loss"]
