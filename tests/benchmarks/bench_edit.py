"""One fact while somebody waits, and the solve alone."""

from __future__ import annotations

import plain
import pytest
import subjects
import torch

import pmet_lens as pl
from pmet_lens.editing.solvers import Dense, Ridge


@pytest.mark.parametrize("name", ["world", "world-sequential"])
def test_one_fact(name, compare, device):
    """Targets, keys and solve of one fact, moments cached; another fact in every round."""
    model = subjects.bundled(name, device)
    hp, own = subjects.settings(model), subjects.contexts(model)
    facts = pl.counterfact(n=9)
    read = {"projections": ("mlp",), "n_tokens": 10_000}
    moments = pl.second_moments(model, pl.texts(), hp.layers, **read)
    values = {site: moment.value for site, moment in moments.items()}
    sites = [pl.Site(layer, p) for layer in hp.layers for p in ("attn", "mlp")]
    modules = {site: subjects.module(model, site) for site in sites}
    weights = {site: model.weight(site) for site in moments}
    pl.edit(model, facts[8:], moments, pl.PMET, hp, own)

    def slow(i: int) -> float:
        fact = facts[i : i + 1]
        plain.edit(model.hf, model.tokenizer, modules, weights, fact, values, hp, own)
        return 1.0

    def fast(i: int) -> float:
        pl.edit(model, facts[i : i + 1], moments, pl.PMET, hp, own)
        return 1.0

    compare(f"edit one fact, {name}", slow, fast, allows="", wanted=3.0, rounds=5)


def test_solve(compare, device, small):
    """10 facts at d_in 3,072 and d_model 768, the factor of C kept; the weight change included."""
    d_in = 256 if small else 3072
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
    C = (text.T @ text / len(text)).to(device)
    K = torch.randn(10, d_in, generator=generator, dtype=torch.float64).to(device)
    R = torch.randn(10, 768, generator=generator, dtype=torch.float64).to(device)
    factor = Ridge(30.0).factorise(Dense(C))
    factor.factors(K, R)

    def slow(_: int) -> float:
        plain.solve(C, K, R, 30.0)
        return 1.0

    def fast(_: int) -> float:
        left, right = factor.factors(K, R)
        left @ right
        return 1.0

    left, right = factor.factors(K, R)
    wanted = plain.solve(C, K, R, 30.0)
    assert (left @ right - wanted).abs().max() <= 1e-8 * wanted.abs().max()
    compare(
        "write 10 facts at d_in 3,072, moments factorised",
        slow, fast, allows="> 100 ×", wanted=50.0, unit="ms", scale=1e3, rounds=9,
    )  # fmt: skip
