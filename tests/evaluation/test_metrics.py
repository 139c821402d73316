"""Every metric against numbers worked out by hand, and at the ends of its range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pmet_lens.evaluation.metrics import (
    bootstrap,
    bootstrap_ratio,
    consistency,
    fluency,
    harmonic_mean,
    ngram_entropy,
    says_new,
)

# -- harmonic mean --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([50.0, 100.0], 200 / 3),
        ([1.0, 1.0, 4.0], 4 / 3),
        ([98.9, 88.6, 73.7], 85.8),  # ES, PS, NS and S as the MEMIT paper has them for GPT-J
        ([7.0], 7.0),
        ([0.0, 100.0], 0.0),
    ],
)
def test_harmonic_mean(values, mean):
    assert harmonic_mean(values) == pytest.approx(mean, rel=1e-4)


def test_the_harmonic_mean_is_ruled_by_the_worst():
    values = [10.0, 90.0, 95.0]
    assert min(values) < harmonic_mean(values) < np.mean(values)
    assert harmonic_mean([v / 2 for v in values]) == pytest.approx(harmonic_mean(values) / 2)
    assert harmonic_mean(values[::-1]) == pytest.approx(harmonic_mean(values))
    with pytest.raises(ValueError, match="at least one value"):
        harmonic_mean([])


# -- success --------------------------------------------------------------------------------------


def test_the_likelier_answer_has_the_smaller_nll():
    assert says_new(nll_new=1.0, nll_true=2.0)
    assert not says_new(nll_new=2.0, nll_true=1.0)
    assert not says_new(nll_new=1.0, nll_true=1.0)  # a tie is no success for either side


# -- entropy and fluency --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "n", "bits"),
    [
        ("a b c d", 1, 2.0),  # four of four
        ("a b c d e", 2, 2.0),
        ("a b a b", 1, 1.0),
        ("a b a b", 2, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))),  # ab, ba, ab
        ("a a a a a", 2, 0.0),
        ("a b", 3, 0.0),
        ("", 2, 0.0),
    ],
)
def test_ngram_entropy(text, n, bits):
    assert ngram_entropy(text.split(), n) == pytest.approx(bits, abs=1e-12)


def test_fluency_by_hand():
    # Bigrams ab, bc, cd and trigrams abc, bcd: log2 3 and 1 bit.
    one = (2 / 3 * math.log2(3) + 4 / 3 * 1) / 2 * 100
    assert fluency(["a b c d"]) == pytest.approx(one)
    assert fluency(["a b c d", "x x x x"]) == pytest.approx(one / 2)  # the mean over texts
    assert fluency(["A, B."]) == pytest.approx(one)  # A , B . are four tokens
    assert fluency(["a b c d " * 5]) < fluency(["a b c d e f g h i j k l m n o p q r s t"])


# -- consistency ----------------------------------------------------------------------------------


def test_consistency_by_hand():
    """A word of both documents weighs 1, a word of one ln(3/2) + 1 (smoothed, of two documents)."""
    rare = math.log(3 / 2) + 1
    # red, blue against red, green: one shared word in vectors of length √(1 + rare²).
    assert consistency(["red blue"], ["red green"]) == pytest.approx(100 / (1 + rare**2))
    # red twice, blue, against red.
    assert consistency(["red", "red blue"], ["red"]) == pytest.approx(100 * 2 / math.hypot(2, rare))


def test_consistency_at_the_ends_of_its_range():
    assert consistency(["red blue", "green"], ["green red", "blue"]) == pytest.approx(100)
    assert consistency(["Red, blue!"], ["red blue"]) == pytest.approx(100)
    assert consistency(["red blue"], ["green"]) == 0
    # No words at all.
    assert consistency(["", "a !"], ["red"]) == consistency(["red"], [""]) == 0


def test_consistency_is_of_two_documents():
    one, other = ["red blue", "red green"], ["red", "grey"]
    assert consistency(one, other) == pytest.approx(consistency(other, one))
    assert consistency(one, other) == pytest.approx(consistency([" ".join(one)], other[::-1]))
    assert consistency(one, other) > consistency(one, [*other, "grey gold"])
    for wrong in ([], "red"):
        with pytest.raises(ValueError, match="two lists, each of at least one text"):
            consistency(["red"], wrong)
        with pytest.raises(ValueError, match="two lists, each of at least one text"):
            consistency(wrong, ["red"])


# -- intervals ------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_normal_theory():
    sample = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = bootstrap(sample)
    half = 1.96 * sample.std() / math.sqrt(400)
    assert low == pytest.approx(sample.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.1 * half)
    few = bootstrap(sample[:25])
    assert few[1] - few[0] > 2 * (high - low)


def test_bootstrap_follows_from_its_seed():
    sample = np.random.default_rng(1).random(20)
    assert bootstrap(sample, seed=3) == bootstrap(sample, seed=3)
    assert bootstrap(sample, seed=3) != bootstrap(sample, seed=4)


def test_bootstrap_of_what_never_varies_is_a_point():
    assert bootstrap(np.full(10, 7.0)) == (7.0, 7.0)
    parts = np.tile([50.0, 100.0], (10, 1))
    assert bootstrap(parts, "harmonic") == pytest.approx((200 / 3, 200 / 3))


def test_parts_of_a_case_are_drawn_together():
    """Where one part is high just when the other is low, their harmonic mean hardly varies."""
    values = np.linspace(40.0, 60.0, 30)
    opposed = np.stack([values, 100.0 - values], axis=1)
    together = np.stack([values, values], axis=1)
    widths = [b - a for a, b in (bootstrap(p, "harmonic") for p in (opposed, together))]
    assert widths[0] < 0.2 * widths[1]


def test_parts_that_some_cases_lack_leave_an_interval():
    """One case of three has a second part; a third of the resamples would be without one."""
    parts = np.array([[100.0, 50.0], [100.0, np.nan], [0.0, np.nan]])
    low, high = bootstrap(parts, "harmonic")
    assert 0 <= low < high <= 200 / 3 + 1e-9
    assert high == pytest.approx(200 / 3)


def test_a_ratio_is_resampled_with_its_cases_kept_together():
    top = np.random.default_rng(1).random(40) + 1
    assert bootstrap_ratio(top, 2 * top) == pytest.approx((0.5, 0.5))  # each pair has this ratio
    low, high = bootstrap_ratio(top, 2 * top[::-1])
    assert low < 0.49 < 0.51 < high
    assert low < top.mean() / (2 * top.mean()) < high
