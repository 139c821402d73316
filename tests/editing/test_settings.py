"""Methods and hyper-parameters that contradict themselves are refused; published ones are exact."""

from __future__ import annotations

import math
from dataclasses import replace

import jaxtyping
import pytest
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import SHORT_NAMES
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge


@pytest.fixture
def unchecked():
    """Calls as a user makes them, whom no type checker stops first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PMET = Method(("attn_out", "mlp_out"), ("mlp",), "sqrt", Ridge())


# -- Method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta_at": ()}, "delta_at must be a choice of attn_out, mlp_out"),
        ({"delta_at": ("mlp_out", "mlp_out")}, "each at most once"),
        ({"delta_at": ("ffn_out",)}, "delta_at must be a choice of"),
        ({"delta_at": ("resid_pre",)}, "choice of attn_out, mlp_out, resid_post"),
        ({"write": ()}, "write must be a choice of attn, mlp"),
        ({"write": ("W_out",)}, "write must be a choice of attn, mlp"),
        ({"write": ("mlp", "mlp")}, "each at most once"),
        ({"write": ("mlp", "attn")}, r"\('attn', 'mlp'\): attn comes first"),
        ({"spread": "quadratic"}, "spread must be a choice of sqrt, linear"),
        ({"delta_at": ("attn_out",)}, "Nothing tells mlp what to produce.*mlp_out nor resid_post"),
        (
            {"delta_at": ("mlp_out",), "write": ("attn", "mlp")},
            "Nothing tells attn what to produce.*attn_out nor resid_post",
        ),
    ],
)
def test_a_method_without_an_answer_is_refused(unchecked, change, words):
    with pytest.raises(SettingsError, match=words):
        replace(PMET, **change)


def test_a_projection_follows_its_own_stream_else_the_layer_output():
    both = ("attn", "mlp")
    assert PMET.follows("mlp") == "mlp_out"
    assert replace(PMET, write=both).follows("attn") == "attn_out"
    layer = replace(PMET, delta_at=("resid_post",), write=both)
    assert [layer.follows(p) for p in both] == ["resid_post", "resid_post"]
    mixed = replace(PMET, delta_at=("mlp_out", "resid_post"), write=both)
    assert [mixed.follows(p) for p in both] == ["resid_post", "mlp_out"]


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_shares_of_the_residual(n):
    """Linear spread hands out R/n to the first layer, then R/(n−1) of what is left, …: were
    nothing else to happen, every layer would add the same and the last close the gap. The square
    root is greedier, and also ends with everything that is left."""
    linear, root = replace(PMET, spread="linear"), PMET
    left, given = 1.0, []
    for remaining in range(n, 0, -1):
        given.append(left / linear.share(remaining))
        left -= given[-1]
    assert given == pytest.approx([1 / n] * n)
    assert left == pytest.approx(0, abs=1e-12)
    assert root.share(n) == pytest.approx(math.sqrt(n))
    assert root.share(n) ** 2 == pytest.approx(linear.share(n))
    assert root.share(1) == linear.share(1) == 1


def test_the_ablations_are_the_rows_of_the_paper():
    rows = {
        "PMET": (("attn_out", "mlp_out"), ("mlp",), "sqrt"),
        "w/o δ^a": (("mlp_out",), ("mlp",), "sqrt"),
        "+ W_O": (("attn_out", "mlp_out"), ("attn", "mlp"), "sqrt"),
        "linear spread": (("attn_out", "mlp_out"), ("mlp",), "linear"),
        "TL hidden state, sqrt spread": (("resid_post",), ("mlp",), "sqrt"),
        "MEMIT": (("resid_post",), ("mlp",), "linear"),
    }
    here = {k: m for k, m in pl.ABLATIONS.items() if m.position == "last_subject"}
    assert {k: (m.delta_at, m.write, m.spread) for k, m in here.items()} == rows
    moved = {k: m for k, m in pl.ABLATIONS.items() if k not in here}
    assert {m.position for m in moved.values()} == {"first_subject", "last"}
    assert all(replace(m, position="last_subject") == pl.PMET for m in moved.values())
    assert {m.solver for m in pl.ABLATIONS.values()} == {Ridge()}


def test_every_ablation_has_a_short_name():
    """Plain words of ASCII letters, so that they can be typed; the table's names stay."""
    others = [name for name in pl.ABLATIONS if name not in pl.METHODS]
    assert list(SHORT_NAMES.values()) == others
    for short, full in SHORT_NAMES.items():
        assert short.isascii()
        assert short.isidentifier()
        assert short.islower()
        assert pl.named(short) is pl.named(full) is pl.ABLATIONS[full]
    assert pl.named("no_attn_delta") == replace(pl.PMET, delta_at=("mlp_out",))


def test_other_methods_are_values_too():
    """ROME, EMMET and AlphaEdit are other answers to the same four questions."""
    one_layer = Method(("mlp_out",), ("mlp",), "linear", Exact())
    alpha = replace(pl.MEMIT, solver=NullSpace())
    assert one_layer.follows("mlp") == "mlp_out"
    assert alpha != pl.MEMIT
    assert replace(alpha, solver=Ridge()) == pl.MEMIT


# -- Hparams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (0, 2, 1)])
def test_layers_must_ascend(layers):
    with pytest.raises(SettingsError, match="layers must be ascending layer numbers"):
        Hparams(layers=layers)


def test_layers_count_from_zero():
    assert Hparams(layers=(0, 2)).layers == (0, 2)
    with pytest.raises(SettingsError, match="-1 is negative"):
        Hparams(layers=(-1, 2))


@pytest.mark.parametrize("last", [3, 4, 40])
def test_the_last_layer_cannot_be_critical(last):
    """What changes there at the subject cannot reach the answer any more."""
    Hparams(layers=(0, 2)).check(n_layers=4)
    with pytest.raises(SettingsError, match=r"model of 4 layers.*at most 2.*cannot reach"):
        Hparams(layers=(0, last)).check(n_layers=4)


NUMBERS = [
    "lr",
    "weight_decay",
    "clamp",
    "kl_weight",
    "nll_weight",
    "second_moment_weight",
    "stop_loss",
    "easing",
    "kl_stop",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-0.5, -1, float("nan"), float("inf")])
def test_strengths_are_numbers_from_zero(unchecked, name, value):
    with pytest.raises(SettingsError, match=f"{name} must be a number ≥ 0"):
        Hparams(layers=(1,), **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_is_a_strength_only_where_it_means_something(name):
    if name in ("weight_decay", "kl_weight", "stop_loss", "kl_stop"):
        assert getattr(Hparams(layers=(1,), **{name: 0.0}), name) == 0
    else:
        with pytest.raises(SettingsError, match=f"{name} must be greater than 0"):
            Hparams(layers=(1,), **{name: 0.0})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_steps": 0}, "n_steps must be at least 1, not 0"),
        ({"easing": 1.5}, "easing must be at most 1"),
        ({"step_rule": "SGD"}, "step_rule must be one of Adam, falling, relative"),
        ({"prefixes_per_step": 0}, "a whole number ≥ 1 or None, not 0"),
        ({"reference_norm": "resid_pre"}, "reference_norm must be one of own stream, resid_post"),
    ],
)
def test_other_contradictions_are_refused(unchecked, change, words):
    with pytest.raises(SettingsError, match=words):
        Hparams(layers=(1,), **change)


# -- published settings (1-method.md, section 8) --------------------------------------------------

GPTJ, NEOX, LLAMA = tuple(range(3, 9)), tuple(range(6, 11)), tuple(range(4, 9))
PUBLISHED = {
    # layers, λ, μ, clamp, steps, lr
    ("gpt-j-6b", "PMET"): (GPTJ, 6000, 1, 0.75, 30, 0.2),
    ("gpt-j-6b/zsre", "PMET"): (GPTJ, 4500, 0.1, 0.8, 20, 0.5),
    ("gpt-neox-20b", "PMET"): (NEOX, 15000, 0.8, 0.8, 30, 0.5),
    ("llama-2-7b-hf", "PMET"): (LLAMA, 6000, 0.0625, 1, 20, 0.5),
    ("llama-2-7b-hf/zsre", "PMET"): (LLAMA, 6000, 0.1, 0.8, 20, 0.5),
    ("gpt-j-6b", "MEMIT"): (GPTJ, 15000, 0.0625, 0.75, 25, 0.5),
    ("gpt-neox-20b", "MEMIT"): (NEOX, 20000, 0.0625, 0.3, 20, 0.5),
}


@pytest.mark.parametrize("key", PUBLISHED, ids="/".join)
def test_settings_are_the_published_ones(key):
    hp = pl.HPARAMS[key[0]][key[1]]
    found = (hp.layers, hp.second_moment_weight, hp.kl_weight, hp.clamp, hp.n_steps, hp.lr)
    assert found == PUBLISHED[key]
    assert hp.weight_decay == 0.5
    assert (hp.easing == 1.0) == (key[1] == "MEMIT")  # MEMIT has no easing and no KL stop
    assert hp.stop_loss == 0.05


def test_settings_are_found_by_what_a_method_optimises():
    model = tiny_model("gpt2")
    model.name = "GPT-J-6B"
    known = pl.HPARAMS["gpt-j-6b"]
    assert pl.hparams_for(model, pl.PMET) == known["PMET"]
    assert pl.hparams_for(model, pl.ABLATIONS["w/o δ^a"]) == known["PMET"]
    assert pl.hparams_for(model, replace(pl.MEMIT, spread="sqrt")) == known["MEMIT"]
    model.name = "my-own"
    with pytest.raises(SettingsError, match=r"no PMET settings for .*'my-own'.*Pass hparams="):
        pl.hparams_for(model, pl.PMET)
