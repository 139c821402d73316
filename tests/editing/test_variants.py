"""Candidates that might mend PMET: each does what it says, and methods of papers are as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CONTEXTS, FACTS, HP, left_over, same_deltas, some_moments
from cases import one_tail as one_tail
from kept import shared_model

import pmet_lens as pl
from pmet_lens.data.file_format import to_plain
from pmet_lens.editing import keys
from pmet_lens.experiments import target_files
from pmet_lens.models.model import Site

torch.set_num_threads(1)
LAST = replace(HP, layers=(2,), n_steps=6).settled(pl.PMET)


def test_variants_are_no_methods_and_have_names_of_their_own():
    assert not pl.VARIANTS.keys() & (pl.METHODS.keys() | pl.ABLATIONS.keys())
    for name, method in pl.VARIANTS.items():
        assert pl.named(name) is method
    assert len(set(pl.VARIANTS.values())) == len(pl.VARIANTS)


def test_fields_that_came_later_leave_old_names_as_they_were():
    """Digests of runs and names of targets were made without them."""
    old = {"is", "delta_at", "write", "spread", "solver", "at_once", "position"}
    for method in (pl.PMET, pl.MEMIT, pl.ROME, pl.ALPHAEDIT):
        assert set(to_plain(method)) == old
    assert set(to_plain(pl.VARIANTS["δ^a fades"])) == {*old, "attn_fades"}
    names = {
        target_files.key("w", FACTS, method, HP.settled(pl.PMET), CONTEXTS)
        for method in (pl.PMET, pl.VARIANTS["whole sum"], pl.VARIANTS["targets refreshed"])
    }
    assert len(names) == 1  # their targets are the same
    fades = pl.VARIANTS["δ^a fades"]
    names.add(target_files.key("w", FACTS, fades, HP.settled(pl.PMET), CONTEXTS))
    assert len(names) == 2


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma3", "llama"])
@pytest.mark.parametrize("stream", ["mlp_out", "resid_post"])
def test_the_sum_of_both_deltas_is_written(family, stream):
    """By an exact solver into one layer nothing of it is left over; behind a post-norm hardly
    anything of the nearest that the norm can bring (channels of little gain are pushed less)."""
    wide = {"window": 40} if family.startswith("gemma") else {}
    model = shared_model(family, torch.float64, **wide)
    method = replace(pl.PMET, gather=stream, solver=pl.Exact())
    most = 1e-3 if family == "gemma3" else 1e-6
    assert left_over(model, FACTS, some_moments(model), method, LAST) < most


def test_the_sum_is_that_of_the_deltas():
    model = shared_model("gpt2", torch.float64)
    targets = pl.optimise(model, FACTS, pl.PMET, LAST, CONTEXTS)
    reader = keys.Reader(model, FACTS)
    both = targets.delta("attn_out") + targets.delta("mlp_out")
    for stream in ("mlp_out", "resid_post"):
        wanted = keys.wanted(reader, targets, replace(pl.PMET, gather=stream))
        assert set(wanted) == {stream}
        got = wanted[stream] - reader.values(2, stream)
        assert torch.allclose(got, both, atol=1e-10)


@pytest.mark.parametrize("rule", ["Adam", "falling", "relative"])
def test_a_fading_delta_is_nothing_in_the_end(rule):
    model = shared_model("gpt2", torch.float64)
    hp = replace(LAST, step_rule=rule, n_steps=8, stop_loss=100.0)
    found = pl.optimise(model, FACTS, pl.VARIANTS["δ^a fades"], hp, CONTEXTS)
    assert float(found.delta("attn_out").norm()) == 0
    assert float(found.delta("mlp_out").norm()) > 0
    own = found.history[found.history["fact"] == 0]
    assert list(own["stopped"]) == ["", "", "", "", "goal"]  # not before it has faded
    radius = own["norm_attn_out"].to_numpy()
    assert (radius <= hp.clamp * (1 - own["step"] / 4).clip(lower=0) + 1e-9).all()


def test_refreshed_targets_are_those_of_the_model_so_far():
    """By hand: the first layer is written, then the targets are optimised on that model."""
    model, moments = shared_model("gpt2", torch.float64), None
    moments = some_moments(model)
    method = replace(pl.VARIANTS["targets refreshed"], solver=pl.Ridge())
    made = pl.edit(model, FACTS, moments, method, HP, CONTEXTS)
    plain = pl.edit(model, FACTS, moments, pl.PMET, HP, CONTEXTS)
    first, second = Site(1, "mlp"), Site(2, "mlp")
    assert torch.equal(made.deltas[first], plain.deltas[first])
    assert not torch.equal(made.deltas[second], plain.deltas[second])
    hp = HP.settled(method, len(FACTS))
    with model.restored([first]):
        model.weight(first).add_(made.deltas[first])
        fresh = pl.optimise(model, FACTS, pl.PMET, hp, CONTEXTS)
        one = replace(hp, layers=(2,))
        by_hand = pl.edit(model, FACTS, moments, pl.PMET, one, CONTEXTS, fresh)
    assert torch.allclose(by_hand.deltas[second], made.deltas[second], atol=1e-9)
    # The edit keeps the targets that it began with, from which it can be made again.
    assert same_deltas(pl.edit(model, FACTS, moments, method, HP, CONTEXTS, made.targets), made)
    alone = replace(HP, layers=(2,))
    given = (model, FACTS, moments)
    assert same_deltas(
        pl.edit(*given, method, alone, CONTEXTS), pl.edit(*given, pl.PMET, alone, CONTEXTS)
    )


@pytest.mark.parametrize("name", pl.VARIANTS)
def test_a_variant_edits_and_its_file_is_read_again(name, tmp_path):
    model = shared_model("gpt2", torch.float64)
    hp = replace(HP.settled(pl.PMET), null_space_threshold=1.0)  # some eigenvalues lie below it
    made = pl.edit(model, FACTS, some_moments(model), name, hp, CONTEXTS)
    made.save(tmp_path / "edit")
    again = pl.Edit.load(tmp_path / "edit")
    assert again.method == pl.VARIANTS[name]
    assert same_deltas(again, made)


def test_variants_that_contradict_themselves_are_refused():
    with pytest.raises(pl.SettingsError, match="delta_at lacks attn_out"):
        replace(pl.MEMIT, attn_fades=True)
    with pytest.raises(pl.SettingsError, match="gather is of δ\\^a and δ\\^m"):
        replace(pl.MEMIT, gather="resid_post")
    with pytest.raises(pl.SettingsError, match="gather must be a choice"):
        replace(pl.PMET, gather="attn_out")
