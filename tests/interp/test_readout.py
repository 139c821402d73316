"""Read through the lens, the last residual is the model's answer; the rest is read the same way."""

from __future__ import annotations

import pytest
import torch
from kept import bundled, shared_model
from tiny import (
    FAMILIES,
    MORE,
    PARALLEL,
    plain_logits,
    refused,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

import pmet_lens as pl
from pmet_lens.interp import lens
from pmet_lens.models.activations import probe
from pmet_lens.models.model import Model

torch.set_num_threads(1)
POST_NORM = ("gemma2", "gemma3", "olmo2")
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", relation="sport"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French", relation="tongue"),
    pl.Fact("Ilmar", "The tower of {} stands in the city of", "Kel", "Vell", relation="city"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param)


def answers(model: Model) -> torch.Tensor:
    """What the user's own model says after each prompt, alone: `[fact, vocab]`."""
    rows = []
    for fact in FACTS:
        ids = torch.tensor([model.tokenizer(fact.text)["input_ids"]])
        rows.append(plain_logits(model, ids, torch.ones_like(ids))[0, -1])
    return torch.stack(rows)


def test_the_last_residual_reads_as_the_models_logits(model):
    states = probe(model, FACTS, ("resid_post",), positions=("last",))["resid_post", "last"]
    said = lens.logits(model, states)
    assert said.shape == (3, 4, 320)
    assert torch.allclose(said[:, 3], answers(model), atol=1e-4)
    assert not torch.allclose(said[:, 2], answers(model), atol=1e-2)


def test_soft_caps_are_part_of_the_readout():
    """Planted: a cap low enough to bite."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("gemma2")
    config.final_logit_softcapping = 0.5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = AutoModelForCausalLM.from_config(config).eval()
        hf.lm_head.weight.data.normal_()
    model = pl.load(hf, tiny_tokenizer(), name="capped")
    states = probe(model, FACTS, ("resid_post",), (3,), ("last",))["resid_post", "last"]
    said = lens.logits(model, states[:, 0])
    assert 0.4 < said.abs().max() <= 0.5
    assert torch.allclose(said, answers(model), atol=1e-4)


def test_rank_probability_and_top_are_those_of_the_logits(model):
    frame = lens.lens(model, FACTS, k=3)
    found = probe(model, FACTS, [lens.added(s) for s in lens.all_streams(model)])
    spelt = [model.tokenizer(f" {f.target_true}")["input_ids"][0] for f in FACTS]
    assert len(frame) == len(found.values) * 4 * len(FACTS)
    assert not frame.duplicated(["fact", "stream", "position", "layer"]).any()
    for row in frame.itertuples(index=False):
        state = found[lens.added(row.stream), row.position][row.fact, row.layer]
        logits = lens.logits(model, state)
        own = logits[spelt[row.fact]]
        assert row.rank == 1 + int((logits > own).sum())
        assert row.probability == pytest.approx(float(logits.softmax(0)[spelt[row.fact]]), abs=1e-6)
        best = logits.topk(3).indices
        assert row.top == tuple(model.tokenizer.decode([i]) for i in best.tolist())
        assert (row.rank == 1) == (spelt[row.fact] == int(best[0]))
        assert (row.subject, row.relation) == (FACTS[row.fact].subject, FACTS[row.fact].relation)
    assert frame["rank"].nunique() > 5


@pytest.mark.few("gpt2", "gptj", "gemma3", "olmo2")
@pytest.mark.parametrize("family", (*FAMILIES, *MORE))
def test_the_embedding_and_all_that_is_added_make_the_stream(family):
    model = shared_model(family, torch.float64)
    streams = ("attn_out", "mlp_out", "attn_added", "mlp_added", "resid_pre", "resid_post")
    found = probe(model, FACTS, streams)
    for place in ("last_subject", "last"):
        attn, mlp, attn_added, mlp_added, pre, post = (found[s, place] for s in streams)
        summed = pre[:, 0] + attn_added.sum(1) + mlp_added.sum(1)
        torch.testing.assert_close(summed, post[:, -1], rtol=1e-9, atol=1e-9)
        same = [torch.equal(attn, attn_added), torch.equal(mlp, mlp_added)]
        assert same == [family not in POST_NORM] * 2


def test_what_a_component_says_is_what_it_adds():
    """Planted: behind a norm of gain g at one channel alone, a component says what that does."""
    model = tiny_model("olmo2")
    fact = FACTS[0]
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        gain = model.hf.get_submodule(f"model.layers.1.{name}").weight.data
        gain.copy_(torch.eye(len(gain))[3])
    said = lens.lens(model, [fact], ("attn_out", "mlp_out"), (1,), ("last",), k=1)
    signs = [
        lens.top_tokens(model, sign * torch.eye(model.d_model)[3], 1).tolist() for sign in (1, -1)
    ]
    texts = [(model.tokenizer.decode(ids),) for ids in signs]
    assert set(said["top"]) <= set(texts)
    tokens = lens.lens_tokens(model, fact, ("attn_out", "mlp_out"), (1,))
    assert {(text,) for text in tokens["top"]} <= set(texts)
    last = tokens[tokens["position"] == tokens["position"].max()]
    assert last["rank"].tolist() == said["rank"].tolist()


def test_there_is_a_middle_only_where_attention_comes_first(model):
    parallel = model.name in PARALLEL
    streams = set(lens.lens(model, FACTS, layers=(1,), positions=("last",))["stream"])
    outer = {"attn_out", "mlp_out", "resid_pre", "resid_post"}
    assert streams == (outer if parallel else outer | {"resid_mid"})
    if parallel:
        with refused(r"blocks of '\w+' are parallel, .* no resid_mid; choose from resid_pre"):
            lens.lens(model, FACTS, ("resid_mid",))
    else:
        states = probe(model, FACTS, ("resid_mid", "resid_pre", "attn_out"), (1,), ("last",))
        pre, mid, out = (states[s, "last"] for s in ("resid_pre", "resid_mid", "attn_out"))
        # Gemma-2 norms what its attention writes once more.
        assert torch.allclose(mid, pre + out, atol=1e-5) == (model.name != "gemma2")
        assert not torch.allclose(mid, pre, atol=1e-2)


def test_the_asked_answer_is_looked_up():
    model = shared_model("gpt2")
    true, new = (lens.lens(model, FACTS, answer=a) for a in ("target_true", "target_new"))
    assert (true["top"] == new["top"]).all()
    assert (true["rank"] != new["rank"]).any()
    known = [pl.Fact("Ilmar", "{} is", target_true="Kel")]
    assert len(lens.lens(model, known, ("mlp_out",), (0,), ("last",))) == 1
    with pytest.raises(pl.FactError, match="lens needs facts with target_new; there are none"):
        lens.lens(model, known, answer="target_new")


def test_more_tokens_than_there_are_is_all_of_them():
    model = shared_model("gpt2")
    (top,) = lens.lens(model, FACTS[:1], ("mlp_out",), (0,), ("last",), k=10_000)["top"]
    assert len(top) == 320


@pytest.mark.parametrize("name", ["world", "world-sequential"])
def test_a_model_that_knows_says_so_at_its_end_and_not_at_its_beginning(name):
    model = bundled(name)
    facts = pl.knowns()[::90]
    frame = lens.lens(model, facts, ("resid_pre", "resid_post"), (0, 7), ("last",))
    first = frame[frame["rank"] == 1].groupby(["stream", "layer"]).size() / len(facts)
    assert first.get(("resid_post", 7), 0) >= 0.95
    assert first.get(("resid_pre", 0), 0) <= 0.1
