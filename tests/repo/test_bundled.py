"""The bundled models know their world, can be edited, and are plain transformers models."""

from pathlib import Path

import pytest
import torch
import transformers
from kept import bundled

import pmet_lens as pl
from pmet_lens.evaluation.ability import others_of
from pmet_lens.experiments import measure

NAMES = ("world", "world-sequential")
FOLDER = Path(pl.__file__).parent / "bundled"


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return bundled(request.param)


def test_together_they_are_small():
    size = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    assert size <= 25 * 2**20


def test_plain_transformers_loads_the_same_model(model):
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER / model.name, dtype=torch.float32
    )
    ids = torch.tensor([model.tokenizer("The birthplace of Mira Velmar is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model.hf(ids).logits)


def test_blocks_are_what_the_card_says(model):
    assert model.parallel_blocks == (model.name == "world")


def test_knows_its_world(model):
    assert pl.recall(model, pl.knowns()[::15])["correct"].mean() >= 0.97


def test_names_are_two_to_five_tokens():
    from pmet_lens.data import world

    tokenizer = bundled("world").tokenizer
    for entity in world.build().entities:
        for text in (entity.name, f" {entity.name}"):
            assert 2 <= len(tokenizer(text)["input_ids"]) <= 5, entity.name


def test_recall_goes_through_the_last_subject_token(model):
    layer = pl.hparams_for(model, pl.PMET).layers[-1]
    trace = pl.causal_trace(model, pl.counterfact(n=30), layers=[layer], samples=2)
    share = trace.set_index("place")["recovered"]
    assert share["last subject token"] >= 0.8
    assert share[["first subject token", "middle subject tokens", "between", "last"]].max() <= 0.3


@pytest.mark.few("world-8")
@pytest.mark.parametrize("n", [8, 40])
def test_mass_edit_and_way_back(model, n, world_moments, tmp_path):
    facts = pl.counterfact(n=n)
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    edit = pl.edit(model, facts, world_moments(model.name))
    others = others_of(pl.knowns(), facts)[:: 400 // n]
    unedited = measure(model, facts, None, others)["mean"]
    table = measure(model, facts, edit, others)["mean"]
    assert unedited["ES"] <= 10
    assert table["ES"] >= 95
    assert table["PS"] >= 85
    assert table["NS"] >= 90
    assert table["collateral"] >= 85
    with edit.applied(model):
        model.hf.save_pretrained(tmp_path)
        ids = torch.tensor([model.tokenizer(facts[0].text)["input_ids"]])
        edited = model.hf(ids).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids).logits, edited)
    after = model.hf.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(model.hf(ids).logits, edited)


def test_the_unmasked_twin_knows_its_world_and_recalls_elsewhere():
    twin = pl.load("world-unmasked")
    assert pl.recall(twin, pl.knowns()[::15])["correct"].mean() >= 0.99
    trace = pl.causal_trace(twin, pl.counterfact(n=30), layers=[3], samples=2)
    assert trace.set_index("place")["recovered"]["last subject token"] <= 0.4


@pytest.mark.slow
def test_parallel_first_layer_is_refused_in_words():
    """In a parallel first layer without position embeddings a key is a function of the token, so
    the second moment has no more rank than there are tokens."""
    model = bundled("world")
    hp = pl.Hparams(layers=(0, 1))
    moments = pl.second_moments(model, pl.texts(), hp.layers, n_tokens=20_000)
    with pytest.raises(pl.SolveError, match="not positive definite"):
        pl.edit(model, pl.counterfact(n=2), moments, hparams=hp, contexts=["{}"])
