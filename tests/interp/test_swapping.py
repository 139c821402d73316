"""Where the whole state is swapped the answer is the donor's; where nothing differs, nobody's."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from cases import FACTS
from kept import bundled
from tiny import refused, tiny_model

import pmet_lens as pl
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.interp import patching
from pmet_lens.interp.patching import KINDS, OUTCOMES, transfer
from pmet_lens.models import tokens
from pmet_lens.models.model import Model

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals are tested in test_metrics; here they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pmet_lens.evaluation.intervals.bootstrap", partial(metrics.bootstrap, n_resamples=50)
        )
        yield


@pytest.fixture(scope="module")
def world() -> Model:
    return bundled("world")


@pytest.fixture(scope="module")
def facts() -> list[pl.Fact]:
    """All statements about the first 20 subjects that have several."""
    every = pl.knowns()
    times = Counter(f.subject for f in every)
    chosen = list(dict.fromkeys(f.subject for f in every if times[f.subject] > 1))[:20]
    return [f for f in every if f.subject in chosen]


def shares(frame):
    return frame.set_index(["kind", "stream", "layer", "outcome"])["share"].sort_index()


def test_the_whole_last_state_brings_the_donors_answer(world, facts):
    frame = transfer(world, facts, ("resid_post",), [7], n_pairs=40)
    columns = ["kind", "stream", "layer", "outcome", "share", "ci_low", "ci_high", "n"]
    assert list(frame) == columns
    assert list(zip(frame["kind"], frame["outcome"], strict=True)) == [
        (kind, outcome) for kind in KINDS for outcome in OUTCOMES
    ]
    assert (frame["layer"] == 7).all()
    assert frame["n"].between(5, 40).all()
    for kind in KINDS:
        assert shares(frame)[kind, "resid_post", 7].to_dict() == {"donor": 1, "other": 0, "own": 0}


def test_a_state_that_is_the_same_changes_nothing(world, facts):
    """Rotary positions: what enters layer 0 at the last token is that token's embedding alone."""
    last = {f: world.tokenizer(f.text)["input_ids"][-1] for f in facts}
    word, _ = Counter(last.values()).most_common(1)[0]
    same = [f for f in facts if last[f] == word]
    pairs = [f for f in same if any(f.subject == g.subject and f is not g for g in same)]
    assert pairs  # else the second kind has nothing to swap
    frame = transfer(world, same, ("resid_pre",), [0], n_pairs=40)
    own = shares(frame).xs("own", level="outcome")
    assert (own == 1).all()
    other = shares(transfer(world, same, ("resid_pre",), [7], n_pairs=40))
    assert (other.xs("own", level="outcome") < 1).all()


def test_outcomes_are_shares_of_one_and_all_layers_together_come_last(world, facts):
    frame = transfer(world, facts, ("mlp_out",), [2, 5], n_pairs=20)
    sums = frame.groupby(["kind", "stream", "layer"], dropna=False)["share"].sum()
    assert len(sums) == 2 * 3
    assert sums.to_numpy() == pytest.approx(1, abs=1e-12)
    assert frame["share"].between(0, 1).all()
    assert ((frame["ci_low"] <= frame["share"]) & (frame["share"] <= frame["ci_high"])).all()
    for _, own in frame.groupby(["kind", "stream"]):
        assert own["layer"].isna().to_list() == 6 * [False] + 3 * [True]


def test_all_layers_together_is_the_last_of_a_stream_that_holds_all(world, facts):
    """Of the residual stream the last swap overwrites the earlier ones."""
    frame = transfer(world, facts, ("resid_post",), [1, 7], n_pairs=20)
    both = frame[frame["layer"].isna()].set_index(["kind", "outcome"])["share"]
    last = frame[frame["layer"].eq(7).fillna(False)].set_index(["kind", "outcome"])["share"]
    assert both.equals(last)
    first = frame[frame["layer"].eq(1).fillna(False)].set_index(["kind", "outcome"])["share"]
    assert not both.equals(first)


def test_pairs_are_what_their_kind_says(world, facts):
    wanted = patching.first_tokens(world, facts)
    known = [*range(0, len(facts), 2), 1, 3, 5]
    for kind in KINDS:
        pairs = patching._pairs(facts, known, wanted, kind, 1000, 0)
        assert len({i for i, _ in pairs}) == len(pairs) > 3
        for i, j in pairs:
            one, other = facts[i], facts[j]
            assert {i, j} <= set(known)
            assert wanted[i] != wanted[j]
            by_relation = kind == "same relation, other subject"
            assert (one.relation == other.relation) == by_relation
            assert (one.subject != other.subject) == by_relation
        assert patching._pairs(facts, known, wanted, kind, 1000, 0) == pairs
        assert patching._pairs(facts, known, wanted, kind, 1000, 1) != pairs
        assert patching._pairs(facts, known, wanted, kind, 3, 0) == pairs[:3]


def test_the_passes_and_the_model_do_not_change(world, facts, monkeypatch):
    before = {k: v.clone() for k, v in world.hf.state_dict().items()}
    whole = transfer(world, facts, ("mlp_out",), [3], n_pairs=20)
    monkeypatch.setattr(patching, "PAIRS_PER_PASS", 7)
    assert transfer(world, facts, ("mlp_out",), [3], n_pairs=20).equals(whole)
    assert all(torch.equal(v, before[k]) for k, v in world.hf.state_dict().items())
    assert not any(point.fwd_hooks for point in world.bridge.hook_dict.values())


def test_what_cannot_be_used_is_left_out_and_said(world, facts):
    once = list({f.subject: f for f in facts}.values())
    with pytest.warns(UserWarning, match="no two facts with the same subject, other relation"):
        found = transfer(world, once, ("mlp_out",), [0], n_pairs=20)
    assert set(found["kind"]) == {"same relation, other subject"}
    useless = [pl.Fact("Ilmar", "{} is", "Kel", relation="P1"), pl.Fact("Vell", "{} is", "Kel")]
    with pytest.warns(UserWarning, match=f"2 of {len(facts) + 2} facts have no relation or no tar"):
        too = transfer(world, [*facts, *useless], ("mlp_out",), [0], n_pairs=20)
    assert too.equals(transfer(world, facts, ("mlp_out",), [0], n_pairs=20))
    one = [f for f in facts if f.relation == facts[0].relation][:1]
    with pytest.raises(pl.FactError, match="no two facts of the same relation or the same subject"):
        transfer(world, one, ("mlp_out",), [0], n_pairs=20)
    with pytest.raises(pl.FactError, match="with a relation and a target_true"):
        transfer(world, useless)
    with refused("layer 8 does not exist"):
        transfer(world, facts, layers=[8])


def test_what_the_model_does_not_know_takes_no_part(world, facts):
    lies = [pl.Fact(f.subject, f.prompt, target_true="zzz", relation=f.relation) for f in facts]
    only, too = (
        transfer(world, f, ("mlp_out",), [3], n_pairs=20) for f in (facts, [*lies, *facts])
    )
    assert too["n"].equals(only["n"])
    with pytest.raises(pl.FactError, match="no two facts"):
        transfer(world, lies, ("mlp_out",), [3], n_pairs=20)


def test_the_old_name_is_the_same_function():
    assert pl.patch is pl.transfer


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma3"])
def test_the_last_token_alone_gives_what_whole_prompts_give(family):
    model = tiny_model(family, window=64)  # a past must not be longer
    values = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0))
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in FACTS]
    batch = tokens.encode(model, prompts)
    at = scoring.last_places(batch)
    for lowest, stream, layers in (
        (0, "attn_out", [0]),
        (0, "mlp_out", [1, 3]),
        (0, "resid_pre", [2]),
        (1, "resid_post", [1, 2, 3]),
        (2, "mlp_in", [2]),
    ):
        chosen = {n: values[k] for k, n in enumerate(layers)}
        hooks = [(model.stream_hook(n, stream), patching._write(v, at)) for n, v in chosen.items()]
        with torch.no_grad():
            whole = model.forward(batch.ids, batch.mask, hooks=hooks, at=at)
            bases = patching._Bases(model, FACTS, lowest)
            ((_, entering, past),) = bases._parts
            assert past is not None
            last = bases._logits(batch, entering, past, stream, chosen)
        assert torch.allclose(last, whole, rtol=1e-4, atol=1e-4), (stream, layers)
        assert bases.argmax(stream, chosen).equal(whole.argmax(-1))
