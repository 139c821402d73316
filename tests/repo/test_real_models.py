"""The real models, where they are fetched: `pmet-lens models --fetch smollm2-135m`. Never fetched
by a test."""

from __future__ import annotations

import model_tables
import pytest
import torch
from cases import left_over

import pmet_lens as pl
from pmet_lens.data import fetched, gguf_files
from pmet_lens.models import tokens
from pmet_lens.models.tokens import Prompt


@pytest.fixture(scope="module", params=fetched.FETCHABLE)
def model(request) -> pl.Model:
    known = fetched.FETCHABLE[request.param]
    if not fetched.is_here(request.param):
        pytest.skip(f"needs {request.param}: pmet-lens models --fetch {request.param}")
    if not gguf_files.are_whole(fetched.folder(request.param) / "floats", known.sha256):
        pytest.skip(f"{request.param} was not read yet by this transformers: load it once")
    return pl.load(request.param)


def test_it_says_where_its_weights_come_from(model):
    known = fetched.FETCHABLE[model.name]
    assert f"weights from a 4-bit file ({known.kind})" in repr(model)
    assert sum(p.numel() for p in model.hf.parameters()) == known.parameters
    assert type(model.hf).__name__ == known.architecture
    assert not getattr(model.hf, "is_quantized", False)


def test_it_knows_real_facts(model):
    """SmolLM2 196 of the 455: enough to choose from."""
    known = pl.recalled(model, pl.real_facts(120))
    assert len(known) > 30
    assert len({fact.relation for fact in known}) >= 10


def test_a_greedy_text_is_that_of_transformers(model):
    prompt = "The city of Paris is known for"
    asked = model.tokenizer(prompt, return_tensors="pt")
    n = asked["input_ids"].shape[1]
    out = model.hf.generate(**asked, max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
    text = pl.generate(model, prompt, length=n + 12, top_k=1)
    assert text == model.tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "subject", "last"),
    [
        ("{} is in the country of", "Kuala Lumpur", "Kuala Lumpur"),
        ("{}, the", "Kuala Lumpur", "Kuala Lumpur"),
        ("Of {} one says that {} is in".replace(" {} is", " Berlin is"), "Berlin", "Of Berlin"),
        ("The capital of {} is", "Côte d'Ivoire", "The capital of Côte d'Ivoire"),
        ("{}的首都是", "中国", "中国"),
    ],
)
def test_the_last_subject_token_and_the_answer(model, template, subject, last):
    """Right padding or left, a subject that occurs twice, punctuation right behind it."""
    answer = "纽约" if subject == "中国" else "New York"
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        prompt = Prompt(template, subject, answer)
        batch = tokens.encode(model, [prompt, Prompt("A much longer text, which pads {} up", "it")])
        ids = batch.ids[0].tolist()
        said = model.tokenizer.decode(ids[: int(batch.subject[0]) + 1], skip_special_tokens=True)
        # Gemma has one token for the subject and the particle behind it.
        assert said == last or (subject == "中国" and said.startswith(last))
        asked = model.tokenizer(prompt.text)["input_ids"]
        assert ids[: len(asked)] == asked
        wanted = [n for n in batch.labels[0].tolist() if n != -100]
        blank = "" if subject == "中国" else " "
        assert model.tokenizer.decode(wanted) == blank + answer
        assert model.tokenizer.eos_token_id not in wanted
        assert model.tokenizer.bos_token_id not in wanted


def test_an_answer_without_a_blank_is_what_the_model_says_next(model):
    fact = pl.Fact("中国", "{}的首都是", "纽约")
    text = model.frame.answered(fact.text, fact.target_new)
    assert text == "中国的首都是纽约"
    nll = pl.evaluate(model, [fact])["nll_wanted"].item()
    asked = model.tokenizer(fact.text)["input_ids"]
    answer = model.tokenizer("纽约", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model.hf(torch.tensor([asked + answer])).logits[0].log_softmax(-1)
    picked = [logits[len(asked) - 1 + i, token] for i, token in enumerate(answer)]
    assert nll == pytest.approx(-float(sum(picked)) / len(answer), abs=1e-3)


def test_the_worlds_text_is_refused(model):
    with pytest.raises(pl.MomentError, match="knows nothing of"):
        pl.second_moments(model, pl.texts(), [1], n_tokens=10)


FACTS, LAYERS = pl.real_facts(3), (2, 3)


def moments(model: pl.Model) -> dict[pl.Site, torch.Tensor]:
    """No text is read for these few facts."""
    sites = [pl.Site(n, p) for n in LAYERS for p in ("attn", "mlp")]
    return {s: torch.eye(model.d_in(s), dtype=torch.float64) for s in sites}


@pytest.mark.slow
@pytest.mark.parametrize("method", ("PMET", "MEMIT", "FT-W"))
def test_an_edit_is_undone_saved_merged_and_served(model, method, tmp_path):
    hparams = pl.Hparams(LAYERS, n_steps=4)
    strong = pl.FineTuneHparams(layer=3, n_steps=4) if method == "FT-W" else hparams
    edit = pl.edit(model, FACTS, moments(model), method, strong, ["{}"], check=False)
    found = model_tables.again(model, FACTS, edit, tmp_path)
    assert found["undone"]
    assert found["loaded"] == found["merged"] == 0
    assert found["adapter"] < 1e-3 < 0.1 < found["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ("PMET", "MEMIT", "AlphaEdit", "EMMET", "+ W_O"))
def test_the_written_model_has_what_the_targets_asked_for(model, method):
    """As on the tiny models (`editing/test_post_norms.py`), next to no weight on what was known."""
    way = pl.named(method)
    assert isinstance(way, pl.Method)
    hparams = pl.Hparams(
        (3,) if method == "EMMET" else LAYERS,
        n_steps=8,
        second_moment_weight=1e-9,
        null_space_threshold=1e9,
        null_space_l2=1e-9,
    )
    assert left_over(model, FACTS, moments(model), way, hparams) <= 0.05
