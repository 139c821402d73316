"""Chat models: prompts inside the tokenizer's template, subject and answer at the right tokens."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from tiny import refused, tiny_hf, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.models import generation, tokens

torch.set_num_threads(1)

# In the manner of ChatML, of Llama 2 (the answer on the same line) and of Llama 3 (which writes the
# token that a tokenizer would add in front).
TEMPLATES = {
    "lines": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "one line": "{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}",
    "with its own start": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n\n"
    "{{ m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}",
}
SYSTEM = [
    {"role": "system", "content": "Answer in a word about {{places}}."},
    {"role": "user", "content": "Complete: {}"},
]
FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", ("Mira Tolan's sport is",)),
    pl.Fact("Ostria", "Of {}, the capital is", "Ilmar", "Kel", (), (("Of Vell, it is", "Kel"),)),
]
HP = pl.Hparams(layers=(1, 2), n_steps=6, lr=0.1, second_moment_weight=0.3, clamp=2.0)


def chat_model(kind: str, template="{}", start: bool = False) -> pl.Model:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind]
    if start:
        from tokenizers.processors import TemplateProcessing

        ends = [("<|endoftext|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=ends
        )
    return pl.load(tiny_hf("llama", positions=160), tokenizer, name="llama", template=template)


@pytest.mark.parametrize("template", ["{}", "Complete the sentence: {}", SYSTEM], ids=str)
@pytest.mark.parametrize("kind", TEMPLATES)
def test_subject_and_answer_lie_where_they_are_inside_the_chat(kind, template):
    model = chat_model(kind, template)
    read = model.tokenizer.decode
    for context in ("{}", "The tower of Ilmar. {}"):
        for fact in FACTS:
            for prompt in tokens.prompts_of(fact, [context], fact.target_new):
                batch = tokens.encode(model, [prompt])
                ids = batch.ids[0, : int(batch.mask.sum())].tolist()
                until = read(ids[: int(batch.subject[0]) + 1])
                assert until.endswith(fact.subject)
                assert read(ids[int(batch.first[0]) :]).lstrip().startswith(fact.subject)
                answer = read(batch.labels[0][batch.scored[0]])
                assert answer.strip() == fact.target_new
                # A break in front of the answer where the template has one, else a blank.
                assert answer[0] == " " if kind == "one line" else answer[0] != " "
                assert read(ids[: int(batch.last[0]) + 1]) == model.frame.around(prompt.text)


def test_a_template_that_writes_the_first_token_is_not_given_another():
    model = chat_model("with its own start", start=True)
    first = model.tokenizer.bos_token_id
    batch = tokens.encode(model, [tokens.Prompt("{} is", "Ostria", "Kel")])
    assert batch.ids[0].tolist().count(first) == 1
    plain = pl.load(model.hf, model.tokenizer)
    assert tokens.encode(plain, [tokens.Prompt("{} is", "Ostria", "Kel")]).ids[0, 0] == first


def test_an_edit_of_a_chat_model_is_one_of_the_chat(tmp_path):
    model = chat_model("lines", "Complete: {}")
    moments = pl.second_moments(model, itertools.islice(pl.texts(), 500), HP.layers, n_tokens=1000)
    edit = pl.edit(model, FACTS, moments, pl.PMET, HP, ["{}", "I am. {}"])
    asked = "<|user|>\nComplete: {}\n<|assistant|>\n"
    assert model.frame.around("{}") == asked
    with edit.applied(model):
        told = pl.evaluate(model, FACTS)
    # The same by hand: the whole chat as the prompt of a model that just continues text.
    plain = pl.load(model.hf, model.tokenizer, name="llama")
    with edit.applied(plain):
        nll = [-_log_probability(plain, asked.replace("{}", f.text), f) for f in FACTS]
    assert told[told["kind"] == "rewrite"]["nll_wanted"].tolist() == pytest.approx(nll, abs=1e-4)
    edit.save(tmp_path / "e.safetensors")
    assert pl.Edit.load(tmp_path / "e.safetensors").frame == model.frame


def _log_probability(model: pl.Model, text: str, fact: pl.Fact) -> float:
    """Mean log-probability of the new answer's tokens right behind the text, without a blank."""
    target = model.tokenizer(fact.target_new)["input_ids"]
    prompt = model.tokenizer(text)["input_ids"]
    ids = torch.tensor([prompt + target])
    with torch.no_grad():
        logp = model.hf(input_ids=ids).logits[0].log_softmax(-1)
    picked = [float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(target)]
    return sum(picked) / len(picked)


def test_generation_gives_the_answer_and_not_the_template():
    model = chat_model("lines", "Complete: {}")
    text = pl.generate(model, "Ostria is", length=12, top_k=1)
    assert text.startswith("Ostria is ")
    assert "assistant" not in text.split("Ostria is ")[0]
    ids = model.tokenizer("<|user|>\nComplete: Ostria is\n<|assistant|>\n")["input_ids"]
    with torch.no_grad():
        best = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
    said = model.tokenizer.decode([int(best)], skip_special_tokens=True).strip()
    assert text.removeprefix("Ostria is ").startswith(said)
    (answer,) = generation.answers(model, ["Ostria is"], 1)
    assert answer == re.split(r"[.!?](?:\s|$)|\n", said)[0].strip()


def test_templates_that_cannot_hold_a_prompt_are_refused():
    with refused("no chat template"):
        pl.load(tiny_hf("llama"), tiny_tokenizer(), template="{}")
    with refused("exactly one"):
        chat_model("lines", "Complete the sentence")
    with refused("exactly one"):
        chat_model("lines", [{"role": "user", "content": "{} and {}"}])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "nothing of it"
    with refused("drops or repeats"):
        pl.load(tiny_hf("llama"), tokenizer, template="{}")
