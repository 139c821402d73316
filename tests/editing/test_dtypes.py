"""Models in half precision: edited as in full, as far as their own rounding lets them."""

from __future__ import annotations

import itertools

import pytest
import torch
from pair import CONTEXTS, FACTS, HP
from tiny import tiny_hf, tiny_tokenizer

import pmet_lens as pl

torch.set_num_threads(1)


def edited(family: str, dtype: torch.dtype):
    """A model whose weights bfloat16 can hold, read in `dtype`, and one edit of it."""
    hf = tiny_hf(family).to(torch.bfloat16).to(dtype)
    model = pl.load(hf, tiny_tokenizer(), name=family)
    moments = pl.second_moments(model, itertools.islice(pl.texts(), 500), HP.layers, n_tokens=1000)
    return model, pl.edit(model, FACTS, moments, pl.PMET, HP, CONTEXTS)


@pytest.mark.few("dtype0-llama", "dtype1-gpt2")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_in_half_precision_is_the_edit_of_full(family, dtype, tmp_path):
    _, full = edited(family, torch.float32)
    model, edit = edited(family, dtype)
    assert all(d.dtype == torch.float64 for pair in edit.factors.values() for d in pair)
    for site, delta in edit.deltas.items():
        wanted = full.deltas[site].double()
        assert delta.dtype == dtype
        # What is left is how the forward passes round: eps is 2^-8 and 2^-11.
        off = float((delta.double() - wanted).norm() / wanted.norm())
        assert off < 40 * torch.finfo(dtype).eps, (site, off)
    before = {site: model.weight(site).clone() for site in edit.factors}
    edit.save(tmp_path / "edit.safetensors")
    again = pl.Edit.load(tmp_path / "edit.safetensors", model)
    with again.applied(model), edit.applied(model):
        table = pl.evaluate(model, FACTS)
        assert table["nll_wanted"].notna().all()
        changed = [not torch.equal(model.weight(s), w) for s, w in before.items()]
        assert all(changed)
    assert all(torch.equal(model.weight(site), w) for site, w in before.items())
