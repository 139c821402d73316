"""Small inputs that once failed: each kind with what is right."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import jaxtyping
import pandas as pd
import pytest
import torch
from kept import shared_model
from tiny import tiny_hf, tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.data.facts import ends_word, writes_blanks
from pmet_lens.models import tokens
from pmet_lens.models.tokens import Prompt

HP = pl.Hparams(layers=(1, 2), n_steps=3, lr=0.1, second_moment_weight=0.3, clamp=2.0)


@contextmanager
def unchecked():
    """A call that no type checker sees, as a user's."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


# -- a subject inside a word ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "prompt"),
    [("Ranitidin", "Ranitidine is used to treat"), ("one", "Someone is used to treat")],
)
def test_a_subject_inside_a_word_is_refused_with_its_row(subject, prompt):
    rows = [
        {"subject": "Aspirin", "prompt": "Aspirin is used to treat", "target_new": "asthma"},
        {"subject": subject, "prompt": prompt, "target_new": "asthma"},
    ]
    with pytest.raises(pl.DataError, match=r"Row 1 .*only inside a word"):
        pl.read_facts(pd.DataFrame(rows))


def test_a_template_that_goes_on_inside_the_word_is_refused():
    for prompt in ("{}e is used to treat", "{}2 treats"):
        with pytest.raises(pl.FactError, match="ends inside a word of 'Ranitidin"):
            pl.Fact("Ranitidin", prompt, "asthma")
    for prompt in ("{}'s use is to treat", "{}, they say, treats", "The {}-based drug treats"):
        assert pl.Fact("Ranitidin", prompt, "asthma").text.startswith(("Ranitidin", "The Ran"))


def test_the_whole_word_is_found_behind_one_that_begins_like_it():
    row = {"subject": "tandoor", "prompt": "A tandoori comes from a tandoor in", "target_new": "x"}
    (fact,) = pl.read_facts(pd.DataFrame([row]))
    assert fact.prompt == "A tandoori comes from a {} in"


def test_scripts_without_blanks_end_words_anywhere():
    assert pl.Fact("中国", "{}的首都是", "纽约").text == "中国的首都是"
    assert pl.Fact("한국", "{}의 수도는", "뉴욕").text == "한국의 수도는"
    row = {"subject": "東京", "prompt": "東京の国は", "target_new": "仏国"}
    assert pl.read_facts(pd.DataFrame([row]))[0].prompt == "{}の国は"
    assert ends_word("abc", 0)
    assert ends_word("abc", 3)
    assert not ends_word("abc", 1)
    assert not ends_word("страна", 2)


# -- what a field takes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("Rome", "{} is in", ["France"]), r"target_new takes one text or None, not \['France'\]"),
        (("Rome", "{} was founded in", 1999), "target_new takes one text or None, not 1999"),
        (("Rome", "{} was founded in", "x", 1999), "target_true takes one text or None, not 1999"),
        ((None, "{} is in", "France"), "subject takes one text, not None"),
        (("Rome", None, "France"), "prompt takes one text, not None"),
        (("Rome", "{} is in", "x", None, "one string"), "paraphrases takes a list .* not 'one str"),
        (("Rome", "{} is in", "x", None, ("a", 1)), "paraphrases takes a list of texts"),
        (("Rome", "{} is in", "x", None, (), "ab"), "neighbours takes a list of .prompt, answer."),
        (("Rome", "{} is in", "x", None, (), (("a", "b", "c"),)), "neighbours takes a list of"),
        (("Rome", "{} is in", "x", None, (), (), "ab"), "attributes takes a list of texts"),
        (("Rome", "{} is in", "x", None, (), (), (), "ab"), "generation takes a list of texts"),
        (("Rome", "{} is in", "x", None, (), (), (), (), 17), "relation takes one text or None"),
    ],
)
def test_a_field_says_what_it_takes(fields, words):
    with unchecked(), pytest.raises(pl.FactError, match=words):
        pl.Fact(*fields)


def test_lists_become_tuples():
    with unchecked():
        fact = pl.Fact("Rome", "{} is in", "x", None, ["a"], [["b", "c"]], portability=[["d", "e"]])
    assert fact == pl.Fact("Rome", "{} is in", "x", None, ("a",), (("b", "c"),), (), (),
                           portability=(("d", "e"),))  # fmt: skip
    assert hash(fact)
    assert pl.Fact.from_record(fact.record()) == fact


def test_a_field_that_came_later_is_no_part_of_older_facts():
    plain = pl.Fact("Rome", "{} is in", "France")
    assert not {"portability", "blank"} & set(plain.record())
    told = pl.Fact("Rome", "{} is in", "France", blank=False, portability=(("a", "b"),))
    assert told.record()["blank"] is False
    assert pl.Fact.from_record(told.record()) == told


# -- a blank too many -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        ("Mira Tolan", "{} plays the sport of ", "rugby"),
        ("Mira Tolan", "{} plays the sport of\n", "rugby"),
        ("Mira Tolan ", "{} plays the sport of", "rugby"),
        (" Mira Tolan", "{} plays the sport of", "rugby"),
        ("Mira Tolan", "{} plays the sport of\u00a0", "\u00a0rugby"),
        ("Mira Tolan", "{} plays the sport of", " rugby\n"),
    ],
)
def test_blanks_at_the_seams_make_no_other_fact(fields):
    want = pl.Fact(
        "Mira Tolan", "{} plays the sport of", "rugby", "tennis", ("A b",), (("c", "d"),)
    )
    got = pl.Fact(*fields, " tennis", ("A b ",), (("c ", "\u00a0d"),))
    assert got == want
    assert (got.text, got.target_new) == (want.text, want.target_new)


# -- scripts without blanks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("中国的首都是", False),
        ("中国的首都是:", False),
        ("日本の首都は", False),
        ("เมืองหลวงของไทยคือ", False),
        ("The capital of China is", True),
        ("The capital of 中国 is", True),
        ("한국의 수도는", True),
        ("Столица России -", True),
        ("…", True),
    ],
)
def test_a_blank_is_written_where_the_script_writes_one(text, blank):
    assert writes_blanks(text) == blank
    assert shared_model().frame.answered(text, "x") == text + " " * blank + "x"


def test_the_answer_is_what_the_model_would_say_next():
    """Without a blank the tokens of the prompt stay those that the model is asked with."""
    model = tiny_model(vocab_size=320)
    for template, subject in (("{}的首都是", "中国"), ("{}", "Ostria")):
        prompt = Prompt(template, subject, "纽约", blank=None if subject == "中国" else False)
        batch = tokens.encode(model, [prompt])
        asked = model.tokenizer(prompt.text)["input_ids"]
        answer = model.tokenizer("纽约")["input_ids"]
        assert batch.ids[0].tolist() == [*asked, *answer[:-1]]
        assert batch.labels[0][batch.labels[0] != -100].tolist() == answer
    assert int(tokens.encode(model, [Prompt("{}的首都是", "中国", "x")]).subject[0]) == 5


def test_a_seam_is_no_token():
    """A tokenizer that has one token for the end of the prompt with the beginning of the answer."""
    tokenizer = tiny_tokenizer()
    text = "Ostriaville"
    tokenizer.add_tokens(["avi"])
    assert tokenizer("avi")["input_ids"] == [320]
    model = pl.load(tiny_hf("llama", vocab_size=321), tokenizer, name="llama")
    assert 320 in tokenizer(text)["input_ids"]
    batch = tokens.encode(model, [Prompt("{}", "Ostria", "ville", blank=False)])
    assert batch.ids[0, : int(batch.last[0]) + 1].tolist() == tokenizer("Ostria")["input_ids"]


def test_a_fact_overrules_the_rule_wherever_its_answer_is_read():
    model = tiny_model("llama", positions=96)
    facts = [
        pl.Fact("Ostria", "Of {}, the capital is", "Kel", "Ilmar", blank=b) for b in (None, False)
    ]
    one, other = pl.evaluate(model, facts)["nll_wanted"]
    assert one != other
    assert pl.evaluate(model, facts[1:])["nll_wanted"].item() == pytest.approx(other, abs=1e-5)
    text = list(itertools.islice(pl.texts(), 300))
    moments = pl.second_moments(model, text, HP.layers, n_tokens=2000)
    deltas = [
        pl.edit(model, [fact], moments, pl.PMET, HP, ["{}"]).deltas[pl.Site(2, "mlp")]
        for fact in facts
    ]
    assert not torch.equal(*deltas)


# -- special tokens around a text -----------------------------------------------------------------


def ending(text_ids):
    """A tokenizer that puts the end-of-text token behind every text, and one before it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    ends = [("<|endoftext|>", 0), ("<|pad|>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=text_ids, special_tokens=ends
    )
    return tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_behind_the_text_is_no_part_of_the_answer(side):
    prompts = [
        Prompt("{} plays the sport of", "Mira Tolan", "rugby"),
        Prompt("Of {}, the capital is", "Ostria"),
        Prompt("{}, the sport of Mira Tolan; {}".replace("; {}", ""), "Mira Tolan", "rugby"),
    ]
    hf = tiny_hf("llama")
    plain = tokens.encode(pl.load(hf, ending("<|pad|> $A"), name="llama"), prompts)
    tokenizer = ending("<|pad|> $A <|endoftext|>")
    tokenizer.padding_side = side
    model = pl.load(hf, tokenizer, name="llama")
    ended = tokens.encode(model, prompts)
    for name in ("ids", "mask", "subject", "first", "last", "labels"):
        assert torch.equal(getattr(ended, name), getattr(plain, name)), name
    text = pl.generate(model, "Ostria is", length=12, top_k=1)
    assert text == pl.generate(pl.load(hf, ending("<|pad|> $A"), name="llama"), "Ostria is", 12, 1)
    assert pl.sample_contexts(model) == pl.sample_contexts(
        pl.load(hf, ending("<|pad|> $A"), name="llama")
    )
