"""Estimates: counted by hand, against torch's own counter, and in proportion to the facts."""

from __future__ import annotations

import pytest
import torch
from kept import shared_model
from tiny import D_MODEL, FAMILIES, N_LAYERS, tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import pmet_lens as pl
from pmet_lens.data.facts import FactError
from pmet_lens.editing import keys, objective, solvers
from pmet_lens.editing.method import SettingsError
from pmet_lens.models.model import Model, ModelError

torch.set_num_threads(1)
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "water polo", "tennis"),
    pl.Fact("Danel Orrin", "The mother tongue of {} is", "Dutch", "French"),
    pl.Fact("Ostria Vell", "The capital of {} is", "Kel"),
]
CONTEXTS = ["{}", "The city is. {}"]
HP = pl.Hparams(layers=(1, 2), n_steps=4)
VOCAB = 320
BLOCK = 12 * D_MODEL**2  # 4 d² attention, 8 d² MLP
MLP = 8 * D_MODEL**2


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> Model:
    return shared_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2")


def run(model: Model, facts=FACTS, method=pl.PMET, hparams=HP, contexts=CONTEXTS, **more):
    return pl.estimate(model, facts, method, hparams, contexts, **more)


def products(counter: FlopCounterMode) -> int:
    """Operations of products with weights; attention's own are batched products."""
    counts = counter.get_flop_counts()["Global"]
    weights = (torch.ops.aten.mm, torch.ops.aten.addmm)
    return sum(n for operation, n in counts.items() if operation in weights)


def measured(model: Model, method: pl.Method, facts=FACTS) -> tuple[int, int, int, int]:
    """Of the record, of a step (products with weights, all that torch counts), of the keys."""
    tail = objective.tail_of(model, method, HP.layers[-1])
    rows, per_fact = objective.prompts(model, facts, CONTEXTS)
    with FlopCounterMode(display=False) as record:
        batch = objective.Objective(model, rows, per_fact, method, HP, tail)
    deltas = {s: torch.zeros_like(v, requires_grad=True) for s, v in batch.clean.items()}
    with FlopCounterMode(display=False) as step:
        told = batch.losses(deltas)
        torch.autograd.grad((told.nll + told.kl).sum(), list(deltas.values()))
    for layer in HP.layers:
        model.from_layer(layer)  # made once, and tried on a small batch
    reader = keys.Reader(model, facts, CONTEXTS)
    with FlopCounterMode(display=False) as read:
        for layer in HP.layers:
            for projection in method.write:
                reader.keys(pl.Site(layer, projection))
                reader.values(HP.layers[-1], method.follows(projection))
    return products(record), products(step), step.get_total_flops(), products(read)


# -- by hand --------------------------------------------------------------------------------------


def lengths(model: Model, fact: pl.Fact) -> list[tuple[int, int, int]]:
    """Per row of a step: tokens before the edited one, all tokens, places with a loss."""

    def count(text: str) -> int:
        return len(model.tokenizer(text)["input_ids"])

    found = []
    for context in ("{}", CONTEXTS[1]):
        text = context.replace("{}", fact.text)
        head = text[: text.index(fact.subject) + len(fact.subject)]
        answer = count(f"{text} {fact.target_new}") - count(text)
        found.append((count(head) - 1, count(text) + answer - 1, answer))
    found.append((count(fact.subject) - 1, count(f"{fact.subject} is a"), 1))
    return found


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_one_fact_by_hand(family):
    """d_model 32, 4 blocks of 12 d² each, vocabulary 320, layers 1 and 2, three rows."""
    model = shared_model(family)
    told = run(model, FACTS[1:2])
    rows = lengths(model, FACTS[1])
    before = max(start for start, _, _ in rows)
    width = max(total for _, total, _ in rows)
    behind = max(total - start for start, total, _ in rows)
    scored = sum(n for _, _, n in rows)
    # The last block, its MLP where a loss is read, and the unembedding; sequential blocks also run
    # block 2.
    forward = 2 * ((BLOCK - MLP) * 3 * behind + MLP * scored + VOCAB * D_MODEL * scored)
    forward += 2 * 3 * behind * BLOCK * (family == "gpt2")
    assert told.step == 2 * forward
    tail = 2 if family == "gpt2" else 1
    assert told.whole_step == 2 * 3 * width * ((N_LAYERS + tail) * BLOCK + 2 * VOCAB * D_MODEL)
    assert told.record == 2 * BLOCK * 3 * (3 * width + tail * before)
    assert told.targets == told.record + HP.n_steps * told.step
    plain, cut = rows[0][0] + 1, max(rows[0][0], rows[1][0]) + 1
    # Into layer 1, its keys; into layer 2, its keys; twice the value at layer 2, on one row.
    assert told.keys == 2 * BLOCK * (4 * 2 * cut + (2 + 1) * plain)
    d_in = 4 * D_MODEL  # one fact: two triangular solves, its norm
    assert told.solve == pytest.approx(2 * (2 * d_in**2 + 2 * d_in + 1 / 3))
    assert told.total == told.targets + told.keys + told.solve
    assert told.seconds(1e6) == pytest.approx(told.total / 1e6)


def test_memory_by_hand(gpt2):
    told = run(gpt2, FACTS[1:2])
    rows, d_in = lengths(gpt2, FACTS[1]), 4 * D_MODEL
    assert told.weights == sum(p.numel() for p in gpt2.hf.parameters()) * 4
    assert told.moment == 2 * d_in**2 * 8
    ran = 3 * max(total - start for start, total, _ in rows)
    past = 3 * max(start for start, _, _ in rows)
    values = 2 * ((10 * D_MODEL + 4 * d_in) * ran + 4 * D_MODEL * past)
    values += 3 * VOCAB * sum(n for _, _, n in rows)
    assert told.activations == 4 * values
    cut = max(rows[0][0], rows[1][0]) + 1
    assert told.host == 4 * 2 * cut * D_MODEL + 8 * 2 * (d_in + D_MODEL)
    assert told.peak == told.weights + max(told.activations, told.moment)


# -- by torch's counter ---------------------------------------------------------------------------


@pytest.mark.few(
    "gpt2-PMET-0",
    "gptj-PMET-256",
    "neox-MEMIT-0",
    "llama-w/o*-256",
    "gemma2-+ W_O-0",
    "opt-MEMIT-256",
)
@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize("method", ["PMET", "MEMIT", "w/o δ^a", "+ W_O"])
def test_torch_counts_the_same(model, method, few, monkeypatch):
    """All but a gradient that stops inside block L, which counts as that of the whole block.
    Attention's own products are not counted: much here, where prompts are as long as vectors."""
    monkeypatch.setattr("pmet_lens.editing.objective.FEW_TOKENS", few)
    told = run(model, method=method)
    record, step, _, read = measured(model, pl.named(method))
    assert told.record == pytest.approx(record, rel=2e-3)  # and logits of one token, unread
    assert told.keys == read
    # The fewer tokens, the larger the share of block L: all of its tokens run, in few.
    assert step <= told.step <= 1.45 * step


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_the_whole_of_a_step_is_close(family):
    """Attention included, on the real step of one fact."""
    model = shared_model(family)
    _, _, every, _ = measured(model, pl.PMET, FACTS[2:])
    assert run(model, FACTS[2:]).step == pytest.approx(every, rel=0.25)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_plain_step_is_the_whole_model_on_whole_prompts(family):
    model, facts = shared_model(family), FACTS[1:2]
    rows, _ = objective.prompts(model, facts, CONTEXTS)
    delta = torch.zeros(D_MODEL, requires_grad=True)
    entry = (model.stream_hook(2, "resid_post"), lambda value: value + delta)
    with FlopCounterMode(display=False) as counter:
        model.forward(rows.ids, rows.mask, hooks=[entry]).sum().backward()
    assert run(model, facts, pl.MEMIT).whole_step == products(counter)


def test_a_subject_of_one_token_that_begins_a_prompt_costs_no_more(gpt2):
    """Nothing lies before it there; the other rows of the batch keep their past all the same."""
    facts = [*FACTS, pl.Fact("M", "{} is in", "Vell")]
    record, step, _, _ = measured(gpt2, pl.MEMIT, facts)
    told = run(gpt2, facts, pl.MEMIT)
    assert told.step == step
    assert told.record == pytest.approx(record, rel=2e-3)
    assert told.step < 1.5 * run(gpt2, method=pl.MEMIT).step


# -- in proportion --------------------------------------------------------------------------------


def test_more_facts_cost_in_proportion(gpt2):
    few, many = run(gpt2), run(gpt2, n_facts=3000)
    assert many.facts == 3000
    for name in ("step", "whole_step", "record", "targets", "keys"):
        assert getattr(many, name) == pytest.approx(1000 * getattr(few, name))
    wide = 8 * (4 * D_MODEL + D_MODEL)  # bytes per fact and site: at two sites, all facts at one
    assert many.host == 1000 * (few.host - 2 * 3 * wide) + 2 * D_MODEL * wide + 3000 * wide
    assert many.solve == pytest.approx(2 * solvers.operations(3000, 4 * D_MODEL)["primal"])
    assert (many.weights, many.moment) == (few.weights, few.moment)
    # A batch is as large as the budget.
    assert few.activations < many.activations == run(gpt2, n_facts=6000).activations


def test_a_method_of_one_fact_at_once_solves_one_at_a_time(gpt2):
    hp = pl.Hparams(layers=(1,))
    each = [run(gpt2, [fact], pl.ROME, hp) for fact in FACTS]
    told = run(gpt2, method=pl.ROME, hparams=hp)
    for name in ("step", "whole_step", "record", "targets", "keys", "solve"):
        assert getattr(told, name) == pytest.approx(sum(getattr(one, name) for one in each))
    assert told.activations == max(one.activations for one in each)


# -- words ----------------------------------------------------------------------------------------


def test_it_is_told_in_a_few_lines(gpt2):
    told = str(run(gpt2, n_facts=10**6))
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    assert lines["facts"] == "1,000,000"
    assert "TFLOP" in lines["step"]
    assert "times" in lines["step"]
    assert lines["weights"] == "246.8 KiB"


def test_the_model_is_left_as_it_was(gpt2):
    state = {name: tensor.clone() for name, tensor in gpt2.hf.state_dict().items()}
    run(gpt2)
    assert all(torch.equal(state[name], t) for name, t in gpt2.hf.state_dict().items())


def test_a_family_whose_blocks_cannot_run_alone_is_counted_whole(gpt2, monkeypatch):
    def refuse(_first):
        raise ModelError("no")

    monkeypatch.setattr(gpt2, "from_layer", refuse)
    told = run(gpt2, FACTS[1:2], pl.MEMIT)
    rows = lengths(gpt2, FACTS[1])
    ran, scored = 3 * max(total for _, total, _ in rows), sum(n for _, _, n in rows)
    # All blocks there, from block 2 on back.
    assert told.step == 2 * ((4 + 2) * BLOCK * ran + 2 * VOCAB * D_MODEL * scored)
    assert told.keys > run(tiny_model("gpt2"), FACTS[1:2], pl.MEMIT).keys


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"facts": []}, FactError, "no facts"),
        ({"facts": [pl.Fact("Kel", "{} is", target_true="x")]}, FactError, "target_new"),
        ({"method": "PMETT"}, SettingsError, "no method or ablation 'PMETT'"),
        ({"method": "FT-W"}, SettingsError, "no estimate for FineTune"),
        ({"method": pl.MEND}, SettingsError, "no estimate for Mend"),
        ({"hparams": None}, SettingsError, "no PMET settings"),
        ({"hparams": pl.Hparams(layers=(3,))}, SettingsError, "at most 2"),
        ({"n_facts": 0}, SettingsError, "n_facts must be at least 1"),
    ],
)
def test_what_cannot_be_estimated_is_refused(gpt2, change, error, words):
    with pytest.raises(error, match=words):
        run(gpt2, **change)


def test_gpt_j_fits_a_gpu_of_24_gb():
    """In bfloat16, counted on shapes without weights: the paper's layers, one site at a time."""
    from transformers import GPTJConfig, GPTJForCausalLM

    with torch.device("meta"):
        hf = GPTJForCausalLM(GPTJConfig()).to(torch.bfloat16)
    model = pl.load(hf, tiny_tokenizer(), name="gpt-j-6b")
    hp = pl.HPARAMS["gpt-j-6b"]["PMET"]
    weights = sum(p.numel() * p.element_size() for p in hf.parameters())
    assert 12.0e9 < weights < 12.2e9
    sites = [pl.Site(layer, "mlp") for layer in hp.layers]
    kept = sum(model.weight(site).numel() * 2 for site in sites)  # for the way back
    free = int(24e9) - weights - kept
    tokens = objective.budget(model, hp.layers[-1], free)
    activations = tokens * objective.values_per_token(model, hp.layers[-1]) * 2
    assert 1000 < tokens < 16384
    assert activations <= free / 2
    moment = 2 * 8 * model.d_in(sites[0]) ** 2  # itself and its factor, float64
    assert weights + kept + max(activations, moment) < 24e9
    assert objective.budget(model, hp.layers[-1], int(200e9)) == 16384
    assert objective.budget(model, hp.layers[-1], 0) == objective.FEW_TOKENS
