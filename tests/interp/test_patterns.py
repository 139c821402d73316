"""Heads built to look somewhere are seen to look there, and patterns compare as by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from kept import shared_model
from tiny import FAMILIES, refused, tiny_hf, tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.interp.attention import PAIRS, ROLES, attention_patterns, pattern_similarity
from pmet_lens.models import tokens
from pmet_lens.models.model import Model

torch.set_num_threads(1)
FACTS = [
    pl.Fact("Mira TolanQ", "{} plays the sport of", target_true="tennis", relation="sport"),
    pl.Fact("DanQ", "The mother tongue of {} is", target_true="French", relation="tongue"),
    pl.Fact("IlmarQ", "The city is {}", target_true="Vell", relation="city"),
    pl.Fact("Q", "{} is", target_true="Kel", relation="is"),
]


def counts(model: Model, fact: pl.Fact) -> dict[str, int]:
    """How many tokens have each role, by counting in the text."""
    before, _, behind = fact.prompt.partition("{}")
    pieces = [before, fact.subject, behind]
    n = [len(model.tokenizer(piece)["input_ids"]) if piece else 0 for piece in pieces]
    at_end = {"between": 0, "self": 0} if not behind else {"between": n[2] - 1, "self": 1}
    return {"before": n[0], "in_subject": n[1] - 1, "last_subject": 1, **at_end}


# -- planted heads --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searching() -> Model:
    """GPT-2 whose head 2 of layer 0 looks for the token "Q", with which every subject here ends,
    and whose other heads there look at all tokens alike."""
    hf, tokenizer = tiny_hf("gpt2"), tiny_tokenizer()
    (q,) = tokenizer("Q")["input_ids"]
    hf.transformer.wte.weight.data[:, 0] = 0
    hf.transformer.wpe.weight.data[:, 0] = 0
    hf.transformer.wte.weight.data[q, 0] = 9
    block, at = hf.transformer.h[0], 2 * 8  # the first entry of head 2
    block.ln_1.weight.data.fill_(1)
    block.ln_1.bias.data.zero_()
    weight, bias = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
    weight[:, :64] = 0  # queries, then keys
    bias[:64] = 0
    bias[at] = 1
    weight[0, 32 + at] = 1e3
    return pl.load(hf, tokenizer, name="searching")


def test_a_head_that_looks_for_the_subject_has_all_its_weight_there(searching):
    frame = attention_patterns(searching, FACTS, [0]).query("head == 2")
    assert len(frame) == len(FACTS)
    assert (frame["last_subject"] == 1).all()
    assert (frame["entropy"] == 0).all()
    assert (frame[["before", "in_subject", "between", "self"]] == 0).all(axis=None)


def test_a_head_that_looks_everywhere_counts_tokens(searching):
    frame = attention_patterns(searching, FACTS, [0]).query("head != 2")
    assert len(frame) == 3 * len(FACTS)
    for row in frame.to_dict("records"):
        wanted = counts(searching, FACTS[row["fact"]])
        n = sum(wanted.values())
        assert [row[r] * n for r in ROLES] == pytest.approx([wanted[r] for r in ROLES], abs=1e-5)
        assert row["entropy"] == pytest.approx(math.log(n), abs=1e-5)


def test_the_layer_above_is_another(searching):
    frame = attention_patterns(searching, FACTS, [1])
    assert (frame["last_subject"] < 0.99).all()
    assert (frame["entropy"] > 0).any()


# -- on every family ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt"])
def test_the_roles_share_all_of_the_weight(family):
    model = shared_model(family)
    frame = attention_patterns(model, FACTS)
    head = ["fact", "subject", "relation", "layer", "head"]
    assert list(frame) == [*head, *ROLES, "entropy"]
    assert len(frame) == len(FACTS) * 4 * 4
    assert frame[["fact", "layer", "head"]].apply(tuple, axis=1).is_monotonic_increasing
    assert frame[list(ROLES)].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert ((frame[list(ROLES)] >= 0) & (frame[list(ROLES)] <= 1 + 1e-6)).all(axis=None)
    for i, fact in enumerate(FACTS):
        own, wanted = frame[frame["fact"] == i], counts(model, fact)
        assert set(own["subject"]) == {fact.subject}
        assert set(own["relation"]) == {fact.relation}
        assert own["entropy"].between(0, math.log(sum(wanted.values())) + 1e-6).all()
        for role, n in wanted.items():
            assert (own[role] > 0).any() == (n > 0) or family == "gemma2"  # its window is 5 tokens
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_an_architecture_that_hides_its_weights_is_told_how_to_show_them():
    hf = tiny_hf("opt")
    with refused(r"'opt' does not show its attention weights; .*attn_implementation=\"eager\""):
        attention_patterns(pl.load(hf, tiny_tokenizer(), name="opt"), FACTS)
    hf.set_attn_implementation("eager")
    frame = attention_patterns(pl.load(hf, tiny_tokenizer(), name="opt"), FACTS)
    assert frame[list(ROLES)].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert frame["entropy"].nunique() > 30


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
def test_they_are_the_weights_transformers_shows(family, implementation):
    hf, plain = tiny_hf(family), tiny_hf(family)
    hf.set_attn_implementation(implementation)
    plain.set_attn_implementation("eager")
    model = pl.load(hf, tiny_tokenizer())
    frame = attention_patterns(model, FACTS).set_index(["fact", "layer"])
    for i, fact in enumerate(FACTS):
        batch = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)])
        n = counts(model, fact)
        with torch.no_grad():
            shown = plain(batch.ids, output_attentions=True).attentions
        for layer, weights in enumerate(shown):
            parts = weights[0, :, -1].split([n[role] for role in ROLES], dim=1)
            want = torch.stack([part.sum(1) for part in parts], dim=1).double()
            own = frame.loc[(i, layer)].sort_values("head")
            assert own[list(ROLES)].to_numpy() == pytest.approx(want.numpy(), abs=1e-5)
            entropy = torch.special.entr(weights[0, :, -1].double()).sum(1)
            assert own["entropy"].to_numpy() == pytest.approx(entropy.numpy(), abs=1e-5)


def test_the_batches_and_the_choice_of_layers_do_not_matter():
    model = tiny_model("gpt2", torch.float64)
    whole = attention_patterns(model, FACTS)
    alone = attention_patterns(model, FACTS, batch_tokens=1)
    columns = [*ROLES, "entropy"]
    assert whole[columns].to_numpy() == pytest.approx(alone[columns].to_numpy(), abs=1e-9)
    assert whole.drop(columns=columns).equals(alone.drop(columns=columns))
    part = attention_patterns(model, FACTS, (2, 0))
    same = whole[whole["layer"].isin([0, 2])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, same, rtol=0, atol=1e-9)


def test_nothing_to_look_at_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(pl.FactError, match="no facts to look at"):
        attention_patterns(model, [])
    with refused("layer 4 does not exist: 'gpt2' has layers 0 to 3"):
        attention_patterns(model, FACTS, [4])


# -- facts compared -------------------------------------------------------------------------------


def some_facts(*rows: tuple[str, str, str]) -> list[pl.Fact]:
    return [pl.Fact(s, "{} " + p, target_true="a", relation=r) for s, r, p in rows]


def patterns(*weights: list[list[float]], layers: int = 1) -> pd.DataFrame:
    """A table as `attention_patterns` gives it: per fact and head the weights on `ROLES`."""
    rows = [
        {"fact": i, "layer": n, "head": h, **dict(zip(ROLES, roles, strict=True))}
        for n in range(layers)
        for i, heads in enumerate(weights)
        for h, roles in enumerate(heads)
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(ROLES, float))


def test_similarity_by_hand():
    facts = some_facts(("A", "r", "p"), ("B", "r", "p"), ("C", "r", "q"), ("D", "s", "p"))
    table = patterns(
        [[0.5, 0.5, 0, 0, 0], [1, 0, 0, 0, 0]],
        [[0.25, 0.75, 0, 0, 0], [1, 0, 0, 0, 0]],  # with A: (0.75 + 1) / 2
        [[0, 0, 1, 0, 0], [0.5, 0, 0.5, 0, 0]],  # with A and with B: (0 + 0.5) / 2
        [[0, 0, 0, 0.5, 0.5], [0, 0, 0, 0, 1]],  # with nobody
    )
    found = pattern_similarity(table, facts).set_index("pair")
    assert found["mean"].to_dict() == dict(zip(PAIRS, (0.875, 0.25, 0.0), strict=True))
    assert found["n"].to_dict() == dict(zip(PAIRS, (2, 3, 4), strict=True))
    assert (found["layer"] == 0).all()
    shuffled = pattern_similarity(table.sample(frac=1, random_state=0), facts)
    assert shuffled.set_index("pair").equals(found)


def test_every_fact_counts_once_however_many_partners_it_has():
    facts = some_facts(("A", "r", "p"), ("B", "r", "p"), ("C", "r", "p"), ("D", "s", "p"))
    one, two = [[1, 0, 0, 0, 0]], [[0, 1, 0, 0, 0]]
    found = pattern_similarity(patterns(one, one, one, two), facts).set_index("pair")["mean"]
    assert found.to_dict() == {PAIRS[0]: 1, PAIRS[2]: 0}
    found = pattern_similarity(patterns(one, one, two, one), facts).set_index("pair")["mean"]
    assert found.to_dict() == {
        PAIRS[0]: pytest.approx(1 / 3),
        PAIRS[2]: pytest.approx(2 / 3),
    }


def test_one_pattern_everywhere_is_all_alike_and_layers_are_apart():
    facts = some_facts(("A", "r", "p"), ("B", "r", "q"), ("C", "s", "p"))
    table = patterns(*3 * [[[0.2, 0.2, 0.2, 0.2, 0.2]]], layers=2)
    table.loc[(table["layer"] == 1) & (table["fact"] == 2), list(ROLES)] = (0, 0, 0, 0, 1)
    found = pattern_similarity(table, facts).set_index(["layer", "pair"])["mean"]
    assert found[0].to_list() == pytest.approx([1, 1])
    assert found[1, PAIRS[1]] == pytest.approx(1)
    assert found[1, PAIRS[2]] == pytest.approx(0.2)


@pytest.mark.parametrize("subject, pairs", [("A", 0), ("B", 1)])
def test_a_subject_is_not_compared_with_itself(subject, pairs):
    facts = some_facts(("A", "r", "p"), (subject, "r", "p"))
    found = pattern_similarity(patterns(*2 * [[[1, 0, 0, 0, 0]]]), facts)
    assert list(found) == ["layer", "pair", "mean", "ci_low", "ci_high", "n"]
    assert len(found) == pairs


def test_facts_without_a_relation_do_not_share_one():
    facts = some_facts(("A", None, "p"), ("B", None, "p"))
    with pytest.raises(pl.FactError, match="no relation"):
        pattern_similarity(patterns(*2 * [[[1, 0, 0, 0, 0]]]), facts)
