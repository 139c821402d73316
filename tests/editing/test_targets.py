"""Targets: facts never interact, shortcuts change nothing, and every rule of the loop is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import nll_of
from kept import shared_model
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.editing import objective
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.objective import loss_terms
from pmet_lens.editing.targets import Targets, optimise
from pmet_lens.models import tokens
from pmet_lens.models.model import Model

torch.set_num_threads(1)
FAMILIES = ("gpt2", "gptj", "llama")
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "water polo", "tennis"),
    pl.Fact("Kel", "{}", "x"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French"),
    pl.Fact("Мира", "{}'s sport is", "golf"),
]
CONTEXTS = ["{}", "The city is. {}", "I was { here. {}"]
HP = pl.Hparams(layers=(1, 2), n_steps=4, clamp=4.0)
# GPT-J's attention and Llama's norms compute in float32 whatever the dtype of the weights.
TOLERANCE = {"gpt2": 1e-9, "gptj": 1e-6, "llama": 1e-6}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param, torch.float64)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2", torch.float64)


@pytest.fixture(scope="module")
def whole(gpt2) -> Targets:
    return run(gpt2)


def run(model: Model, facts=FACTS, method=pl.PMET, hparams=HP, contexts=CONTEXTS, **more):
    return optimise(model, facts, method, hparams, contexts, **more)


def off(got: Targets, want: Targets) -> float:
    assert set(got.values) == set(want.values)
    return max(float((got.values[s] - want.values[s]).abs().max()) for s in want.values)


# -- what must not matter -------------------------------------------------------------------------


def test_facts_do_not_interact(model):
    together = run(model, batch_tokens=4096)
    assert off(run(model, batch_tokens=1), together) < TOLERANCE[model.name]
    order = [3, 0, 2, 1]
    shuffled = run(model, [FACTS[i] for i in order], batch_tokens=200)
    assert off(shuffled, together) > 1e-2
    back = {s: v[torch.argsort(torch.tensor(order))] for s, v in shuffled.values.items()}
    assert off(replace(shuffled, values=back), together) < TOLERANCE[model.name]


def test_starting_at_the_last_critical_layer_changes_nothing(model):
    few = replace(HP, n_steps=3)
    for method in (pl.PMET, pl.MEMIT):
        whole = run(model, FACTS[:2], method, few, fast=False)
        assert off(run(model, FACTS[:2], method, few, fast=True), whole) < TOLERANCE[model.name]
    other = run(model, FACTS[:2], pl.MEMIT, replace(few, layers=(1,)))
    assert off(other, whole) > 1e-2


def test_some_facts_come_in_the_order_asked_for(whole):
    some = whole[[2, 0]]
    for stream, value in some.values.items():
        assert torch.equal(value, whole.values[stream][[2, 0]])
        assert torch.equal(some.delta(stream), whole.delta(stream)[[2, 0]])
    for new, old in enumerate((2, 0)):
        rows = some.history[some.history["fact"] == new]
        wanted = whole.history[whole.history["fact"] == old].assign(fact=new)
        assert rows.reset_index(drop=True).equals(wanted.reset_index(drop=True))
    assert list(some.history["fact"]) == sorted(some.history["fact"])
    assert whole[1:3].history.equals(whole[[1, 2]].history)


def test_layers_below_the_last_critical_one_do_not_matter(gpt2, whole):
    assert off(run(gpt2, hparams=replace(HP, layers=(2,))), whole) == 0


def test_the_plain_prompt_always_comes_with_the_contexts(gpt2, whole):
    assert off(run(gpt2, contexts=CONTEXTS[1:]), whole) == 0
    alone = run(gpt2, contexts=[])
    assert off(run(gpt2, contexts=["{}"]), alone) == 0
    assert off(alone, whole) > 1e-3


def test_the_model_is_left_as_it_was(model):
    state = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    ids = torch.tensor([model.tokenizer(FACTS[2].text)["input_ids"]])
    with torch.no_grad():  # as some work all the time
        before = model.hf(input_ids=ids).logits
        targets = run(model)
        after = model.hf(input_ids=ids).logits
    assert targets.delta("mlp_out").any(dim=1).all()
    assert torch.equal(before, after)
    assert all(torch.equal(state[name], t) for name, t in model.hf.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.hf.parameters())


# -- what the numbers are -------------------------------------------------------------------------


def test_the_first_losses_are_those_of_the_plain_model(model):
    first = run(model).history.query("step == 0").set_index("fact")
    assert list(first.index) == list(range(len(FACTS)))
    for i, fact in enumerate(FACTS):
        texts = [context.replace("{}", fact.text) for context in CONTEXTS]
        nll = [nll_of(model, text, fact.target_new) for text in texts]
        assert first.loc[i, "nll"] == pytest.approx(sum(nll) / len(nll), abs=1e-6)
        assert first.loc[i, "loss"] == pytest.approx(first.loc[i, "nll"])
    assert (first[["kl", "decay"]].abs() < 1e-6).all(axis=None)


def test_the_deltas_do_what_they_were_made_for(model):
    """Added to the plain model's streams by torch hooks, they give the loss they stopped with."""
    hp = replace(HP, n_steps=8, weight_decay=0.0, kl_weight=0.0)
    targets = run(model, hparams=hp, contexts=[])
    told = targets.history.groupby("fact")["nll"]
    modules = dict(model.hf.named_modules())
    sites = {"attn_out": pl.Site(2, "attn"), "mlp_out": pl.Site(2, "mlp")}
    written = {
        s: modules[model.parameter_name(site)[: -len(".weight")]] for s, site in sites.items()
    }
    for i, fact in enumerate(FACTS):
        read = int(tokens.encode(model, [tokens.Prompt(fact.prompt, fact.subject)]).subject[0])

        def adding(delta, read=read):
            def hook(_module, _args, out):
                out = out.clone()
                out[0, read] += delta
                return out

            return hook

        before = nll_of(model, fact.text, fact.target_new)
        handles = [
            module.register_forward_hook(adding(targets.delta(stream)[i]))
            for stream, module in written.items()
        ]
        after = nll_of(model, fact.text, fact.target_new)
        for handle in handles:
            handle.remove()
        assert after == pytest.approx(told.last()[i], abs=1e-6)
        assert before == pytest.approx(told.first()[i], abs=1e-6)
        assert after < before - 0.01


def test_the_delta_is_what_was_added_to_the_clean_value(gpt2, whole):
    targets = whole
    assert targets.layer == 2
    assert len(targets) == len(FACTS)
    for stream in ("attn_out", "mlp_out"):
        assert torch.equal(targets.delta(stream), targets.values[stream] - targets.clean[stream])
        batch = tokens.encode(gpt2, [tokens.Prompt(f.prompt, f.subject) for f in FACTS])
        kept = []
        hook = (gpt2.stream_hook(2, stream), kept.append)
        with torch.no_grad():
            gpt2.forward(batch.ids, batch.mask, hooks=[hook])
        clean = kept[0][torch.arange(len(FACTS)), batch.subject]
        assert torch.allclose(targets.clean[stream], clean, atol=1e-12)


def test_objective_by_hand():
    """φ·NLL + μ·KL + ω·(‖δ‖/‖clean‖²), the norm above the bar not squared."""
    hp = pl.Hparams(layers=(1,), kl_weight=3.0, weight_decay=0.5)
    deltas = {"mlp_out": torch.tensor([[3.0, 4.0]]), "attn_out": torch.tensor([[0.0, 2.0]])}
    norms = {"mlp_out": torch.tensor([10.0]), "attn_out": torch.tensor([4.0])}
    loss = loss_terms(
        torch.tensor([7.0]), torch.tensor([0.2]), deltas, norms, torch.tensor([0.1]), hp
    )
    decay = 5 / 100 + 2 / 16
    assert float(loss["decay"]) == pytest.approx(decay)
    assert float(loss["loss"]) == pytest.approx(0.1 * 7 + 3 * 0.2 + 0.5 * decay)
    assert float(loss["nll"]) == 7
    assert float(loss["kl"]) == pytest.approx(0.2)


def test_the_divergence_is_that_of_the_changed_model_from_the_clean_one(gpt2):
    """KL on "{} is a" at the last subject token, recomputed from two runs of the plain model."""
    fact, hp = FACTS[0], replace(HP, n_steps=3, lr=2.0, kl_weight=0.0)
    targets = run(gpt2, [fact], pl.MEMIT, hp)
    told = float(targets.history["kl"].iloc[-1])  # measured with the delta that was returned
    batch = tokens.encode(gpt2, [tokens.Prompt("{} is a", fact.subject)])
    read = int(batch.subject[0])

    def hook(value):
        value = value.clone()
        value[0, read] += targets.delta("resid_post")[0]
        return value

    with torch.no_grad():
        before = gpt2.forward(batch.ids, batch.mask)[0, read].log_softmax(-1)
        hooks = [(gpt2.stream_hook(2, "resid_post"), hook)]
        now = gpt2.forward(batch.ids, batch.mask, hooks=hooks)[0, read].log_softmax(-1)
    assert told == pytest.approx(float((now.exp() * (now - before)).sum()), rel=1e-9)
    assert told != pytest.approx(float((before.exp() * (before - now)).sum()), rel=1e-3)


# -- the rules of the loop ------------------------------------------------------------------------


def test_the_last_iteration_does_not_step(gpt2):
    """Its deltas are the ones its loss was measured with; one iteration leaves all at zero."""
    one = run(gpt2, hparams=replace(HP, n_steps=1))
    assert all(not one.delta(stream).any() for stream in one.values)
    assert set(one.history["stopped"]) == {"steps"}
    two = run(gpt2, hparams=replace(HP, n_steps=2))
    # Adam's first step moves every coordinate by the learning rate.
    assert float(two.delta("mlp_out").abs().max()) == pytest.approx(HP.lr, rel=1e-3)


def test_every_delta_stays_in_its_own_ball(model):
    tight = replace(HP, clamp=0.05, weight_decay=0.0, kl_weight=0.0)
    targets = run(model, hparams=tight)
    for stream in ("attn_out", "mlp_out"):
        bar = 0.05 * targets.clean[stream].norm(dim=1)
        assert torch.allclose(targets.delta(stream).norm(dim=1), bar)  # it binds for every fact
    free = run(model, hparams=replace(tight, clamp=4.0)).delta("mlp_out").norm(dim=1)
    assert (free > 10 * bar).all()


def test_the_reference_norm_may_be_that_of_the_layer_output(gpt2):
    tight = replace(HP, clamp=0.05, weight_decay=0.0, kl_weight=0.0)
    loose = replace(tight, reference_norm="resid_post")
    own, wide = run(gpt2, hparams=tight), run(gpt2, hparams=loose)
    layer = run(gpt2, method=pl.MEMIT, hparams=tight)
    for stream in ("attn_out", "mlp_out"):
        size = wide.delta(stream).norm(dim=1)
        assert torch.allclose(size, 0.05 * layer.clean["resid_post"].norm(dim=1), rtol=1e-5)
        assert (size > 1.2 * own.delta(stream).norm(dim=1)).all()
    # MEMIT's own stream is the layer output.
    assert off(run(gpt2, method=pl.MEMIT, hparams=loose), layer) == 0


def test_the_reference_norm_also_scales_the_decay(gpt2):
    targets = run(gpt2, hparams=replace(HP, n_steps=2, reference_norm="resid_post"))
    layer = run(gpt2, method=pl.MEMIT, hparams=replace(HP, n_steps=1)).clean["resid_post"]
    length = sum(targets.delta(stream).norm(dim=1) for stream in targets.values)
    told = targets.history.query("step == 1")["decay"].to_numpy()
    assert told == pytest.approx((length / layer.norm(dim=1) ** 2).numpy(), rel=1e-9)


def test_both_deltas_get_one_gradient_exactly_in_parallel_blocks(model):
    """They enter the same sum there; in sequential blocks δ^a also passes through the MLP."""
    free = replace(HP, weight_decay=0.0, clamp=1e6)
    targets = run(model, hparams=free)
    apart = (targets.delta("attn_out") - targets.delta("mlp_out")).abs().max()
    if model.parallel_blocks:
        assert apart < 1e-10
        decayed = run(model, hparams=replace(free, weight_decay=0.5))
        assert (decayed.delta("attn_out") - decayed.delta("mlp_out")).abs().max() > 1e-3
    else:
        assert apart > 1e-2


@pytest.fixture(scope="module")
def eloquent() -> Model:
    """Planted: sharper logits, so that a delta can make an answer the arg-max."""
    model = tiny_model("gpt2", torch.float64)
    model.hf.transformer.ln_f.weight.data.mul_(3)
    return model


EASY = [pl.Fact("Kel", "{}", target) for target in ("to", "st", "of", "in")]  # one token each


def test_the_new_answer_counts_less_while_it_is_said(eloquent):
    """The φ of an iteration is the one set by the iteration before."""
    hp = replace(HP, n_steps=12, lr=0.5, nll_weight=2.0, easing=0.25, kl_stop=0.0)
    rows = run(eloquent, EASY, hparams=hp, contexts=[]).history
    said_before = rows.groupby("fact")["said"].shift(fill_value=False).astype(bool)
    assert 0.2 < said_before.mean() < 0.8  # both cases are there
    weight = (2.0 * said_before.map({False: 1.0, True: 0.25})).to_numpy()
    want = weight * rows["nll"] + rows["kl"] + 0.5 * rows["decay"]
    assert rows["loss"].to_numpy() == pytest.approx(want.to_numpy(), rel=1e-12)
    plain = run(eloquent, EASY, hparams=replace(hp, easing=1.0), contexts=[]).history
    want = 2.0 * plain["nll"] + plain["kl"] + 0.5 * plain["decay"]
    assert plain["said"].any()
    assert plain["loss"].to_numpy() == pytest.approx(want.to_numpy(), rel=1e-12)


@pytest.mark.parametrize("change", [{}, {"easing": 1.0}, {"stop_loss": 4.0}, {"kl_stop": 0.0}])
def test_a_fact_stops_by_the_rules_and_only_by_them(eloquent, change):
    hp = replace(HP, n_steps=12, lr=0.5, kl_weight=0.1, **{"kl_stop": 0.2, **change})
    rows = run(eloquent, [*EASY, *FACTS], hparams=hp, contexts=[]).history
    by_kl = rows["said"] & (hp.kl_weight * rows["kl"] <= hp.kl_stop) & (hp.easing < 1)
    goal = (rows["loss"] < hp.stop_loss) | by_kl
    last = rows["step"] == hp.n_steps - 1
    assert (rows["stopped"] == "goal").equals(goal)
    assert (rows["stopped"] == "steps").equals(last & ~goal)
    for _, own in rows.groupby("fact"):
        assert list(own["step"]) == list(range(len(own)))
        assert list(own["stopped"] != "") == [False] * (len(own) - 1) + [True]
    early = goal & ~last
    assert early.any() == (change in ({}, {"stop_loss": 4.0}))
    assert not goal.all()


def test_what_is_said_already_needs_no_delta(eloquent):
    """KL is 0 before the first step, so a fact that is said from the start stops there."""
    text = FACTS[0].text
    ids = torch.tensor([eloquent.tokenizer(text)["input_ids"]])
    planted = tiny_model("gpt2", torch.float64)
    word = planted.tokenizer(" t")["input_ids"]
    with torch.no_grad():
        planted.hf.transformer.ln_f.bias.add_(20 * planted.hf.lm_head.weight[word[0]])
        assert planted.hf(input_ids=ids).logits[0, -1].argmax() == word[0]
    targets = run(planted, [replace(FACTS[0], target_new="t"), FACTS[0]])
    said = targets.history.query("fact == 0")
    assert said[["step", "said", "stopped"]].to_numpy().tolist() == [[0, True, "goal"]]
    moved = targets.delta("mlp_out").abs().amax(dim=1)
    assert moved[0] == 0
    assert moved[1] > 0.1


def test_said_means_every_token_in_every_prompt(eloquent):
    """A target of two tokens of which the first is the arg-max is not said."""
    targets = run(eloquent, EASY, hparams=replace(HP, n_steps=4, lr=0.5), contexts=[])
    assert targets.history["said"].any()
    longer = [replace(f, target_new=f"{f.target_new} zzz") for f in EASY]
    other = run(eloquent, longer, hparams=replace(HP, n_steps=4, lr=0.5), contexts=[])
    assert not other.history["said"].any()


def test_on_step_hears_the_losses_of_the_facts_at_work(eloquent):
    heard = []
    hp = replace(HP, n_steps=8, lr=0.5, stop_loss=4.0)
    facts = [*EASY, FACTS[0]]
    targets = run(
        eloquent,
        facts,
        hparams=hp,
        contexts=[],
        on_step=lambda step, own: heard.append((step, own)),
    )
    assert [step for step, _ in heard] == list(range(len(heard)))
    counts = targets.history.groupby("step").size()
    assert [len(own["loss"]) for _, own in heard] == list(counts)
    assert counts.nunique() > 1
    for step, own in heard:
        rows = targets.history[targets.history["step"] == step]
        for name in ("nll", "kl", "decay", "loss"):
            assert not own[name].requires_grad
            assert sorted(own[name].tolist()) == pytest.approx(sorted(rows[name]))


# -- slices and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [slice(1, 3), slice(None, None, 2)])
def test_a_slice_is_the_targets_of_those_facts(whole, chosen):
    some = whole[chosen]
    numbers = list(range(len(FACTS)))[chosen]
    assert len(some) == len(numbers)
    assert some.layer == whole.layer
    for stream in whole.values:
        assert torch.equal(some.values[stream], whole.values[stream][numbers])
        assert torch.equal(some.delta(stream), whole.delta(stream)[numbers])
    for new, old in enumerate(numbers):
        own = some.history[some.history["fact"] == new].drop(columns="fact")
        theirs = whole.history[whole.history["fact"] == old].drop(columns="fact")
        assert own.fillna(-1).to_numpy().tolist() == theirs.fillna(-1).to_numpy().tolist()
    assert set(some.history["fact"]) == set(range(len(numbers)))


def test_the_last_layer_is_refused(gpt2):
    with pytest.raises(SettingsError, match="at most 2"):
        run(gpt2, hparams=replace(HP, layers=(1, 3)))


def test_deltas_of_a_model_in_half_precision_are_float32():
    """Adam on bfloat16 deltas would lose every step smaller than 1/256 of a delta."""
    found = run(tiny_model("gpt2", torch.bfloat16))
    for stream in found.values:
        delta = found.delta(stream)
        assert delta.dtype == torch.float32
        assert (delta != delta.bfloat16().float()).any()
    assert found.history["nll"].map(lambda x: float(torch.tensor(x).bfloat16()) != x).any()


# -- less in every step ---------------------------------------------------------------------------

THREE = ["{}", "The city is. {}", "I was { here. {}", "Kel plays. {}"]


def test_a_step_of_all_prefixes_is_the_released_one(gpt2, whole):
    for all_of_them in (2, 5):
        some = run(gpt2, hparams=replace(HP, prefixes_per_step=all_of_them))
        assert off(some, whole) == 0
        assert some.history.equals(whole.history)


def test_prefixes_take_turns(gpt2):
    """Step s runs the plain prompt and prefix s; what is told is the newest of every prompt."""
    hp = replace(HP, n_steps=5, prefixes_per_step=1, kl_weight=0.0, weight_decay=0.0, lr=1e-12)
    told = run(gpt2, FACTS[:1], hparams=hp, contexts=THREE).history["nll"]
    each = [nll_of(gpt2, c.replace("{}", FACTS[0].text), FACTS[0].target_new) for c in THREE]
    seen = [each[:2], each[:3], each, each, each]
    assert told.tolist() == pytest.approx([sum(s) / len(s) for s in seen], abs=1e-6)


def test_the_gradient_is_that_of_the_prompts_that_run(gpt2):
    """The first step is that of an optimisation with the first prefix alone."""
    free = replace(HP, n_steps=2, step_rule="falling")
    turns = run(gpt2, hparams=replace(free, prefixes_per_step=1), contexts=THREE)
    assert off(turns, run(gpt2, hparams=free, contexts=THREE[:2])) < 1e-9
    assert off(turns, run(gpt2, hparams=free, contexts=THREE)) > 1e-3


def test_a_fact_is_done_only_when_every_prompt_has_been_read(gpt2):
    hp = replace(HP, n_steps=6, stop_loss=1e9)
    assert set(run(gpt2, hparams=hp, contexts=THREE).history["step"]) == {0}
    turns = run(gpt2, hparams=replace(hp, prefixes_per_step=1), contexts=THREE).history
    assert turns.query("stopped == 'goal'")["step"].tolist() == [2] * len(FACTS)
    two = run(gpt2, hparams=replace(hp, prefixes_per_step=2), contexts=THREE).history
    assert two.query("stopped == 'goal'")["step"].tolist() == [1] * len(FACTS)


def test_steps_fall_from_the_radius_to_nothing(gpt2):
    """The first ends on the ball, whatever the size of the gradient and `lr`; the loss falls."""
    free = replace(HP, clamp=0.3, step_rule="falling", weight_decay=0.0, n_steps=4)
    first, second = (run(gpt2, hparams=replace(free, n_steps=n)) for n in (2, 3))
    for stream in ("attn_out", "mlp_out"):
        bar = 0.3 * first.clean[stream].norm(dim=1)
        assert torch.allclose(first.delta(stream).norm(dim=1), bar)
        assert (second.delta(stream).norm(dim=1) <= bar * (1 + 1e-9)).all()
        assert (second.delta(stream) != first.delta(stream)).all()
    stronger = replace(free, n_steps=2, lr=9.0, nll_weight=2.0, kl_weight=2.0)
    assert off(run(gpt2, hparams=stronger), first) < 1e-9
    losses = run(gpt2, hparams=replace(free, n_steps=8)).history.groupby("fact")["nll"]
    assert (losses.last() < losses.first()).all()


def test_relative_steps_are_a_share_of_the_radius(gpt2):
    """Adam's first step is `lr` in every coordinate (less where the gradient is next to nothing);
    here it is `lr` radii long."""
    hp = replace(HP, clamp=0.3, lr=0.4, step_rule="relative", weight_decay=0.0, n_steps=2)
    first = run(gpt2, hparams=hp)
    for stream in ("attn_out", "mlp_out"):
        radius = 0.3 * first.clean[stream].norm(dim=1)
        assert torch.allclose(first.delta(stream).norm(dim=1), 0.4 * radius, rtol=0.1)
        assert (first.delta(stream).norm(dim=1) <= 0.4 * radius).all()
    width = first.clean["mlp_out"].shape[1] ** 0.5
    plain = [float(0.4 * 0.3 * first.clean[s][0].norm() / width) for s in ("attn_out", "mlp_out")]
    one_stream = {"facts": FACTS[:1], "method": replace(pl.PMET, delta_at=("mlp_out",))}
    own = run(gpt2, hparams=replace(hp, n_steps=4), **one_stream)
    same = run(gpt2, hparams=replace(hp, n_steps=4, step_rule="Adam", lr=plain[1]), **one_stream)
    assert off(own, same) < 1e-9  # the released rule at the rate that this is for one fact
    assert off(own, run(gpt2, hparams=replace(hp, n_steps=4, lr=0.2), **one_stream)) > 1e-3


def test_a_plain_prompt_that_begins_with_the_subject_tells_the_divergence(model, monkeypatch):
    monkeypatch.setattr(objective, "FEW_PARAMETERS", 0)
    rows, per_fact = objective.prompts(model, FACTS, CONTEXTS)
    told = objective.told_by_plain(model, rows, per_fact, "last_subject")
    # The second is read at its subject for its target already, the third begins otherwise.
    assert told.tolist() == [True, False, False, True]
    assert not objective.told_by_plain(model, rows, per_fact, "last").any()
    # Not Adam, which makes much of a rounding where a gradient is almost 0.
    hp = replace(HP, clamp=1.0, kl_weight=5.0, step_rule="falling")
    kept = tokens.Batch.__getitem__

    def counted(batch: tokens.Batch, chosen: torch.Tensor) -> tokens.Batch:
        ran.append(len(chosen))
        return kept(batch, chosen)

    monkeypatch.setattr(tokens.Batch, "__getitem__", counted)
    for settings, times in ((hp, 1), (replace(hp, prefixes_per_step=1), 1 + HP.n_steps)):
        found = []
        for few in (0, 10**9):
            monkeypatch.setattr(objective, "FEW_PARAMETERS", few)
            ran: list[int] = []
            found.append((run(model, hparams=settings, batch_tokens=4096), sum(ran)))
        (less, few_rows), (more, all_rows) = found
        assert all_rows - few_rows == 2 * times
        assert off(less, more) < 10 * TOLERANCE[model.name]
        assert (more.history["kl"] > 1e-3).any()
