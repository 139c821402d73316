"""Activations made of relation, of subject, of words or of noise are split into just that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

import pmet_lens as pl
from pmet_lens.interp.variance import FACTORS, split, variance_split
from pmet_lens.models.activations import Activations, probe

torch.set_num_threads(1)
R, S = 4, 6


def grid(relations: int = R, subjects: int = S) -> list[pl.Fact]:
    """Every subject with every relation, asked in one of two phrasings per relation."""
    return [
        pl.Fact(f"subject {s}", f"{{}} {r} phrased {s % 2}", target_true="a", relation=f"r{r}")
        for r in range(relations)
        for s in range(subjects)
    ]


def codes(relations: int = R, subjects: int = S) -> tuple[Tensor, Tensor]:
    """One-hot vectors of each fact's relation and subject, at right angles to each other."""
    relation = torch.eye(relations, dtype=torch.float64).repeat_interleave(subjects, 0)
    subject = torch.eye(subjects, dtype=torch.float64).repeat(relations, 1)
    relation = torch.nn.functional.pad(relation, (0, subjects))
    return relation, torch.nn.functional.pad(subject, (relations, 0))


def planted(value: Tensor, facts=None) -> Activations:
    facts = grid() if facts is None else facts
    return Activations({("attn_out", "last"): value[:, None]}, tuple(facts), (5,), "planted")


def shares(value: Tensor, facts=None, n_permutations: int = 0):
    frame = split(planted(value, facts), n_permutations)
    assert set(frame["layer"]) == {5}
    return frame.set_index("factor")


# -- planted truths -------------------------------------------------------------------------------


def test_what_depends_on_the_relation_alone_is_all_relation():
    frame = shares(codes()[0], n_permutations=200)
    share = frame["share"]
    assert share["relation"] == pytest.approx(1, abs=1e-12)
    assert share["relation, other phrasing"] == pytest.approx(1, abs=1e-12)
    # Facts of a subject are one of each other relation: their mean deviation is −1/(R−1) of one's.
    assert share["subject"] == pytest.approx(-1 / (R - 1), abs=1e-12)
    assert frame["p"]["relation"] == pytest.approx(1 / 201)
    assert frame["p"]["subject"] > 0.05
    assert frame["null"]["relation"] < 0.5
    assert (frame["ci_low"]["relation"], frame["ci_high"]["relation"]) == pytest.approx((1, 1))
    assert (frame["n"] == R * S).all()


def test_what_depends_on_the_subject_alone_is_all_subject():
    frame = shares(codes()[1], n_permutations=200)
    assert frame["share"]["subject"] == pytest.approx(1, abs=1e-12)
    assert frame["share"]["relation"] == pytest.approx(-1 / (S - 1), abs=1e-12)
    assert frame["p"]["subject"] == pytest.approx(1 / 201)
    assert frame["p"]["relation"] > 0.05


def test_what_depends_on_the_words_alone_is_no_more_than_words():
    facts = grid()
    names = sorted({f.prompt for f in facts})
    words = torch.eye(len(names))[[names.index(f.prompt) for f in facts]]
    share = shares(words)["share"]
    assert share["relation"] > 0.2
    assert share["relation, other phrasing"] == pytest.approx(-1 / (2 * R - 1), abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_is_nothing(seed):
    noise = torch.randn(R * S, 16, generator=torch.Generator().manual_seed(seed))
    frame = shares(noise, n_permutations=200)
    assert len(frame) == len(FACTORS)
    assert (frame["share"] < frame["null"]).all()
    assert (frame["p"] > 0.05).all()
    planted_too = shares(noise + 3 * codes()[0].repeat(1, 2)[:, :16].float(), n_permutations=200)
    assert planted_too["p"]["relation"] < 0.01


@pytest.mark.parametrize("a, b", [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (5.0, 0.5)])
def test_a_mixture_is_split_by_its_squares(a, b):
    n = 12
    relation, subject = codes(n, n)
    share = shares(a * relation + b * subject, grid(n, n))["share"]
    total = (a**2 + b**2) * (1 - 1 / n)
    assert share["relation"] == pytest.approx((a**2 * (1 - 1 / n) - b**2 / n) / total, abs=1e-12)
    assert share["subject"] == pytest.approx((b**2 * (1 - 1 / n) - a**2 / n) / total, abs=1e-12)
    assert share["relation"] == pytest.approx(a**2 / (a**2 + b**2), abs=1 / (n - 1))


# -- invariants -----------------------------------------------------------------------------------


def test_neither_origin_nor_scale_nor_axes_nor_order_matter():
    generator = torch.Generator().manual_seed(0)
    relation, subject = codes()
    value = relation + 0.5 * subject + 0.3 * torch.randn(24, R + S, generator=generator)
    turn = torch.linalg.qr(torch.randn(R + S, R + S, generator=generator).double()).Q
    before = shares(value)["share"]
    for other in (value + 7, 3 * value, value @ turn):
        assert shares(other)["share"].to_numpy() == pytest.approx(before.to_numpy(), abs=1e-10)
    order = torch.randperm(24, generator=generator)
    facts = [grid()[i] for i in order.tolist()]
    moved = shares(value[order], facts)["share"]
    assert moved.to_numpy() == pytest.approx(before.to_numpy(), abs=1e-10)
    assert abs(shares(value[order])["share"] - before).max() > 0.1  # the facts must go along


def test_the_seed_decides_the_null_and_nothing_else():
    value = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    one, same, other = (split(planted(value), 50, seed) for seed in (0, 0, 1))
    assert one.equals(same)
    assert (one["null"] != other["null"]).any()
    assert one.drop(columns=["null", "p"]).equals(other.drop(columns=["null", "p"]))


def test_facts_without_a_partner_do_not_count():
    facts = grid()
    alone = [
        pl.Fact(f"other {i}", "{} 0 phrased 0", target_true="a", relation="r0") for i in (0, 1)
    ]
    value = torch.cat([codes()[1], 9 * torch.ones(2, R + S)])
    frame = shares(value, [*facts, *alone])
    assert frame["n"].to_dict() == {FACTORS[0]: 26, FACTORS[1]: 26, FACTORS[2]: 24}
    every = [pl.Fact(f"{i}", "{} is", target_true="a", relation=f"r{i % 2}") for i in range(6)]
    assert list(shares(torch.randn(6, 3), every).index) == ["relation"]


# -- on a model -----------------------------------------------------------------------------------


def test_the_tokens_themselves_depend_on_what_is_read():
    """Planted: all prompts of a relation end with the same token, and rotary positions leave the
    embeddings alone. Then the last token is the relation, and the last subject token the subject.
    """
    ends = {"r0": ("{} lives in", "the home of {} is in"), "r1": ("{} speaks", "what {} speaks")}
    facts = [
        pl.Fact(s, ends[r][i % 2], target_true="a", relation=r)
        for r in ends
        for i, s in enumerate(("Mira Q", "Mira X", "Mira Z", "Mira W"))
    ]
    model = tiny_model("gptj")
    how = {"layers": (0, 2), "n_permutations": 0}
    last, subject = (
        variance_split(model, facts, ("resid_pre",), p, **how).set_index(["layer", "factor"])[
            "share"
        ]
        for p in ("last", "last_subject")
    )
    assert last[0, "relation"] == pytest.approx(1, abs=1e-6)
    assert last[0, "relation, other phrasing"] == pytest.approx(1, abs=1e-6)
    assert last[0, "subject"] < 0
    assert subject[0, "subject"] == pytest.approx(1, abs=1e-6)
    assert subject[0, "relation"] < 0
    assert last[2, "relation"] < 0.999
    again = split(probe(model, facts, ("resid_pre",), (0, 2), ("last",)), 0)
    assert np.array_equal(again["share"], last.to_numpy())


# -- refusals -------------------------------------------------------------------------------------


def test_facts_that_cannot_be_split_are_told_why():
    def facts(*relations: str | None) -> list[pl.Fact]:
        return [
            pl.Fact(f"s{i}", "{} is", target_true="a", relation=r) for i, r in enumerate(relations)
        ]

    for relations, words in (
        (("a", "a", None, "b", "b"), r"'s2 is' has no relation; the variance split needs one"),
        (("a", "a", "b"), r"relation 'b' has a single fact"),
        (("a", "a"), r"at least two relations"),
    ):
        with pytest.raises(pl.FactError, match=words):
            shares(torch.randn(len(relations), 3), facts(*relations))
    assert len(shares(torch.randn(4, 3), facts("a", "a", "b", "b"))) == 1


def test_what_nothing_can_predict_is_left_out_and_said():
    model = tiny_model("gpt2")
    good = [
        pl.Fact(s, "{} is", target_true="a", relation=r)
        for s, r in (("Mira", "r"), ("Danel", "r"), ("Ilmar", "q"), ("Vell", "q"))
    ]
    single = [pl.Fact("Kel", "{} is", target_true="a", relation="x")]
    nameless = [pl.Fact("Orrin", "{} is", target_true="a")]
    with pytest.warns(UserWarning, match="2 of 6 facts are left out"):
        found = pl.variance_split(model, [*single, *good, *nameless], n_permutations=5)
    assert found.equals(pl.variance_split(model, good, n_permutations=5))
    left_out = pytest.warns(UserWarning, match="1 of 3 facts are left out")
    with left_out, pytest.raises(pl.FactError, match="at least two relations"):
        pl.variance_split(model, [*single, *good[:2]])
