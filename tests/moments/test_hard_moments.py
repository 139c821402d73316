"""Second moments that are hard to solve with: first tokens, and neurons that never fire."""

from __future__ import annotations

import warnings

import pytest
import torch
from kept import shared_model

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
    model = shared_model("gpt2", torch.float64)
    rows = torch.cat([keys(model, text)[0 if first else 1 :] for text in TEXTS])
    how = {"projections": ("mlp",), "batch_tokens": 16, "first_tokens": first}
    found = pl.second_moments(model, TEXTS, [1], **how)[SITE]
    assert found.count == len(rows)
    torch.testing.assert_close(found.value, rows.T @ rows / len(rows))


def test_a_file_says_whether_first_tokens_count(tmp_path) -> None:
    model, path = shared_model("gpt2"), tmp_path / "m.safetensors"
    with_first = pl.kept_moments(path, model, TEXTS, [1])
    assert torch.equal(pl.kept_moments(path, model, TEXTS, [1])[SITE].total, with_first[SITE].total)
    with pytest.raises(pl.MomentError, match="other first_tokens"):
        pl.kept_moments(path, model, TEXTS, [1], first_tokens=False)
    other = tmp_path / "n.safetensors"
    pl.kept_moments(other, model, TEXTS, [1], first_tokens=False)
    pl.kept_moments(other, model, TEXTS, [1], first_tokens=False)
    with pytest.raises(pl.MomentError, match="other first_tokens"):
        pl.kept_moments(other, model, TEXTS, [1])


METHODS = ("PMET", "MEMIT", "ROME", "EMMET")


def edited(method: str, moment: object, weight: float = 1e-9, facts: int = 1) -> pl.Edit:
    model = shared_model("opt", torch.float64)
    hparams = pl.Hparams((1,), n_steps=1, second_moment_weight=weight)
    many = [pl.Fact(name, "The tongue of {} is", "Kel") for name in _names(facts)]
    return pl.edit(model, many, {SITE: moment}, method, hparams, contexts=["{}"], check=False)


def _names(n: int) -> list[str]:
    return ["Danel Orrin", *(f"{a}{b}" for a in "ABCDEFGHIJ" for b in "abcdefghij")][:n]


@pytest.mark.few("PMET-dual", "MEMIT-primal", "ROME-dual", "EMMET-dual")
@pytest.mark.parametrize("facts", [1, 60], ids=["dual", "primal"])
@pytest.mark.parametrize("method", METHODS)
def test_dead_neurons_are_named_with_what_to_do(method: str, facts: int) -> None:
    """Whatever the solver and however few memories count (λ small)."""
    size = shared_model("opt").d_in(SITE)
    moment = torch.eye(size, dtype=torch.float64)
    moment[3, 3] = moment[5, 5] = 0
    n = 1 if method in ("ROME", "EMMET") else facts
    with pytest.raises(pl.SolveError, match=rf"At 1\.mlp: .*2 of its {size} inputs .*a floor"):
        edited(method, moment, facts=n)
    floor = 1e-4 * moment.diagonal().mean()
    edit = edited(method, moment + floor * torch.eye(size), facts=n)
    assert torch.isfinite(edit.deltas[SITE]).all()


@pytest.mark.few("PMET-dual", "MEMIT-primal", "ROME-dual", "EMMET-dual")
@pytest.mark.parametrize("facts", [1, 60], ids=["dual", "primal"])
@pytest.mark.parametrize("method", METHODS)
def test_too_few_tokens_are_named_with_what_to_do(method: str, facts: int) -> None:
    """The second moment of fewer keys than they have entries."""
    size = shared_model("opt").d_in(SITE)
    rows = torch.randn(size - 4, size, generator=torch.Generator().manual_seed(0)).double()
    n = 1 if method in ("ROME", "EMMET") else facts
    with pytest.raises(pl.SolveError, match=r"At 1\.mlp: .*more tokens than its size") as error:
        edited(method, pl.Moment(rows.T @ rows, len(rows)), facts=n)
    assert "dead" not in str(error.value)


def test_a_null_space_of_too_few_tokens_is_named(tmp_path) -> None:
    """AlphaEdit can always be solved; directions that no text reached are not free."""
    size = shared_model("opt").d_in(SITE)
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, size, generator=generator).double() for n in (size - 4, 10 * size))
    few[:, 3] = many[:, 3] = 0  # a dead neuron is: its moment says so of any number of tokens
    told = rf"fewer tokens than inputs: 1\.mlp \({size - 4} for {size}\).*ten times as many"
    moment = pl.Moment(few.T @ few, len(few))
    with pytest.warns(UserWarning, match=told) as caught:
        edited("AlphaEdit", moment)
    assert caught[0].filename.endswith(("test_hard_moments.py", "_decorator.py"))
    pl.save_moments({SITE: moment}, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=told):
        edited("AlphaEdit", pl.open_moments(tmp_path / "m.safetensors")[SITE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = edited("AlphaEdit", pl.Moment(many.T @ many, len(many)))
    assert torch.isfinite(edit.deltas[SITE]).all()
