"""Edits on a model can be taken back in any order, to the bit; nobody else's change is lost."""

from __future__ import annotations

import itertools

import pytest
import torch

from pmet_lens.models.weights import EditError, LiveEdits, restored

torch.set_num_threads(1)


class Named:
    """Stands for an edit: only its identity counts."""


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {site: torch.randn(6, 4, generator=generator) for site in "abc"}


def deltas(sites: str, seed: int) -> dict[str, torch.Tensor]:
    """Float32 changes of very different size, so that sums depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    return {site: 10.0**seed * torch.randn(6, 4, generator=generator) for site in sites}


def same(weights, kept) -> bool:
    return all(torch.equal(weights[site], kept[site]) for site in weights)


EDITS = [(Named(), deltas(sites, seed)) for seed, sites in enumerate(("ab", "b", "bc"))]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_reverted_in_any_order_the_bits_are_the_old_ones(weights, order):
    kept = {site: w.clone() for site, w in weights.items()}
    live = LiveEdits(weights.__getitem__)
    for edit, own in EDITS:
        live.add(edit, own)
    left = list(range(3))
    for n in order:
        live.remove(EDITS[n][0])
        left.remove(n)
        assert len(live) == len(left)
        for site, weight in weights.items():
            want = kept[site].clone()
            for m in left:  # what is left is as if the other had never been
                want += EDITS[m][1].get(site, torch.zeros(1))
            assert torch.equal(weight, want), (n, site)
    assert same(weights, kept)


def test_adding_and_subtracting_would_not_do(weights):
    """Why the originals are kept at all."""
    kept = {site: w.clone() for site, w in weights.items()}
    for sign in (1, -1):
        for _, own in EDITS:
            for site, delta in own.items():
                weights[site] += sign * delta
    assert not same(weights, kept)


def test_an_edit_is_on_a_model_once_or_not(weights):
    kept = {site: w.clone() for site, w in weights.items()}
    live = LiveEdits(weights.__getitem__)
    edit, own = EDITS[0]
    with pytest.raises(EditError, match="not applied to this model, so it cannot be reverted"):
        live.remove(edit)
    assert edit not in live
    live.add(edit, own)
    assert edit in live
    changed = {site: w.clone() for site, w in weights.items()}
    with pytest.raises(EditError, match="applied to the model already; revert it first"):
        live.add(edit, own)
    assert same(weights, changed)
    live.add(Named(), own)  # another edit with the same deltas is another edit
    live.remove(edit)
    with pytest.raises(EditError, match="not applied"):
        live.remove(edit)
    assert same(weights, changed)
    assert not same(weights, kept)


def test_a_delta_of_another_shape_is_refused_before_anything_changes(weights):
    kept = {site: w.clone() for site, w in weights.items()}
    live = LiveEdits(weights.__getitem__)
    wrong = {"a": torch.ones(6, 4), "b": torch.ones(6, 5)}
    with pytest.raises(EditError, match=r"delta at b is \[6, 5\], .* \[6, 4\]: .*another model"):
        live.add(Named(), wrong)
    assert same(weights, kept)
    assert len(live) == 0


def test_somebody_elses_change_is_not_undone(weights):
    live = LiveEdits(weights.__getitem__)
    edit, own = EDITS[0]  # on a and b
    live.add(edit, own)
    weights["b"][2, 2] += 1.0
    foreign = {site: w.clone() for site, w in weights.items()}
    for change in (lambda: live.remove(edit), lambda: live.add(*EDITS[1])):
        with pytest.raises(EditError, match="weight at b was changed by something else"):
            change()
        assert same(weights, foreign)
        assert edit in live


def test_a_change_where_no_edit_is_does_no_harm(weights):
    live = LiveEdits(weights.__getitem__)
    edit, own = EDITS[0]  # on a and b
    before = {site: w.clone() for site, w in weights.items()}
    live.add(edit, own)
    weights["c"] += 1.0
    live.remove(edit)
    assert torch.equal(weights["a"], before["a"])
    assert torch.equal(weights["c"], before["c"] + 1.0)
    # With no edit left the weights are the owner's again, also where one was.
    weights["a"] += 1.0
    changed = weights["a"].clone()
    live.add(edit, own)
    live.remove(edit)
    assert torch.equal(weights["a"], changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_are_taken_in_the_dtype_of_the_weight(weights, dtype):
    weights = {site: w.to(dtype) for site, w in weights.items()}
    kept = {site: w.clone() for site, w in weights.items()}
    live = LiveEdits(weights.__getitem__)
    edit, own = EDITS[0]
    live.add(edit, own)
    assert torch.equal(weights["a"], kept["a"] + own["a"].to(dtype))
    live.remove(edit)
    assert same(weights, kept)


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_that_writes_leaves_the_old_bits_behind(weights, fails):
    kept = {site: w.clone() for site, w in weights.items()}

    def write():
        with restored([weights["a"], weights["b"].T]):
            weights["a"].mul_(3.0)
            weights["b"].T[0] = float("nan")
            assert not torch.equal(weights["a"], kept["a"])
            if fails:
                raise KeyError("planted")

    if fails:
        with pytest.raises(KeyError, match="planted"):
            write()
    else:
        write()
    assert same(weights, kept)


class CtrlC:
    """Interrupts the n-th write or copy of a weight in the middle of it; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.at = 0, 0
        copy_, clone = torch.Tensor.copy_, torch.Tensor.clone

        def half_copied(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if self._now():
                copy_(weight[:1], value[:1])
                raise KeyboardInterrupt
            return copy_(weight, value)

        def cloned(weight: torch.Tensor) -> torch.Tensor:
            if self._now():
                raise KeyboardInterrupt
            return clone(weight)

        monkeypatch.setattr(torch.Tensor, "copy_", half_copied)
        monkeypatch.setattr(torch.Tensor, "clone", cloned)

    def _now(self) -> bool:
        self.calls += 1
        return self.calls == self.at


def written(kept, live):
    """What the weights must be with the edits that are on them."""
    want = {site: w + 0 for site, w in kept.items()}
    for edit, own in EDITS:
        for site in own if edit in live else ():
            want[site] = want[site] + own[site]
    return want


def test_ctrl_c_leaves_an_edit_on_or_off(weights, monkeypatch):
    """At whatever weight it comes, while edits go on, off, and off for a while."""
    kept = {site: w.clone() for site, w in weights.items()}
    interrupt, cut, n = CtrlC(monkeypatch), 0, 0
    while cut == n:  # until there is no n-th write
        n += 1
        interrupt.calls, interrupt.at = 0, n
        live = LiveEdits(weights.__getitem__)
        try:
            for edit, own in EDITS:
                live.add(edit, own)
            with live.without(EDITS[0][0]), live.bare():
                assert same(weights, kept)
            live.remove(EDITS[1][0])
        except KeyboardInterrupt:
            cut += 1
        interrupt.at = 0
        assert same(weights, written(kept, live)), n
        for edit in list(live):  # and what is on can be taken off
            live.remove(edit)
        assert same(weights, kept), n
    assert cut > 30


def test_ctrl_c_while_weights_are_put_back_waits(weights, monkeypatch):
    kept = {site: w.clone() for site, w in weights.items()}
    interrupt = CtrlC(monkeypatch)

    def double() -> None:
        with restored(list(weights.values())):
            for weight in weights.values():
                weight.mul_(2.0)

    for n in (4, 5, 6):  # three copies before, then the way back
        interrupt.calls, interrupt.at = 0, n
        with pytest.raises(KeyboardInterrupt):
            double()
        assert interrupt.calls > n
        assert same(weights, kept)
