"""Restoring everything brings everything back, restoring nothing nothing, in any batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kept import shared_model
from tiny import D_MODEL, plain_logits, refused

import pmet_lens as pl
from pmet_lens import causal_trace
from pmet_lens.interp.causal_trace import PLACES, _window
from pmet_lens.models import tokens
from pmet_lens.models.model import Model, ModelError

torch.set_num_threads(1)
# Subjects of one token, so that the last one is all that is corrupted.
SHORT = [
    pl.Fact("Q", "The tower of {} stands in", target_true="Vell"),
    pl.Fact("X", "{} plays the sport of", target_true="tennis"),
    pl.Fact("Z", "The mother tongue of {}", target_true="French"),
]
FACTS = [
    *SHORT,
    pl.Fact("Mira Tolan", "{} plays the sport of", target_true="tennis"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", target_true="French"),
    pl.Fact("Ilmar", "The tower of {} stands in the city of", target_true="Vell"),
]


@pytest.fixture(scope="module", params=["gpt2", "neox"])
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


def recovered(frame):
    return frame.set_index(["layer", "place"])["recovered"]


# -- limits ---------------------------------------------------------------------------------------


def test_restoring_all_that_was_corrupted_brings_everything_back(model):
    frame = causal_trace(model, SHORT, stream="resid_pre", layers=[0, 3])
    found = recovered(frame)
    assert found[0, "last subject token"] == pytest.approx(1, abs=1e-9)
    assert abs(found[3, "last subject token"] - 1) > 1e-3  # it has spread by then
    assert set(frame["place"]) == {"last subject token", "between", "last"}
    assert (frame["p_clean"] != frame["p_corrupted"]).all()


def test_restoring_what_was_not_corrupted_brings_nothing_back(model):
    found = recovered(causal_trace(model, FACTS, stream="resid_pre", layers=[0, 1]))
    assert found[0, "between"] == pytest.approx(0, abs=1e-9)
    assert found[0, "last"] == pytest.approx(0, abs=1e-9)
    assert found[1, "last"] != 0
    assert found[0, "first subject token"] != 0


def test_the_last_residual_at_the_last_token_is_the_answer(model):
    """For answers of one token."""
    words = ("of", "the", "t", "p", "of", "to")
    assert {len(model.tokenizer(f" {word}")["input_ids"]) for word in words} == {1}
    facts = [
        pl.Fact(f.subject, f"{f.prompt} so", target_true=word)
        for f, word in zip(FACTS, words, strict=True)
    ]
    found = recovered(causal_trace(model, facts, stream="resid_post", layers=[3, 2]))
    assert found[3, "last"] == pytest.approx(1, abs=1e-9)
    assert found[3, "last subject token"] == pytest.approx(0, abs=1e-9)
    assert abs(found[2, "last"] - 1) > 1e-6


def test_without_noise_nothing_is_lost(gpt2):
    frame = causal_trace(gpt2, FACTS, layers=[1], noise=0.0)
    assert (frame["p_corrupted"] == frame["p_clean"]).all()
    assert frame["recovered"].isna().all()
    assert (frame["noise"] == 0).all()


def test_more_noise_loses_more():
    """On a model that knows its facts."""
    world = pl.load("world")
    frames = [
        causal_trace(world, pl.knowns()[::150], layers=[2], samples=1, noise=noise)
        for noise in (0.1, 3.0)
    ]
    little, much = (1 - f["p_corrupted"].mean() / f["p_clean"].mean() for f in frames)
    assert little < 0.3
    assert much > 0.6


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, layers", [(1, [5]), (2, [4, 5]), (3, [4, 5, 6]), (10, range(10))])
def test_a_window_has_so_many_layers(width, layers):
    assert list(_window(5, width, 20)) == list(layers)
    assert set(_window(0, width, 20)) == {
        n for n in range(-(width // 2), (width + 1) // 2) if n >= 0
    }
    assert max(_window(19, width, 20)) == 19


def test_the_layers_of_a_window_are_restored_together(gpt2, monkeypatch):
    """In whole passes, as a family whose blocks cannot run alone makes them."""
    hooked = []
    forward = Model.forward

    def spy(self, ids, mask, *, hooks=(), **how):
        hooked.append([name for name, _ in hooks])
        return forward(self, ids, mask, hooks=hooks, **how)

    def refuse(self, first):
        raise ModelError("its blocks cannot run alone")

    monkeypatch.setattr(Model, "forward", spy)
    monkeypatch.setattr(Model, "from_layer", refuse)
    causal_trace(gpt2, SHORT, stream="mlp_out", layers=[2], window=3, samples=1)
    corrupt = gpt2.stream_hook(0, "resid_pre")
    window = [gpt2.stream_hook(n, "mlp_out") for n in (1, 2, 3)]
    entering = gpt2.stream_hook(1, "resid_pre")
    # One look at the embedding's scale, then clean (recording), corrupted (recording where the
    # restored passes could begin), and one pass per place that exists.
    both = [[corrupt, *window], [corrupt, entering]]
    assert hooked[1:] == [*both, *3 * [[corrupt, *window]]]


@pytest.mark.few("*-gpt2", "resid_pre-1-neox", "mlp_out-1-llama", "attn_out-3-gemma2")
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize(
    ("stream", "window"),
    [("resid_post", 1), ("resid_pre", 1), ("mlp_out", 1), ("attn_out", 3), ("resid_post", 2)],
)
def test_running_only_what_changes_changes_nothing(family, stream, window, monkeypatch):
    """The blocks and tokens from the restored value on give what whole passes give."""
    model = shared_model(family, torch.float64)
    how = {"stream": stream, "window": window, "samples": 2}
    fast = causal_trace(model, FACTS, **how)

    def refuse(self, first):
        raise ModelError("its blocks cannot run alone")

    monkeypatch.setattr(Model, "from_layer", refuse)
    whole = causal_trace(model, FACTS, **how)
    # Llama's and Gemma's norms compute in float32 whatever the dtype of the weights.
    near = {"rtol": 0, "atol": 1e-9 if family in ("gpt2", "neox") else 1e-4, "equal_nan": True}
    for column in ("recovered", "p_clean", "p_corrupted"):
        np.testing.assert_allclose(fast[column], whole[column], **near)
    assert fast[["layer", "place", "n"]].equals(whole[["layer", "place", "n"]])


def test_places_can_be_chosen(gpt2):
    every, one = (causal_trace(gpt2, FACTS, **h) for h in ({}, {"places": ("last",)}))
    assert one.equals(every[every["place"] == "last"].reset_index(drop=True))
    with pytest.raises(pl.FactError, match="places must be some of first subject token"):
        causal_trace(gpt2, FACTS, places=("last token",))


def test_a_window_over_all_layers_is_the_same_around_each(gpt2):
    wide, one = (
        recovered(causal_trace(gpt2, FACTS, stream="mlp_out", window=w)).unstack("place")
        for w in (8, 1)
    )
    assert wide.to_numpy() == pytest.approx(wide.iloc[[0] * 4].to_numpy(), abs=1e-12)
    assert (one.nunique() == 4).all()


# -- what is told ---------------------------------------------------------------------------------


def test_the_batches_do_not_matter(gpt2):
    told = []
    one = causal_trace(gpt2, FACTS, batch_size=1, on_cell=lambda *n: told.append(n))
    four = causal_trace(gpt2, FACTS, batch_size=4)
    assert told == [(n, 6) for n in range(1, 7)]
    numbers = ["recovered", "ci_low", "ci_high", "p_clean", "p_corrupted"]
    wanted = pytest.approx(four[numbers].to_numpy(), rel=1e-9, abs=1e-9)
    assert one[numbers].to_numpy() == wanted
    assert one.drop(columns=numbers).equals(four.drop(columns=numbers))


def test_the_seed_decides_the_noise(gpt2):
    one, same, other = (causal_trace(gpt2, FACTS, layers=[1], seed=s) for s in (0, 0, 1))
    assert one.equals(same)
    assert (one["p_corrupted"] != other["p_corrupted"]).all()
    assert (one["p_clean"] == other["p_clean"]).all()


def test_the_frame_tells_how_it_was_made(gpt2):
    frame = causal_trace(
        gpt2, FACTS, stream="attn_out", layers=[3, 0], window=2, samples=4, noise=2.0
    )
    columns = (
        "layer place stream window noise samples recovered ci_low ci_high n p_clean p_corrupted"
    )
    assert list(frame) == columns.split()
    assert list(zip(frame["layer"], frame["place"], strict=True)) == [
        (n, place) for n in (3, 0) for place in PLACES
    ]
    made = frame[["stream", "window", "noise", "samples"]].drop_duplicates()
    assert made.to_numpy().tolist() == [["attn_out", 2, 2.0, 4]]
    # Facts that have such a token: three subjects are one token long, "Ilmar" two; one prompt ends
    # with its subject, one with the token behind it.
    assert dict(zip(frame["place"], frame["n"], strict=True)) == dict(
        zip(PLACES, (3, 2, 6, 4, 5), strict=True)
    )
    assert (frame["ci_low"] <= frame["ci_high"]).all()


def test_the_clean_probability_is_that_of_the_answer(gpt2):
    """Geometric mean over the answer's tokens, from the user's own model."""
    (fact,) = FACTS[4:5]
    prompt = gpt2.tokenizer(fact.text)["input_ids"]
    ids = torch.tensor([gpt2.tokenizer(f"{fact.text} {fact.target_true}")["input_ids"]])
    with torch.no_grad():
        logp = gpt2.hf(ids).logits[0].float().log_softmax(-1)
    answer = range(len(prompt), ids.shape[1])
    want = torch.stack([logp[i - 1, ids[0, i]] for i in answer]).mean().exp()
    frame = causal_trace(gpt2, [fact], layers=[0], samples=1)
    assert frame["p_clean"].to_numpy() == pytest.approx(float(want), rel=1e-5)
    assert len(answer) > 1


def test_the_model_is_left_as_it_was(model):
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    causal_trace(model, SHORT, layers=[1])
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_what_cannot_be_traced_is_refused(gpt2):
    untold = pl.Fact("Kel", "{} is", target_new="Vell")
    with pytest.raises(pl.FactError, match="needs facts with target_true; there are none"):
        causal_trace(gpt2, [untold])
    with pytest.warns(UserWarning, match="1 of 4 facts have no target_true"):
        assert (causal_trace(gpt2, [*SHORT, untold], layers=[0])["n"] <= 3).all()
    for wrong in ({"window": 0}, {"samples": 0}):
        with pytest.raises(pl.FactError, match="at least 1"):
            causal_trace(gpt2, SHORT, **wrong)
    with refused("unknown stream 'mlp'; choose from"):
        causal_trace(gpt2, SHORT, stream="mlp")


@pytest.mark.parametrize("layer, window", [(4, 1), (4, 3), (-1, 1)])
def test_a_layer_that_does_not_exist_is_refused(gpt2, layer, window):
    with refused(f"layer {layer} does not exist: 'gpt2' has layers 0 to 3"):
        causal_trace(gpt2, SHORT, layers=[layer], window=window, samples=1)


@pytest.mark.parametrize("answer", ["tennis", "a tennis player in Ostria"])
def test_token_by_token_it_is_the_trace_of_the_places(gpt2, answer):
    fact = pl.Fact("Mira Tolan", "{} plays the sport of", target_true=answer)
    places = recovered(causal_trace(gpt2, [fact], layers=[2]))
    frame = pl.trace_tokens(gpt2, fact, layers=[2])
    assert "".join(frame["token"]) == fact.text
    assert frame["recovered"].iloc[-1] == pytest.approx(places[2, "last"], rel=1e-9)
    assert frame["recovered"].iloc[0] == pytest.approx(places[2, "first subject token"], rel=1e-9)


# -- a scaled embedding ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gemma3"])
def test_the_noise_has_the_spread_of_what_enters_the_first_layer(family: str) -> None:
    """The corrupted answer's probability, from the user's own model with the noise added by hand:
    three standard deviations of the embedding as it enters layer 0 (Gemma: times √d_model)."""
    model, fact = shared_model(family, torch.float64), FACTS[4]
    scale = D_MODEL**0.5 if family.startswith("gemma") else 1.0
    batch = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject, fact.target_true)])
    first, stop = int(batch.first[0]), int(batch.subject[0]) + 1
    drawn = torch.randn((1, stop - first, D_MODEL), generator=torch.Generator().manual_seed(0))
    noise = torch.zeros(1, batch.ids.shape[1], D_MODEL, dtype=torch.float64)
    noise[:, first:stop] = 3 * scale * float(model.embedding.float().std()) * drawn

    def corrupt(_, args, kwargs):
        return (args[0] + noise, *args[1:]), kwargs

    hf: Any = model.hf
    blocks = hf.transformer.h if family == "gpt2" else hf.model.layers
    handle = blocks[0].register_forward_pre_hook(corrupt, with_kwargs=True)
    try:
        log_p = plain_logits(model, batch.ids, batch.mask)[batch.scored].log_softmax(-1)
    finally:
        handle.remove()
    labels = batch.labels[batch.scored]
    wanted = float(log_p.gather(1, labels[:, None]).mean().exp())
    trace = causal_trace(model, [fact], layers=[1], samples=1)
    assert trace["p_corrupted"].iloc[0] == pytest.approx(wanted, rel=1e-6)
