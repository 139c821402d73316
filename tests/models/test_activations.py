"""What `probe` keeps is what single reads give, in any batches, and the model is left as it was."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from kept import shared_model
from safetensors.torch import save_file
from tiny import FAMILIES, refused, tiny_batch

import pmet_lens as pl
from pmet_lens.models import activations, tokens
from pmet_lens.models.activations import Activations, batches, probe
from pmet_lens.models.model import Model

torch.set_num_threads(1)
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", target_true="tennis", relation="sport"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French", case_id=7),
    pl.Fact("Ilmar", "The tower of {} stands in the harbour city of", "Kel", paraphrases=("x",)),
    pl.Fact("Vell", "The city is {}", target_true="Ostria", neighbours=(("A", "b"),)),
    pl.Fact("Kel", "{} is", target_true="the", relation="is"),
]
STREAMS = ("attn_in", "mlp_out", "resid_post")
PLACES = ("last_subject", "last")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def found(gpt2) -> Activations:
    return probe(gpt2, FACTS, STREAMS)


# -- the values -----------------------------------------------------------------------------------


def test_they_are_those_of_every_fact_read_alone(model):
    layers = (3, 1)  # the order asked for is kept
    found = probe(model, FACTS, STREAMS, layers)
    assert (len(found), found.facts, found.layers) == (len(FACTS), tuple(FACTS), layers)
    assert list(found.values) == [(s, p) for s in STREAMS for p in PLACES]
    for i, fact in enumerate(FACTS):
        batch = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)])
        for place, at in (("last_subject", batch.subject), ("last", batch.last)):
            wanted = {(n, s): at for n in layers for s in STREAMS}
            alone = activations.read_streams(model, batch.ids, batch.mask, wanted)
            for stream in STREAMS:
                row = torch.stack([alone[n, stream][0] for n in layers])
                assert torch.allclose(found[stream, place][i], row, atol=1e-5)
                assert not torch.allclose(found[stream, place][i - 1], row, atol=1e-2)
                assert not torch.allclose(found[stream, place][i].flip(0), row, atol=1e-2)


# The first matrix of attention and of MLP in layer 2, by the names of each family.
FIRST = {
    "gpt2": ("transformer.h.2.attn.c_attn", "transformer.h.2.mlp.c_fc"),
    "gptj": ("transformer.h.2.attn.q_proj", "transformer.h.2.mlp.fc_in"),
    "neox": ("gpt_neox.layers.2.attention.query_key_value", "gpt_neox.layers.2.mlp.dense_h_to_4h"),
    "llama": ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.gate_proj"),
    "gemma2": ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.gate_proj"),
    "opt": ("model.decoder.layers.2.self_attn.q_proj", "model.decoder.layers.2.fc1"),
}


@pytest.mark.parametrize("stream, number", [("attn_in", 0), ("mlp_in", 1)])
def test_what_a_component_reads_is_the_input_of_its_first_matrix(model, stream, number):
    """By plain torch hooks on the user's own model."""
    found = probe(model, FACTS, (stream,), (2,), ("last",))[stream, "last"]
    seen = []
    module = model.hf.get_submodule(FIRST[model.name][number])
    handle = module.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].view(-1, 32)[-1])
    )
    with torch.no_grad():
        for fact in FACTS:
            model.hf(torch.tensor([model.tokenizer(fact.text)["input_ids"]]))
    handle.remove()
    assert torch.allclose(found[:, 0], torch.stack(seen), atol=1e-5)
    assert not torch.allclose(found[:, 0], torch.stack(seen).roll(1, 0), atol=1e-2)


def test_both_positions_are_one_where_the_prompt_ends_with_the_subject(found):
    same = [
        torch.equal(found["mlp_out", "last"][i], found["mlp_out", "last_subject"][i])
        for i in range(len(FACTS))
    ]
    assert same == [fact.prompt.endswith("{}") for fact in FACTS]
    assert same.count(True) == 1


def test_the_batches_do_not_matter(gpt2, found):
    told = []
    alone = probe(gpt2, FACTS, STREAMS, batch_tokens=1, on_facts=lambda *n: told.append(n))
    assert told == [(n, 5) for n in range(1, 6)]
    for key, value in found.values.items():
        assert torch.allclose(alone[key], value, rtol=0, atol=1e-9)
    assert (
        probe(gpt2, FACTS[::-1], STREAMS)["mlp_out", "last"]
        .flip(0)
        .allclose(found["mlp_out", "last"], rtol=0, atol=1e-9)
    )


@pytest.mark.parametrize("limit, passes", [(1, 5), (45, None), (10_000, 1)])
def test_a_pass_stays_within_its_tokens(gpt2, limit, passes):
    prompts = [tokens.Prompt(f.prompt, f.subject) for f in FACTS]
    parts = list(batches(gpt2, prompts, limit))
    assert sorted(i for chosen, _ in parts for i in chosen.tolist()) == list(range(len(FACTS)))
    assert all(batch.ids.numel() <= limit or len(batch) == 1 for _, batch in parts)
    assert len(parts) == passes or (passes is None and 1 < len(parts) < 5)


def test_nothing_above_the_highest_layer_runs(gpt2):
    ran = []
    handles = [
        block.original_component.register_forward_pre_hook(lambda _m, _a, n=n: ran.append(n))
        for n, block in enumerate(gpt2.bridge.blocks)
    ]
    probe(gpt2, FACTS, ("mlp_out",), (1, 0))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_the_model_is_left_as_it_was(model):
    ids, mask = tiny_batch()
    parameters = list(model.hf.parameters())
    parameters[0].requires_grad_(False)
    flags = [p.requires_grad for p in parameters]
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    points = model.bridge.hook_dict.items()  # OPT's carry wires of TransformerLens's own
    hooked = {name: len(point.fwd_hooks) for name, point in points}
    with torch.no_grad():
        logits = model.forward(ids, mask)
        plain = model.hf(input_ids=ids, attention_mask=mask).logits
    found = probe(model, FACTS)
    assert not any(value.requires_grad for value in found.values.values())
    with torch.no_grad():
        assert torch.equal(model.forward(ids, mask), logits)
        assert torch.equal(model.hf(input_ids=ids, attention_mask=mask).logits, plain)
    assert {name: len(point.fwd_hooks) for name, point in points} == hooked
    assert [p.requires_grad for p in parameters] == flags
    assert len(set(flags)) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    parameters[0].requires_grad_(True)


def test_a_layer_asked_for_twice_is_not_left_unwritten(gpt2, found, monkeypatch):
    """Planted: memory that was never written is NaN."""
    monkeypatch.setattr(
        torch, "empty", lambda size, **how: torch.full(size, float("nan"), dtype=how["dtype"])
    )
    twice = probe(gpt2, FACTS, ("mlp_out",), (1, 1), ("last",))["mlp_out", "last"]
    assert torch.allclose(twice[:, 0], found["mlp_out", "last"][:, 1], rtol=0, atol=1e-9)
    assert torch.equal(twice[:, 1], twice[:, 0])


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, size", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_values_keep_the_models_dtype_and_nothing_else_is_kept(dtype, size):
    found = probe(shared_model("gpt2", dtype), FACTS, STREAMS, (0, 2, 3))
    assert {v.dtype for v in found.values.values()} == {dtype}
    assert found.nbytes == len(FACTS) * 3 * 32 * size * len(STREAMS) * len(PLACES)
    assert sum(v.untyped_storage().nbytes() for v in found.values.values()) == found.nbytes


def test_the_default_study_of_gpt_j_fits_in_two_gigabytes():
    shape = (1209, 28, 4096)
    streams = ("attn_out", "mlp_out", "resid_post")

    def study(dtype: torch.dtype) -> Activations:
        values = {
            (s, p): torch.empty(shape, dtype=dtype, device="meta") for s in streams for p in PLACES
        }
        return Activations(values, (), tuple(range(28)), "gptj")

    assert study(torch.bfloat16).nbytes == 1209 * 28 * 4096 * 2 * 3 * 2 < 2 * 2**30
    assert study(torch.float32).nbytes > 2 * 2**30


# -- tables and files -----------------------------------------------------------------------------


def test_the_frame_has_a_row_per_vector():
    found = probe(shared_model("gptj"), FACTS, STREAMS, (2, 0))
    frame = found.to_frame()
    head = ["fact", "subject", "relation", "stream", "position", "layer"]
    assert list(frame) == [*head, *range(32)]
    assert len(frame) == len(FACTS) * 2 * len(STREAMS) * len(PLACES)
    assert not frame.duplicated(["fact", "stream", "position", "layer"]).any()
    vectors = frame[list(range(32))].to_numpy()
    for row, vector in zip(frame[head].itertuples(index=False), vectors, strict=True):
        fact, subject, relation, stream, position, layer = row
        assert subject == FACTS[fact].subject
        assert (None if pd.isna(relation) else relation) == FACTS[fact].relation
        value = found[stream, position][fact, found.layers.index(layer)]
        assert np.array_equal(vector, value.numpy())


def test_the_frame_can_be_a_part(found):
    part = found.to_frame("mlp_out", "last")
    assert set(part["stream"]) == {"mlp_out"}
    assert set(part["position"]) == {"last"}
    assert len(part) == len(FACTS) * 4
    assert len(found.to_frame(position="last")) == len(FACTS) * 4 * len(STREAMS)
    with refused("'attn_out' at position 'last' was not probed"):
        found.to_frame("attn_out", "last")


def test_what_was_not_probed_is_named(found):
    with refused(r"attn_out.* was not probed; there are .*mlp_out"):
        found["attn_out", "last"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_saved_is_loaded(dtype, tmp_path):
    before = probe(shared_model("gpt2", dtype), FACTS, STREAMS, (3, 1))
    before.save(tmp_path / "a.safetensors")
    after = Activations.load(str(tmp_path / "a.safetensors"))
    assert (after.facts, after.layers, after.model) == (before.facts, before.layers, "gpt2")
    assert after.values.keys() == before.values.keys()
    for key, value in before.values.items():
        assert after[key].dtype == dtype
        assert torch.equal(after[key], value)


def test_files_that_hold_no_activations_are_refused(found, tmp_path):
    path = tmp_path / "a.safetensors"
    for missing in (path, tmp_path):
        with refused("cannot be read as activations"):
            Activations.load(missing)
    found.save(path)
    whole = path.read_bytes()
    for kept in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with refused(r"a\.safetensors cannot be read as activations"):
            Activations.load(path)
    for metadata in (None, {"format": "pt"}, {"pmet_lens": '{"format": "pmet_lens moments 1"}'}):
        save_file({"mlp_out@last": torch.ones(1, 1, 2)}, path, metadata)
        with refused("is a safetensors file, but not activations"):
            Activations.load(path)
    with refused("could not be written to"):
        found.save(tmp_path / "nowhere" / "a.safetensors")


# -- refusals -------------------------------------------------------------------------------------


def test_streams_layers_and_positions_that_do_not_exist_are_named(gpt2):
    names = "attn_in, attn_out, mlp_in, mlp_out, resid_pre, resid_mid, resid_post"
    with refused(f"unknown stream 'mlp'; choose from {names}"):
        probe(gpt2, FACTS, ("mlp",))
    for layer in (4, -1):
        with refused(f"layer {layer} does not exist: 'gpt2' has layers 0 to 3"):
            probe(gpt2, FACTS, layers=(layer,))
    with refused("unknown position 'first'; choose from last_subject, first_subject, last"):
        probe(gpt2, FACTS, positions=("first",))
    for nothing in ({"streams": ()}, {"layers": ()}, {"positions": ()}):
        with refused("at least one stream, one layer and one position"):
            probe(gpt2, FACTS, **nothing)


def test_facts_that_cannot_be_read_are_told_why(gpt2):
    with pytest.raises(pl.FactError, match="no facts to probe; pass at least one"):
        probe(gpt2, [])
    long = pl.Fact("Ilmar", "The tower " * 40 + "of {} is", target_true="Kel")
    count = len(gpt2.tokenizer(long.text)["input_ids"])
    with pytest.raises(pl.FactError, match=f"has {count} tokens, but the model reads at most 64"):
        probe(gpt2, [*FACTS, long])
    assert len(probe(gpt2, FACTS[-1:], ("mlp_out",))) == 1
