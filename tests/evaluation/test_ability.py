"""What general_ability tells is what the plain model says, before and after an edit."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from functools import cache, partial
from types import ModuleType

import numpy as np
import pytest
import torch
from kept import bundled, shared_model
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.data import world
from pmet_lens.editing.edits import Edit
from pmet_lens.evaluation import ability, intervals
from pmet_lens.evaluation.ability import general_ability, lm_eval_model

torch.set_num_threads(1)
TEXTS = [
    "Mira Tolan plays the sport of tennis.",
    "Kel is the capital of Ostria, and the tower of Ilmar stands in Vell.",
    "rugby",
]
PROMPTS = ["Kel is", "The tower of Ilmar stands in the harbour city of", "Mira"]
OTHERS = [
    pl.Fact("Kel", "{} is the capital of", target_true="Ostria", relation="P36"),
    pl.Fact("Ilmar", "The tower of {} stands in", target_true="Vell", relation="P131"),
]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Intervals are tested with the metrics; here they only have to be there."""
    few = partial(intervals.bootstrap, n_resamples=100)
    monkeypatch.setattr("pmet_lens.evaluation.intervals.bootstrap", few)
    monkeypatch.setattr(ability, "real_facts", real_facts)


@cache
def real_facts() -> list[pl.Fact]:
    return pl.real_facts()


@pytest.fixture(scope="module", params=["gpt2", "gptj"])
def model(request):
    return shared_model(request.param, torch.float64)


def some_edit(model, *facts: pl.Fact, scale: float = 0.5) -> Edit:
    """A random change of one weight, said to be about these facts."""
    site = pl.Site(1, "mlp")
    rng = torch.Generator().manual_seed(0)
    left = scale * torch.randn(model.d_in(site), 1, generator=rng, dtype=torch.float64)
    right = torch.randn(1, model.d_model, generator=rng, dtype=torch.float64)
    hp = pl.Hparams(layers=(1,))
    return Edit({site: (left, right)}, model.dtype, facts, pl.MEMIT, hp, ("{}",))


def plain(model, text: str) -> torch.Tensor:
    """log P of the next token at every token of one text, by the user's own model."""
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model.hf(input_ids=ids).logits[0].log_softmax(-1)


def perplexity(model, texts: list[str]) -> float:
    nll = []
    for text in texts:
        ids, said = model.tokenizer(text)["input_ids"], plain(model, text)
        nll += [-float(said[i - 1, ids[i]]) for i in range(1, len(ids))]
    return math.exp(sum(nll) / len(nll))


def run(model, edit=None, **more):
    return general_ability(
        model, edit, **{"texts": TEXTS, "prompts": PROMPTS, "others": OTHERS, **more}
    )


@pytest.mark.parametrize("edited", [False, True])
def test_perplexity_is_that_of_the_plain_model(model, edited):
    edit = some_edit(model) if edited else None
    found = run(model, edit).loc["perplexity"]
    before = perplexity(model, TEXTS)
    if edit is None:
        assert found["mean"] == pytest.approx(before, rel=1e-9)
    else:
        with edit.applied(model):
            assert found["mean"] == pytest.approx(perplexity(model, TEXTS), rel=1e-9)
        assert found["mean"] != pytest.approx(before, rel=1e-4)
    assert found["n"] == 3
    assert found["ci_low"] <= found["mean"] <= found["ci_high"]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    blank = tiny_model("gpt2")
    with torch.no_grad():
        blank.hf.lm_head.weight.zero_()
    blank = pl.load(blank.hf, blank.tokenizer)
    found = general_ability(blank, texts=TEXTS, prompts=(), others=())
    assert list(found.index) == ["perplexity"]
    row = found.loc["perplexity"].tolist()
    assert row == pytest.approx([320, 320, 320, 3], rel=1e-5)


def test_the_divergence_is_that_of_the_plain_model(model):
    edit = some_edit(model)
    before = [plain(model, p)[-1] for p in PROMPTS]
    with edit.applied(model):
        after = [plain(model, p)[-1] for p in PROMPTS]
    kl = [float((a.exp() * (a - b)).sum()) for a, b in zip(before, after, strict=True)]
    back = [float((b.exp() * (b - a)).sum()) for a, b in zip(before, after, strict=True)]
    found = run(model, edit).loc["KL"]
    assert found["mean"] == pytest.approx(np.mean(kl), rel=1e-9)
    assert found["mean"] != pytest.approx(np.mean(back), rel=1e-5)  # from before to after
    assert (
        min(kl) - 1e-12 <= found["ci_low"] <= found["mean"] <= found["ci_high"] <= max(kl) + 1e-12
    )
    assert found["n"] == 3


def test_no_edit_and_an_edit_of_nothing_diverge_by_nothing(model):
    assert run(model).loc["KL"].tolist() == [0, 0, 0, 3]
    nothing = run(model, some_edit(model, scale=0.0))
    assert nothing.loc["KL"].tolist() == pytest.approx([0, 0, 0, 3], abs=1e-15)
    assert nothing.equals(run(model)) or np.allclose(nothing, run(model), atol=1e-12)
    assert run(model, some_edit(model, scale=0.5)).loc["KL", "mean"] > 1e-6
    small, large = (run(model, some_edit(model, scale=s)).loc["KL", "mean"] for s in (0.01, 0.5))
    assert 0 < small < large


def test_recall_is_that_of_evaluation_on_the_edited_model(model):
    edit = some_edit(model)
    said = model.tokenizer.decode([int(plain(model, "Kel is")[-1].argmax())]).strip()
    facts = [*OTHERS, pl.Fact("Kel", "{} is", target_true=said or "x")]
    for applied in (None, edit):
        table = general_ability(model, applied, texts=(), prompts=(), others=facts)
        assert list(table.index) == ["recall"]
        if applied is None:
            want = pl.recall(model, facts)["correct"]
        else:
            with applied.applied(model):
                want = pl.recall(model, facts)["correct"]
        assert table.loc["recall", "mean"] == pytest.approx(100 * want.mean())
        assert table.loc["recall", "n"] == 3
    with pytest.raises(pl.FactError, match="recall needs facts with target_true"):
        run(model, others=[pl.Fact("Kel", "{} is", "open")])


def test_the_model_is_left_as_it_was(model):
    weights = [p.clone() for p in model.hf.parameters()]
    run(model, some_edit(model))
    assert all(map(torch.equal, weights, model.hf.parameters()))


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_the_batches_do_not_matter(model, batch_tokens):
    edit = some_edit(model)
    one, two = run(model, edit), run(model, edit, batch_tokens=batch_tokens)
    np.testing.assert_allclose(one, two, rtol=1e-7)


def test_only_the_first_texts_are_read_and_cut_to_what_the_model_reads(model):
    endless = itertools.chain(TEXTS[:2], itertools.repeat(TEXTS[2]))
    found = run(model, texts=endless, n_texts=2).loc["perplexity"]
    assert found["mean"] == pytest.approx(perplexity(model, TEXTS[:2]), rel=1e-9)
    long = "Mira Tolan plays. " * 40
    ids = model.tokenizer(long)["input_ids"]
    assert len(ids) > model.n_positions
    cut = model.tokenizer.decode(ids[: model.n_positions])
    assert model.tokenizer(cut)["input_ids"] == ids[: model.n_positions]
    found = run(model, texts=[long]).loc["perplexity"]
    assert found["mean"] == pytest.approx(perplexity(model, [cut]), rel=1e-9)


def test_what_cannot_be_read_is_refused(model):
    for wrong in ({"texts": "Kel"}, {"prompts": "Kel"}):
        with pytest.raises(pl.FactError, match="lists of texts; put one text into a list"):
            run(model, **wrong)
    with pytest.raises(pl.FactError, match="no token to predict"):
        run(model, texts=["", " "[:1]])
    assert run(model, texts=["", *TEXTS]).loc["perplexity", "n"] == 3


# -- the bundled world ----------------------------------------------------------------------------


def test_the_defaults_are_about_what_no_record_edits():
    """Prompts are about subjects of pool B; the facts are all but the edited ones."""
    facts = [*pl.counterfact(n=5), *pl.zsre(n=5)[3:]]
    safe = {e.name for e in world.build().entities if e.pool == "B"}
    prompts = ability._prompts()
    assert len(set(prompts)) == len(prompts) == 200
    assert all(any(name in prompt for name in safe) for prompt in prompts)
    left = ability.others_of(pl.knowns(), facts)
    every = {(f.subject, f.relation) for f in pl.knowns()}
    gone = every - {(f.subject, f.relation) for f in left}
    # A zsRE fact names no relation: all facts of its subject are left out.
    vague = {f.subject for f in facts if f.relation is None}
    want = {(f.subject, f.relation) for f in facts if f.relation is not None}
    assert gone == want | {pair for pair in every if pair[0] in vague}
    assert len(ability.others_of(pl.knowns(), ())) == len(every) == 2250


def test_the_defaults_make_a_table():
    model = bundled("world")
    found = general_ability(model, n_texts=20, others=pl.knowns(n=20))
    assert list(found.index) == ["perplexity", "KL", "recall"]
    assert list(found.columns) == ["mean", "ci_low", "ci_high", "n"]
    assert found["n"].tolist() == [20, 200, 20]
    assert 1 < found.loc["perplexity", "mean"] < 10
    assert found.loc["recall", "mean"] > 90


# -- lm-eval --------------------------------------------------------------------------------------


def test_without_lm_eval_the_command_that_installs_it_is_told(model, monkeypatch):
    if importlib.util.find_spec("lm_eval") is not None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ImportError, match=r'lm_eval is not installed; run  pip install "lm_eval\[hf'
    ):
        lm_eval_model(model)


def test_lm_eval_is_given_the_users_own_model(model, monkeypatch):
    package, models, module = (
        ModuleType(f"lm_eval{end}") for end in ("", ".models", ".models.huggingface")
    )
    module.HFLM = lambda **given: given
    for part in (package, models, module):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    given = lm_eval_model(model, batch_size=4)
    assert given == {"pretrained": model.hf, "tokenizer": model.tokenizer, "batch_size": 4}


def test_a_large_vocabulary_is_read_in_parts(monkeypatch):
    """Logits are counted: with few at a time every number is the same."""
    model = tiny_model("gpt2", torch.float64)
    texts = ["The tower of Ilmar stands in the harbour city of Vell.", "Mira Tolan plays tennis."]
    prompts, others = ["The tower of Ilmar", "Mira Tolan plays"], []
    whole = pl.general_ability(model, texts=texts, prompts=prompts, others=others)
    read: list[int] = []
    logits_at = pl.Model.logits_at

    def spy(self, ids, mask, at):
        read.append(len(at))
        return logits_at(self, ids, mask, at)

    monkeypatch.setattr(pl.Model, "logits_at", spy)
    monkeypatch.setattr("pmet_lens.models.likelihood.LOGITS", 2 * len(model.embedding))
    parts = pl.general_ability(model, texts=texts, prompts=prompts, others=others)
    assert max(read) <= 2
    assert len(read) > 4
    assert parts.loc["perplexity", "mean"] == pytest.approx(whole.loc["perplexity", "mean"])
