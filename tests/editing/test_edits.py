"""An edit as an object: receipts, sums, the check of its base, the adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from kept import shared_model
from tiny import tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.data import file_format
from pmet_lens.editing import locate_and_edit
from pmet_lens.models.model import Model, Site
from pmet_lens.shipping import adapters

torch.set_num_threads(1)
HP = pl.Hparams(layers=(1, 2), n_steps=25, lr=0.5, second_moment_weight=0.01, clamp=5.0)
CONTEXTS = ["{}"]
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis"),
    pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", "Kel"),
]
SITES = [Site(layer, "mlp") for layer in HP.layers]


@pytest.fixture(scope="module")
def model() -> Model:
    return shared_model("gpt2")


def moments(model: Model) -> dict[Site, torch.Tensor]:
    return {site: torch.eye(model.d_in(site), dtype=torch.float64) for site in SITES}


def edit_of(model: Model, facts: list[pl.Fact], **more) -> pl.Edit:
    return pl.edit(model, facts, moments(model), pl.PMET, replace(HP, **more), CONTEXTS)


@pytest.fixture(scope="module")
def pair(model) -> tuple[pl.Edit, pl.Edit]:
    return edit_of(model, FACTS[:1]), edit_of(model, FACTS[1:])


def bits(model: Model) -> list[torch.Tensor]:
    return [model.weight(site).clone() for site in SITES]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def nll(model: Model, fact: pl.Fact) -> float:
    """Of the wanted answer, by plain transformers."""
    start = len(model.tokenizer(fact.text)["input_ids"])
    ids = torch.tensor([model.tokenizer(f"{fact.text} {fact.target_new}")["input_ids"]])
    with torch.no_grad():
        logp = model.hf(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
    return float(-logp.gather(1, ids[0, start:, None]).mean())


# -- receipts -------------------------------------------------------------------------------------


def test_a_receipt_tells_what_changed(model, pair):
    before = bits(model)
    got = pair[0].receipt(model)
    assert equal(bits(model), before)
    assert list(got.sites["site"]) == ["1.mlp", "2.mlp"]
    assert got.sites.index[0] == "transformer.h.1.mlp.c_proj.weight"
    for site, row in zip(SITES, got.sites.itertuples(), strict=True):
        assert row.norm == pytest.approx(float(pair[0].deltas[site].norm()), rel=1e-5)
        whole = float(model.weight(site).norm())
        assert row.relative == pytest.approx(row.norm / whole, rel=1e-5)
        assert row.rank == 1
    (fact,) = got.facts.to_dict("records")
    assert fact["subject"] == "Mira Tolan"
    assert fact["wanted"] == "rugby"
    asked = pl.ask(model, FACTS[0].text, k=1)
    assert fact["before"] == asked["token"][0].strip()
    with pair[0].applied(model):
        assert fact["after"] == pl.ask(model, FACTS[0].text, k=1)["token"][0].strip()
        assert fact["nll after"] == pytest.approx(nll(model, FACTS[0]), rel=1e-5)
    assert fact["nll before"] == pytest.approx(nll(model, FACTS[0]), rel=1e-5)
    assert fact["nll after"] < fact["nll before"] - 0.01
    assert got.to_frame() is got.facts


def test_a_receipt_of_an_edit_that_is_on(model, pair):
    clean = pair[0].receipt(model)
    pair[0].apply_(model)
    on = bits(model)
    assert pair[0].receipt(model).facts.equals(clean.facts)
    assert equal(bits(model), on)
    pair[0].revert_(model)


def test_a_receipt_leaves_other_edits_where_they_stand(model, pair):
    """Three numbers do not add up to the same bits in every order."""
    third = edit_of(model, [pl.Fact("Danel Orrin", "The mother tongue of {} is", "Vell", "French")])
    for edit in (*pair, third):
        edit.apply_(model)
    on = bits(model)
    pair[0].receipt(model)
    assert equal(bits(model), on)
    for edit in (*pair, third):
        edit.revert_(model)


def test_a_receipt_shows_itself(model, pair):
    both = pair[0] + pair[1]
    got = both.receipt(model, n=1)
    assert got.left_out == 1
    assert "1 more" in got._repr_html_()
    assert "Mira Tolan" in got._repr_html_()
    assert "Mira Tolan" in repr(got)
    nasty = edit_of(model, [replace(FACTS[0], target_new="<b>rugby")])
    assert "<b>rugby" not in nasty.receipt(model)._repr_html_()


# -- sums -----------------------------------------------------------------------------------------


def test_a_sum_changes_what_both_change(model, pair):
    both = pair[0] + pair[1]
    assert both.facts == (*pair[0].facts, *pair[1].facts)
    assert both.method == pl.PMET
    for site in SITES:
        exact = sum(a @ b for a, b in (e.factors[site] for e in pair))
        assert torch.equal(both.deltas[site], exact.to(both.dtype))
        assert both.factors[site][0].shape[1] == 2


def test_sums_of_other_sites_and_methods(model, pair, tmp_path):
    low = edit_of(model, FACTS[:1], layers=(1,))
    high = pl.edit(model, FACTS[1:], moments(model), pl.MEMIT, replace(HP, layers=(2,)), CONTEXTS)
    both = low + high
    assert set(both.factors) == set(SITES)
    assert torch.equal(both.deltas[SITES[0]], low.deltas[SITES[0]])
    assert both.method.name == "sum"
    both.save(tmp_path / "sum.safetensors")
    again = pl.Edit.load(tmp_path / "sum.safetensors", model)
    assert again.method.name == "sum"
    assert torch.equal(again.deltas[SITES[1]], high.deltas[SITES[1]])


def test_a_sum_of_other_strengths_goes_through_a_file(model, pair, tmp_path):
    both = pair[0] + edit_of(model, FACTS[1:], lr=0.4)
    both.save(tmp_path / "sum.safetensors")
    again = pl.Edit.load(tmp_path / "sum.safetensors", model)
    assert again.method == pl.PMET
    assert [hparams["lr"] for hparams in again.hparams.values["of"]] == [0.5, 0.4]


def test_edits_of_different_weights_are_not_added(model, pair):
    with pair[0].applied(model):
        on_top = edit_of(model, FACTS[1:])
    with pytest.raises(pl.EditError, match="merged"):
        _ = pair[0] + on_top
    assert len(pl.merged([pair[0], on_top]).facts) == 2


def test_several_live_edits_end_at_the_original_bits(model, pair):
    third = edit_of(model, [pl.Fact("Danel Orrin", "The mother tongue of {} is", "Vell", "French")])
    before = bits(model)
    for edit in (*pair, third):
        edit.apply_(model)
    for edit in (pair[1], third, pair[0]):
        assert not equal(bits(model), before)
        edit.revert_(model)
    assert equal(bits(model), before)


# -- the base -------------------------------------------------------------------------------------


def test_another_base_is_refused_unless_told(model, pair, tmp_path):
    path = tmp_path / "edit.safetensors"
    pair[0].save(path)
    assert pl.Edit.load(path, model).model == "gpt2"
    pair[1].apply_(model)
    assert pl.Edit.load(path, model).facts == pair[0].facts  # another edit is on, the base is it
    pair[1].revert_(model)
    other = shared_model("gpt2", seed=1)
    with pytest.raises(pl.EditError, match=r"other weights at 1\.mlp.*any_base=True"):
        pl.Edit.load(path, other)
    assert pl.Edit.load(path, other, any_base=True).facts == pair[0].facts
    config = tiny_hf("gpt2").config
    config.n_layer = 2
    short = pl.load(type(tiny_hf("gpt2"))(config), tiny_tokenizer(), name="short")
    with pytest.raises(pl.EditError, match=r"changes 2\.mlp.*layers 0 to 1|other weights"):
        pl.Edit.load(path, short)


def test_versions_are_in_the_file(pair, tmp_path):
    from safetensors import safe_open

    pair[0].save(tmp_path / "edit.safetensors")
    with safe_open(str(tmp_path / "edit.safetensors"), framework="pt") as file:
        head = json.loads(file.metadata()["pmet_lens"])
    assert head["versions"]["torch"] == torch.__version__
    assert head["parameters"]["1.mlp"] == "transformer.h.1.mlp.c_proj.weight"


@pytest.mark.parametrize("method", [pl.PMET, pl.ALPHAEDIT])
def test_a_file_of_the_first_format_is_read(model, pair, tmp_path, method):
    """It named a solver by "name", other methods too, and this package's by nothing."""
    path = tmp_path / "edit.safetensors"
    replace(pair[0], method=method).save(path)
    head, tensors = file_format.read(path, None, "an edit", pl.EditError)
    solver = {"name": type(method.solver).__name__, **vars(method.solver)}
    head |= {"format": "pmet_lens edit 1", "hparams": asdict(HP)}
    file_format.write(
        path, tensors, head | {"method": asdict(method) | {"solver": solver}}, "", pl.EditError
    )
    again = pl.Edit.load(path, model)
    assert (again.method, again.hparams, again.facts) == (method, HP, pair[0].facts)
    head |= {"method": {"name": "FineTune", "constrained": False}, "hparams": {"layer": 1}}
    file_format.write(path, tensors, head, "", pl.EditError)
    again = pl.Edit.load(path, model)
    assert (again.method.name, again.method.values) == ("FineTune", {"constrained": False})
    assert again.hparams.values == {"layer": 1}


# -- adapters -------------------------------------------------------------------------------------


def test_too_high_a_rank_is_refused(pair, tmp_path):
    both = pair[0] + pair[1]
    with pytest.raises(pl.EditError, match=r"rank 2 .* at most 1: .*max_rank"):
        both.to_peft(tmp_path / "adapter", max_rank=1)
    assert not (tmp_path / "adapter").exists()
    both.to_peft(tmp_path / "adapter", max_rank=2)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_an_old_file_cannot_name_its_weights(pair, tmp_path):
    with pytest.raises(pl.EditError, match="before files named their weights"):
        replace(pair[0], parameters={}).to_peft(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(pl.EditError, match="could not be written"):
        pair[0].to_peft(tmp_path / "file")


def test_balanced_factors_have_the_same_product():
    generator = torch.Generator().manual_seed(0)
    left = 1e6 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    left, right = torch.cat([left, left[:, :1]], 1), torch.cat([right, 2 * right[:1]], 0)
    a, b = adapters.balanced(left, right)
    assert a.shape == (20, 3)  # the fourth direction was the first again
    assert torch.allclose(a @ b, left @ right, rtol=1e-12)
    assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-9)
    many = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    a, b = adapters.balanced(many, many.T)
    assert a.shape == (5, 5)
    assert torch.allclose(a @ b, many @ many.T)


def test_an_edit_of_many_facts_is_no_larger_than_its_weights(model, monkeypatch, tmp_path):
    """Of the same bits as the factors of all facts have, there and back from a file."""
    n, before = model.d_model + 8, bits(model)
    subjects = [f"Mira {chr(65 + i // 26)}{chr(65 + i % 26)}" for i in range(n)]
    facts = [pl.Fact(s, "{} plays the sport of", "rugby", "tennis") for s in subjects]
    made = edit_of(model, facts, n_steps=1)
    for site, (left, right) in made.factors.items():
        assert (left.shape, right.shape) == (
            (model.d_in(site), model.d_model),
            (model.d_model, model.d_model),
        )
    monkeypatch.setattr(locate_and_edit, "thin", lambda *both: both)
    whole = pl.edit(model, facts, moments(model), pl.PMET, made.hparams, CONTEXTS, made.targets)
    assert all(left.shape[1] == n for left, _ in whole.factors.values())
    assert all(torch.equal(made.deltas[site], whole.deltas[site]) for site in SITES)
    made.save(tmp_path / "many.safetensors")
    read = pl.Edit.load(tmp_path / "many.safetensors", model)
    assert all(torch.equal(read.deltas[site], made.deltas[site]) for site in SITES)
    with made.applied(model):
        assert not equal(bits(model), before)
    assert equal(bits(model), before)
