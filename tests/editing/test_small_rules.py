"""Rules of one line, each of which could be wrong without an edit that looks wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pair import CONTEXTS, FACTS, HP
from tiny import close, tiny_model

import pmet_lens as pl
from pmet_lens.editing import keys
from pmet_lens.models import sites


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5, 1.0])
def test_a_part_of_a_turn_has_that_part_of_its_angle(part):
    """Along the great circle: of length 1, in the plane of both, and as far from the start."""
    start, end = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator())
    turned = sites.turned(start, end, part)
    a, b = (v / v.norm(dim=-1, keepdim=True) for v in (start, end))
    assert turned.norm(dim=-1).tolist() == pytest.approx([1.0] * 6)
    whole, there, rest = ((x * y).sum(-1).clamp(-1, 1).acos() for x, y in
                          ((a, b), (a, turned), (turned, b)))  # fmt: skip
    assert there.tolist() == pytest.approx((part * whole).tolist(), abs=1e-7)
    assert (there + rest).tolist() == pytest.approx(whole.tolist(), abs=1e-7)


def test_a_turn_of_nothing_stays_where_it_is():
    same = torch.ones(1, 3, dtype=torch.float64)
    assert torch.equal(sites.turned(same, 2 * same, 0.5), same / same.norm())


def test_with_prompts_in_turn_the_loss_is_of_what_each_gave_last():
    """φ·NLL + μ·KL + ω·decay, the NLL a mean over all prompts although a step runs but some."""
    hp = replace(HP, easing=1.0, nll_weight=0.7, prefixes_per_step=1, stop_loss=0.0)
    hp = hp.settled(pl.PMET)
    model = tiny_model("gpt2", torch.float64)
    contexts = [*CONTEXTS, "Of old. {}", "Far away. {}"]
    seen: dict[int, torch.Tensor] = {}
    found = pl.optimise(
        model, FACTS, pl.PMET, hp, contexts, lambda step, of: seen.update({step: of["nll"]})
    )
    h = found.history
    loss = hp.nll_weight * h["nll"] + hp.kl_weight * h["kl"] + hp.weight_decay * h["decay"]
    assert h["loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-9)
    assert len(seen) == hp.n_steps


def test_a_method_says_how_many_facts_it_edits_at_once():
    assert "all facts together" in pl.PMET._repr_html_()
    assert "1 at a time" in pl.ROME._repr_html_()


def test_a_tokenizers_end_token_is_no_part_of_a_text():
    from pmet_lens.models.tokens import _without_end

    ids, places = [1, 5, 6, 2, 2], [(0, 0), (0, 3), (3, 5), (0, 0), (0, 0)]
    assert _without_end(ids, places) == ([1, 5, 6], [(0, 0), (0, 3), (3, 5)])
    assert _without_end([1], [(0, 0)]) == ([1], [(0, 0)])


@pytest.mark.parametrize("room", [0, 20_000])
def test_streams_that_are_not_kept_change_no_key(monkeypatch, room):
    """All are run from the first layer again, or those beyond the room: the same keys and values,
    and no more is kept than fits."""
    model = tiny_model("gpt2", torch.float64)
    facts = [*FACTS, *(pl.Fact(f"Mira {n}", "{} plays the sport of", "rugby") for n in range(6))]
    monkeypatch.setattr(keys, "TOKENS_ON_CPU", 60)  # parts of a few facts each
    whole, less = (keys.Reader(model, facts, CONTEXTS) for _ in range(2))
    assert len(whole._parts) > 2
    for layer in (1, 2):
        site = pl.Site(layer, "mlp")
        wanted = whole.keys(site), whole.values(2, "mlp_out")
        with monkeypatch.context() as patch:
            patch.setattr(keys, "KEPT_BYTES", room)
            found = less.keys(site), less.values(2, "mlp_out")
        for ours, theirs in zip(found, wanted, strict=True):
            assert close(ours, theirs, 1e-12)
        kept = [part.residual for part in less._parts if part.residual is not None]
        assert sum(residual.nbytes for residual in kept) <= room
        assert bool(kept) == bool(room)
        assert all(part.residual is not None for part in whole._parts)
