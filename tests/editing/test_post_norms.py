"""Models with a norm behind their projections (Gemma 2 and 3, OLMo 2): what reaches the stream."""

from __future__ import annotations

import pytest
import torch
from cases import left_over
from kept import shared_model
from tiny import D_MODEL

import pmet_lens as pl
from pmet_lens.editing import keys, objective
from pmet_lens.interp import suggestion
from pmet_lens.models import activations, tokens
from pmet_lens.models.sites import Road

POST = ("gemma2", "gemma3", "olmo2")
FACTS = [
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Kel"),
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby"),
    pl.Fact("Ilmar", "The tower of {} stands in", "Ostria"),
]
LAYERS = (0, 1, 2)


def built(family: str) -> pl.Model:
    wide = {"window": 40} if family.startswith("gemma") else {}
    return shared_model(family, torch.float64, **wide)


def strengths(layers: tuple[int, ...] = LAYERS) -> pl.Hparams:
    """Next to no weight of what was known: the limit in which an edit does what it was asked."""
    return pl.Hparams(
        layers,
        second_moment_weight=1e-9,
        null_space_threshold=1e9,
        null_space_l2=1e-9,
        weight_decay=0.0,
        n_steps=10,
        lr=0.05,
        easing=1.0,
    )


def moments(model: pl.Model) -> dict[pl.Site, torch.Tensor]:
    sites = [pl.Site(n, p) for n in LAYERS for p in ("attn", "mlp")]
    return {s: torch.eye(model.d_in(s), dtype=torch.float64) for s in sites}


@pytest.mark.few("*-gemma3", "PMET-*", "MEMIT-olmo2", "+ W_O-llama")
@pytest.mark.parametrize("family", (*POST, "llama"))
@pytest.mark.parametrize("method", ("PMET", "MEMIT", "EMMET", "AlphaEdit", "+ W_O"))
def test_the_written_model_has_what_the_targets_asked_for(family: str, method: str) -> None:
    model, way = built(family), pl.named(method)
    assert isinstance(way, pl.Method)
    hparams = strengths((2,) if method == "EMMET" else LAYERS)
    left = left_over(model, FACTS, moments(model), way, hparams)
    assert left <= (0.05 if family in POST and method in ("MEMIT", "AlphaEdit") else 1e-6)


@pytest.mark.few("gemma2", "olmo2")
@pytest.mark.parametrize("family", POST)
def test_rome_stores_its_one_fact(family: str) -> None:
    model = built(family)
    targets = pl.optimise(model, FACTS[:1], pl.ROME, strengths((2,)), ["{}"])
    edit = pl.edit(model, FACTS[:1], moments(model), "ROME", strengths((2,)), ["{}"])
    with edit.applied(model):
        now = keys.Reader(model, FACTS[:1]).values(2, "mlp_out")
    torch.testing.assert_close(now, targets.values["mlp_out"])


@pytest.mark.parametrize("family", POST)
def test_a_delta_of_the_layer_output_lies_where_it_can_be_written(family: str) -> None:
    model = built(family)
    assert objective.streams_of(model, pl.MEMIT) == ("mlp_out",)
    assert objective.streams_of(model, pl.PMET) == ("attn_out", "mlp_out")
    assert objective.streams_of(built("llama"), pl.MEMIT) == ("resid_post",)


@pytest.mark.parametrize("family", ("gpt2", "gptj", "neox", "llama", "opt", *POST))
@pytest.mark.parametrize("projection", ("attn", "mlp"))
def test_a_road_says_what_reaches_the_stream(family: str, projection: pl.Projection) -> None:
    model = built(family)
    road = activations.road(model, pl.Site(1, projection))
    assert (road is not None) == (family in POST)
    if road is None:
        return
    ids = torch.arange(2, 9)[None]
    seen: dict[str, torch.Tensor] = {}
    names = {"mlp": ("resid_mid", "mlp_out", "resid_post")}
    names["attn"] = ("resid_pre", "attn_out", "resid_mid")
    hooks = [
        (model.stream_hook(1, s), lambda value, s=s: seen.update({s: value[0]}))
        for s in names[projection]
    ]
    model.forward(ids, torch.ones_like(ids), hooks=hooks, stop_at_layer=2)
    before, written, after = (seen[s] for s in names[projection])
    # The norm's own 1e-6 under the root is left out.
    torch.testing.assert_close(road.reached(written), after - before, rtol=1e-3, atol=1e-3)


def test_the_change_that_a_norm_turns_into_the_wanted_one() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    road, written = Road(drawn(D_MODEL).abs() + 0.5, normed=True), drawn(5, D_MODEL)
    other = written + 0.5 * drawn(5, D_MODEL)
    wanted = road.reached(other) - road.reached(written)
    change = road.change(written, wanted)
    torch.testing.assert_close(road.reached(written + change) - road.reached(written), wanted)
    # The nearest of those that do it: any multiple of it does.
    across = ((written + change) * change).sum(-1)
    torch.testing.assert_close(across, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    scale = Road(drawn(D_MODEL).abs() + 0.5, normed=False)
    torch.testing.assert_close(scale.reached(scale.change(written, wanted)), wanted)


def test_the_bound_by_the_layer_output_is_one_of_what_reaches_it() -> None:
    """A length in the stream, told before the norm: what a norm does to scale does not matter."""
    model = built("gemma3")
    rows, per_fact = objective.prompts(model, FACTS, ["{}"])

    def norms() -> torch.Tensor:
        hparams = pl.Hparams((2,), reference_norm="resid_post")
        made = objective.Objective(model, rows, per_fact, pl.PMET, hparams, None)
        return made.norms["mlp_out"] / made.clean["mlp_out"].norm(dim=-1)

    before = norms()
    with model.restored([pl.Site(2, "mlp")]):
        model.weight(pl.Site(2, "mlp")).mul_(100)  # the norm behind it takes that back
        torch.testing.assert_close(norms(), before, rtol=1e-3, atol=0)


def test_suggested_settings_are_told_what_reaches_the_stream() -> None:
    """Whatever the norm takes away again, before it, says nothing of what the MLP writes."""
    model, facts = built("gemma3"), [pl.Fact("Ilmar", "The tower of {} stands in", None, "Vell")]
    before = suggestion._written(model, facts, 1)
    with model.restored([pl.Site(1, "mlp")]):
        model.weight(pl.Site(1, "mlp")).mul_(1000)
        assert suggestion._written(model, facts, 1) == pytest.approx(before, rel=1e-3)
    batch = tokens.encode(model, [tokens.Prompt(facts[0].prompt, facts[0].subject)])
    at = {(1, s): batch.subject for s in ("resid_mid", "resid_post")}
    middle, output = activations.read_streams(model, batch.ids, batch.mask, at).values()
    assert before == pytest.approx(float((output - middle).norm() / output.norm()), rel=1e-3)
