"""Gains add up to the whole, an edit moves what it writes and nothing below, histories tell."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from kept import shared_model
from tiny import PARALLEL

import pmet_lens as pl
from pmet_lens.editing.keys import current_values
from pmet_lens.editing.locate_and_edit import Edit, edit
from pmet_lens.editing.targets import Targets, optimise
from pmet_lens.evaluation import metrics
from pmet_lens.interp.geometry import answer_gain, arrival, delta_losses, drift
from pmet_lens.models import activations, tokens
from pmet_lens.models.model import Model, Site

torch.set_num_threads(1)
FACTS = [
    pl.Fact(
        "Mira Tolan",
        "{} plays the sport of",
        "rugby",
        "tennis",
        paraphrases=("The sport that Mira Tolan plays is", "Her sport is"),
        neighbours=(("Ilmar plays the sport of", "tennis"), ("Kel plays", "tennis")),
    ),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French"),
    pl.Fact(
        "Ilmar",
        "The tower of {} stands in the city of",
        "Ostria",
        paraphrases=("The city of Ilmar is",),
        neighbours=(("The tower of Kel stands in", "Vell"),),
    ),
]
HP = pl.Hparams(
    layers=(1, 2),
    n_steps=4,
    clamp=4.0,
    second_moment_weight=1.0,
    easing=1.0,
    # Against the small gradients of a tiny model these two would rule.
    weight_decay=0.0,
    kl_weight=0.0,
)
CONTEXTS = ["{}", "The city is. {}"]
CELL = ["kind", "stream", "position", "layer"]


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Intervals are tested in test_metrics; here they would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pmet_lens.evaluation.intervals.bootstrap", partial(metrics.bootstrap, n_resamples=50)
        )
        yield


@pytest.fixture(scope="module", params=["gpt2", "neox"])
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def targets(model) -> Targets:
    return optimise(model, FACTS, pl.PMET, HP, CONTEXTS)


def moments(model: Model) -> dict[Site, torch.Tensor]:
    sites = [Site(layer, "mlp") for layer in (1, 2)]
    return {site: torch.eye(model.d_in(site), dtype=torch.float64) for site in sites}


@pytest.fixture(scope="module")
def done(model, targets) -> Edit:
    return edit(model, FACTS, moments(model), pl.PMET, HP, CONTEXTS, targets)


def scaled(targets: Targets, **factors: float) -> Targets:
    """The same targets with each stream's delta times its factor."""
    values = {s: v + factors[s] * targets.delta(s) for s, v in targets.clean.items()}
    return replace(targets, values=values)


def log_p(model: Model, fact: pl.Fact, hooks=()) -> float:
    """Log-probability of the new answer, summed over its tokens; a prompt alone."""
    batch = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject, fact.target_new)])
    with torch.no_grad():
        logp = model.forward(batch.ids, batch.mask, hooks=hooks).log_softmax(-1)
    at = batch.scored
    return float(logp[at].gather(1, batch.labels[at][:, None]).sum())


# -- which delta raised the answer ----------------------------------------------------------------


def test_the_gains_add_up_to_the_change(model, targets):
    frame = answer_gain(model, FACTS, targets, points=64)
    rows = [(i, stream) for i in range(3) for stream in ("attn_out", "mlp_out")]
    assert sorted(zip(frame["fact"], frame["stream"], strict=True)) == rows
    whole = frame.groupby("fact")["gain"].sum().to_numpy()
    change = frame.groupby("fact")["change"].first().to_numpy()
    assert whole == pytest.approx(change, rel=0.02)
    assert (change > 0.05).all()
    assert frame["share"].to_numpy() == pytest.approx((frame["gain"] / frame["change"]).to_numpy())
    coarse = answer_gain(model, FACTS, targets, points=1).groupby("fact")["gain"].sum()
    assert abs(coarse - change).max() > 10 * abs(whole - change).max()


def test_the_change_is_that_of_the_answers_probability(model, targets):
    frame = answer_gain(model, FACTS, targets, points=1)
    for i, fact in enumerate(FACTS):
        at = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)]).subject
        hooks = [
            (model.stream_hook(2, s), activations.add_at(targets.delta(s)[[i]], at))
            for s in ("attn_out", "mlp_out")
        ]
        want = log_p(model, fact, hooks) - log_p(model, fact)
        assert frame.query("fact == @i")["change"].to_numpy() == pytest.approx(want, rel=1e-5)


def test_a_delta_that_is_nothing_gains_nothing(model, targets):
    frame = answer_gain(model, FACTS, scaled(targets, attn_out=0.0, mlp_out=1.0), points=64)
    attn, mlp = (frame[frame["stream"] == s] for s in ("attn_out", "mlp_out"))
    assert (attn[["gain", "share", "norm"]] == 0).all(axis=None)
    assert mlp["share"].to_numpy() == pytest.approx(1, rel=0.02)
    none = answer_gain(model, FACTS, scaled(targets, attn_out=0.0, mlp_out=0.0), points=1)
    assert (none[["gain", "change"]] == 0).all(axis=None)
    assert none["share"].isna().all()


def test_in_parallel_blocks_only_the_sum_of_the_deltas_matters(model, targets):
    """So equal deltas gain alike and point alike; in sequential blocks they do not."""
    both = (targets.delta("attn_out") + targets.delta("mlp_out")) / 2
    values = {s: v + both for s, v in targets.clean.items()}
    frame = answer_gain(model, FACTS, replace(targets, values=values), points=4)
    attn, mlp = (frame[frame["stream"] == s] for s in ("attn_out", "mlp_out"))
    for column in ("gain", "cosine"):
        apart = np.abs(attn[column].to_numpy() - mlp[column].to_numpy())
        if model.name in PARALLEL:
            assert apart.max() < 1e-9
        else:
            assert apart.min() > 1e-4


def test_cosine_and_norms_are_those_of_the_deltas(model, targets):
    """The cosine against a slope taken by finite differences."""
    frame = answer_gain(model, FACTS, targets, points=1).set_index(["fact", "stream"])
    for (i, stream), row in frame.iterrows():
        delta, clean = targets.delta(stream)[i], targets.clean[stream][i]
        assert row["norm"] == pytest.approx(float(delta.norm()))
        assert row["clean_norm"] == pytest.approx(float(clean.norm()))
        assert -1 <= row["cosine"] <= 1
    small = 1e-4
    fact, stream = FACTS[0], "mlp_out"
    at = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)]).subject

    def slope(direction: torch.Tensor) -> float:
        name = model.stream_hook(2, stream)
        ends = [
            log_p(model, fact, [(name, activations.add_at(sign * small * direction[None], at))])
            for sign in (1, -1)
        ]
        return (ends[0] - ends[1]) / (2 * small)

    gradient = torch.tensor([slope(e) for e in torch.eye(32, dtype=torch.float64)])
    want = torch.cosine_similarity(gradient, targets.delta(stream)[0].cpu().double(), dim=0)
    assert frame["cosine"][0, stream] == pytest.approx(float(want), abs=1e-3)


def test_facts_in_passes_are_the_same(model, targets, monkeypatch):
    def gains():
        frame = answer_gain(model, FACTS, targets, points=2)
        return frame.sort_values(["fact", "stream"]).reset_index(drop=True)

    whole = gains()
    monkeypatch.setattr("pmet_lens.interp.geometry.FACTS_PER_PASS", 2)
    parts = gains()
    numbers = ["gain", "change", "share", "cosine", "norm", "clean_norm"]
    assert parts[numbers].to_numpy() == pytest.approx(whole[numbers].to_numpy(), rel=1e-5)
    assert parts[["fact", "stream"]].equals(whole[["fact", "stream"]])


def test_each_delta_alone_and_all_of_them(model, targets):
    """The losses are those of the prompts alone, and together they are the change of the gains."""
    frame = delta_losses(model, FACTS, targets).set_index(["fact", "added"])["nll"]
    gains = answer_gain(model, FACTS, targets, points=1).groupby("fact")["change"].first()
    for i, fact in enumerate(FACTS):
        prompt = tokens.Prompt(fact.prompt, fact.subject, fact.target_new)
        batch = tokens.encode(model, [prompt])
        n = int(batch.scored.sum())
        assert frame[i, "nothing"] == pytest.approx(-log_p(model, fact) / n, rel=1e-6)
        at = tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)]).subject
        for s in ("attn_out", "mlp_out"):
            hook = (model.stream_hook(2, s), activations.add_at(targets.delta(s)[[i]], at))
            assert frame[i, s] == pytest.approx(-log_p(model, fact, [hook]) / n, rel=1e-6)
        assert n * (frame[i, "nothing"] - frame[i, "all"]) == pytest.approx(gains[i], rel=1e-6)


# -- what the weights moved -----------------------------------------------------------------------


def test_what_is_stored_exactly_arrives_whole(model, targets):
    """One layer, the plain prompt alone, an exact solver: the MLP moves by its delta, the layer's
    output by what that alone does, and the loss is the one of that delta alone."""
    hp = replace(HP, layers=(2,))
    method = replace(pl.PMET, solver=pl.Exact())
    one = edit(model, FACTS, moments(model), method, hp, ["{}"], targets)
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    frame = arrival(model, one).set_index(["fact", "written"])
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    alone = delta_losses(model, FACTS, targets).set_index(["fact", "added"])["nll"]
    none, whole = frame.xs(0, level="written"), frame.xs(1, level="written")
    assert (none[["delta", "output"]] == 0).all(axis=None)
    assert none["nll"].to_numpy() == pytest.approx(alone.xs("nothing", level="added").to_numpy())
    assert none["layer"].isna().all()
    assert set(whole["layer"]) == {2}
    assert whole["delta"].to_numpy() == pytest.approx(1, abs=1e-4)
    if model.name in PARALLEL:
        a, m = targets.delta("attn_out"), targets.delta("mlp_out")
        share = (m * (a + m)).sum(-1) / (a + m).square().sum(-1)
        assert whole["output"].to_numpy() == pytest.approx(share.numpy(), abs=1e-4)
    left = alone.xs("mlp_out", level="added").to_numpy()
    # Weights change for every token of the prompt, a delta is added at one.
    assert whole["nll"].to_numpy() == pytest.approx(left, rel=0.3)


def test_what_arrives_grows_layer_by_layer(model, done):
    frame = arrival(model, done)
    assert list(frame["written"]) == [0, 1, 2] * 3
    assert list(frame["layer"].dropna()) == [1, 2] * 3
    last = frame[frame["written"] == 2].set_index("fact")
    now = frame[frame["written"] == 1].set_index("fact")
    assert (last["delta"] > now["delta"]).all()
    with done.applied(model):
        after = current_values(model, FACTS, 2, "mlp_out")
    moved = after - done.targets.clean["mlp_out"]
    delta = done.targets.delta("mlp_out")
    want = (moved * delta).sum(-1) / delta.square().sum(-1)
    assert last["delta"].to_numpy() == pytest.approx(want.numpy(), rel=1e-5)


def test_an_edit_without_targets_is_refused(model, done):
    with pytest.raises(pl.SettingsError, match="just made"):
        arrival(model, replace(done, targets=None))


@pytest.fixture(scope="module")
def moved(model, done):
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    frame = drift(model, FACTS, done)
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    assert len(model.live_edits) == 0
    assert not frame.duplicated(CELL).any()
    return frame.set_index(CELL).sort_index()


def test_no_edit_moves_nothing(model, done):
    none = replace(done, factors={s: (0 * a, b) for s, (a, b) in done.factors.items()})
    frame = drift(model, FACTS[:1], none, ("mlp_out", "resid_post"))
    assert (frame[["mean", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert len(frame) == 5 * 2 * 4


def test_an_edit_moves_what_it_writes_and_nothing_below(moved):
    mean = moved["mean"]
    layer = mean.index.get_level_values("layer")
    assert (mean[layer == 0] == 0).all()
    below = mean[layer == 1]  # the first layer written: all but its own output comes before
    assert (below.drop("mlp_out", level="stream") == 0).all()
    assert (below.xs("mlp_out", level="stream") > 0).all()
    assert (mean[layer > 1] > 0).all()


def test_the_kinds_of_prompt_and_where_they_are_read(model, done, moved):
    n = moved["n"].droplevel(["stream", "layer"])
    found = {key: set(own) for key, own in n.groupby(level=[0, 1])}
    assert found == {
        ("rewrite", "last_subject"): {3},
        ("rewrite", "last"): {3},
        ("paraphrase", "last_subject"): {2},  # one fact has none, one text does not name it
        ("paraphrase", "last"): {2},
        ("neighbour", "last"): {2},
    }
    few = drift(model, FACTS[1:2], done, ("mlp_out",))
    assert set(few["kind"]) == {"rewrite"}
    with pytest.raises(pl.FactError, match="no facts to look at"):
        drift(model, [], done)


def test_the_distance_is_the_key_times_the_change(model, done, moved):
    """At the first layer written, where keys are still the old ones; averaged per fact first."""
    mean = moved["mean"]
    site = Site(1, "mlp")
    rewrite = [[f.text] for f in FACTS]
    neighbour = [[text for text, _ in f.neighbours] for f in FACTS if f.neighbours]
    for kind, texts in (("rewrite", rewrite), ("neighbour", neighbour)):
        distances = []
        for own in texts:
            batch = tokens.encode(model, [tokens.Prompt(text) for text in own])
            wanted = {(1, "mlp_out"): batch.last, site: batch.last}
            values = activations.read_streams(model, batch.ids, batch.mask, wanted)
            old = values[1, "mlp_out"].norm(dim=1)
            ratio = (values[site] @ done.deltas[site]).norm(dim=1) / old
            distances.append(float(ratio.mean()))
        assert mean[kind, "mlp_out", "last", 1] == pytest.approx(np.mean(distances), rel=1e-5)
    assert len(neighbour[0]) == 2


# -- what the optimisation tells ------------------------------------------------------------------


def test_the_history_tells_where_the_deltas_are(model, targets):
    history = targets.history
    first, last = history[history["step"] == 0], history[history["stopped"] != ""]
    streams = ("attn_out", "mlp_out")
    for stream in streams:
        assert (first[f"norm_{stream}"] == 0).all()
        want = targets.delta(stream).norm(dim=1) / targets.clean[stream].norm(dim=1)
        assert last[f"norm_{stream}"].to_numpy() == pytest.approx(want.numpy(), rel=1e-6)
        assert (history[f"norm_{stream}"] <= HP.clamp * (1 + 1e-9)).all()
        assert (history.loc[history["step"] > 0, f"norm_{stream}"] > 0).all()
    want = torch.cosine_similarity(*(targets.delta(s) for s in streams))
    assert last["cosine"].to_numpy() == pytest.approx(want.numpy(), rel=1e-6)
    assert first["cosine"].isna().all()
    assert history.loc[history["step"] > 0, "cosine"].between(-1 - 1e-9, 1 + 1e-9).all()
    ended = history["step"] == HP.n_steps - 1
    assert history["gradient_cosine"].isna().equals(ended)


def test_one_delta_has_no_angle(model):
    history = optimise(model, FACTS, pl.MEMIT, HP, CONTEXTS).history
    assert "norm_resid_post" in history
    assert not {"cosine", "gradient_cosine", "norm_mlp_out"} & set(history)


@pytest.mark.parametrize("name, alike", [("world", True), ("world-sequential", False)])
def test_both_gradients_start_as_one_in_parallel_blocks(name, alike):
    model = pl.load(name)
    hp = replace(pl.hparams_for(model, pl.PMET), n_steps=2)
    history = optimise(model, pl.counterfact(n=8), pl.PMET, hp, ["{}"]).history
    cosine = history.loc[history["step"] == 0, "gradient_cosine"]
    assert len(cosine) == 8
    assert ((cosine - 1).abs() < 1e-5).all() if alike else (cosine < 0.9995).all()
