"""Second moments that are hard to solve with: first tokens, and neurons that never fire."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.models.activations import read_streams

TEXTS = ["The tower of Ilmar stands.", "Mira Tolan plays tennis; her brother", "Kel"]
SITE = pl.Site(1, "mlp")
FACT = pl.Fact("Danel Orrin", "The mother tongue of {} is", "Kel")


def keys(model: pl.Model, text: str) -> torch.Tensor:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    place = torch.arange(ids.shape[1])[None]
    return read_streams(model, ids, torch.ones_like(ids), {SITE: place})[SITE][0].double()


@pytest.mark.parametrize("first", [True, False])
def test_first_tokens_count_where_asked(first: bool) -> None:
    model = tiny_model("gpt2", torch.float64)
    rows = torch.cat([keys(model, text)[0 if first else 1 :] for text in TEXTS])
    how = {"projections": ("mlp",), "batch_tokens": 16, "first_tokens": first}
    found = pl.second_moments(model, TEXTS, [1], **how)[SITE]
    assert found.count == len(rows)
    torch.testing.assert_close(found.value, rows.T @ rows / len(rows))


def test_a_file_says_whether_first_tokens_count(tmp_path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "m.safetensors"
    with_first = pl.kept_moments(path, model, TEXTS, [1])
    assert torch.equal(pl.kept_moments(path, model, TEXTS, [1])[SITE].total, with_first[SITE].total)
    with pytest.raises(pl.MomentError, match="other first_tokens"):
        pl.kept_moments(path, model, TEXTS, [1], first_tokens=False)
    other = tmp_path / "n.safetensors"
    pl.kept_moments(other, model, TEXTS, [1], first_tokens=False)
    pl.kept_moments(other, model, TEXTS, [1], first_tokens=False)
    with pytest.raises(pl.MomentError, match="other first_tokens"):
        pl.kept_moments(other, model, TEXTS, [1])


def test_dead_neurons_are_named_with_what_to_do() -> None:
    model = tiny_model("opt", torch.float64)
    size = model.d_in(SITE)
    moment = torch.eye(size, dtype=torch.float64)
    moment[3, 3] = moment[5, 5] = 0
    hparams = pl.Hparams((1,), n_steps=1)
    how = {"contexts": ["{}"], "check": False}
    with pytest.raises(pl.SolveError, match=rf"At 1\.mlp: .*2 of its {size} inputs .*a floor"):
        pl.edit(model, FACT, {SITE: moment}, "EMMET", hparams, **how)
    floor = 1e-4 * moment.diagonal().mean()
    edit = pl.edit(model, FACT, {SITE: moment + floor * torch.eye(size)}, "EMMET", hparams, **how)
    assert torch.isfinite(edit.deltas[SITE]).all()
    low = torch.ones(size, size, dtype=torch.float64)
    with pytest.raises(pl.SolveError, match=r"At 1\.mlp: .*more tokens than its size") as error:
        pl.edit(model, FACT, {SITE: low}, "EMMET", hparams, **how)
    assert "dead" not in str(error.value)
