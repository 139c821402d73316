"""Positions are found in the text as it is tokenised: what is read is what was meant."""

from __future__ import annotations

import pytest
import torch
from kept import shared_model
from spellings import PROMPTS, TOKENIZERS, decoded
from tiny import tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens.data.facts import Fact, FactError
from pmet_lens.models.generation import SEEDS, sample_contexts
from pmet_lens.models.model import Model
from pmet_lens.models.tokens import (
    PLAIN,
    Prompt,
    chunks,
    encode,
    plain_ids,
    prompts_of,
    with_context,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2")


@pytest.fixture(params=TOKENIZERS)
def model(request, gpt2, monkeypatch) -> Model:
    """`encode` asks a model for nothing but its tokenizer, length and device."""
    monkeypatch.setattr(gpt2, "tokenizer", TOKENIZERS[request.param]())
    monkeypatch.setattr(type(gpt2), "n_positions", 512)
    return gpt2


# -- where the subject ends -----------------------------------------------------------------------


@pytest.mark.few("byte-level-None-{}-*", "*French-I like*")
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("context", [PLAIN, "The man. {}", "I like {x}, { and }. {}"])
@pytest.mark.parametrize("target", [None, "French"])
def test_what_is_decoded_up_to_the_subject_ends_with_it(model, name, context, target):
    subject, template = PROMPTS[name]
    prompt = Prompt(with_context(context, template), subject, target)
    batch = encode(model, [prompt])
    read = int(batch.subject[0])
    text = decoded(model, batch.ids[0, : read + 1])
    expected = context.removesuffix("{}") + template.partition("{}")[0] + subject
    assert text == expected
    assert decoded(model, batch.ids[0, :read]) != expected  # no token earlier would do
    assert read <= int(batch.last[0])
    assert (read == int(batch.last[0])) == template.endswith("{}")


def test_a_text_without_a_marked_subject_is_read_at_its_end(gpt2):
    batch = encode(gpt2, [Prompt("The capital of Ostria is", None, "Kel"), Prompt("Mira Tolan")])
    assert torch.equal(batch.subject, batch.last)
    assert decoded(gpt2, batch.ids[1, : batch.subject[1] + 1]) == "Mira Tolan"


# -- where the answer is predicted ----------------------------------------------------------------


@pytest.mark.parametrize("target", ["French", "Old Norse", "東京", "St. Kel & Sons", "x"])
def test_labels_spell_the_target(model, target):
    prompts = [
        Prompt("The mother tongue of {} is", "Danel Orrin", target),
        Prompt("{}'s", "Mira Tolan", f" {target} "),  # blanks around a target do not count
    ]
    batch = encode(model, prompts)
    for row, prompt in enumerate(prompts):
        chosen = batch.scored[row]
        first = int(chosen.nonzero()[0])
        spelt = [*batch.ids[row, : first + 1].tolist(), *batch.labels[row, chosen].tolist()]
        assert decoded(model, spelt) == f"{prompt.text} {target}"
        assert decoded(model, batch.ids[row, : first + 1]) == prompt.text
        assert int(batch.last[row]) == first
        # Teacher forcing: the next token is the label, and the last label is not in the input.
        length = int(batch.mask[row].sum())
        assert torch.equal(
            batch.labels[row, first : length - 1], batch.ids[row, first + 1 : length]
        )
        assert int(chosen.sum()) == length - first


def test_without_a_target_nothing_is_scored_and_all_tokens_are_there(model):
    text = "The mother tongue of Danel Orrin is"
    batch = encode(model, [Prompt("The mother tongue of {} is", "Danel Orrin")])
    assert batch.ids[0].tolist() == model.tokenizer(text)["input_ids"]
    assert not batch.scored.any()
    assert int(batch.last[0]) == batch.ids.shape[1] - 1


# -- rows and padding -----------------------------------------------------------------------------

ROWS = [
    Prompt("{} plays the sport of", "Mira Tolan", "water polo"),
    Prompt("{}", "Kel"),
    Prompt("The mother tongue of {} is", "Danel Orrin", "French"),
    Prompt("The tower stands in", None, "Vell"),
]


def test_padding_changes_nothing(model):
    together = encode(model, ROWS)
    assert len(together) == len(ROWS)
    for row, prompt in enumerate(ROWS):
        alone = encode(model, [prompt])
        width = alone.ids.shape[1]
        assert alone.mask.all()
        for name in ("ids", "mask", "labels"):
            assert torch.equal(getattr(together, name)[row, :width], getattr(alone, name)[0]), name
        assert not together.mask[row, width:].any()
        assert not together.scored[row, width:].any()
        assert (together.ids[row, width:] == model.tokenizer.pad_token_id).all()
        for name in ("subject", "last"):
            assert getattr(together, name)[row] == getattr(alone, name)[0], name


@pytest.mark.parametrize("rows", [[1, 2], [0], [True, False, True, False], [3, 3, 1], []])
def test_chosen_rows_lose_only_columns_of_padding(gpt2, rows):
    batch = encode(gpt2, ROWS)
    index = torch.tensor(rows, dtype=None if rows else torch.long)
    some = batch[index]
    numbers = torch.arange(len(batch))[index].tolist()
    again = encode(gpt2, [ROWS[n] for n in numbers]) if numbers else None
    assert len(some) == len(numbers)
    if again is not None:
        for name in ("ids", "mask", "subject", "last", "labels"):
            assert torch.equal(getattr(some, name), getattr(again, name)), name


# -- refusals -------------------------------------------------------------------------------------


def test_a_subject_that_leaves_no_token_is_refused(gpt2, monkeypatch):
    """Planted: a tokenizer that drops what it does not know, as some do with rare scripts."""
    from tokenizers import Regex, normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("[^ -~]"), ""), normalizers.Strip()]
    )
    monkeypatch.setattr(gpt2, "tokenizer", tokenizer)
    assert len(encode(gpt2, [Prompt("In {} people", "Ostria")])) == 1
    with pytest.raises(
        FactError, match=r"subject '東京' was not found in .*can be written by this"
    ):
        encode(gpt2, [Prompt("In {} people", "東京")])
    with pytest.raises(FactError, match="target '東京' of 'In' has no token"):
        encode(gpt2, [Prompt("In", None, "東京")])


def test_a_prompt_without_a_token_before_its_answer_is_refused(gpt2):
    with pytest.raises(FactError, match="no token before its answer"):
        encode(gpt2, [Prompt("", None, "Vell")])


def test_a_text_longer_than_the_model_reads_is_refused(gpt2):
    fits = "x" * 64
    assert encode(gpt2, [Prompt(fits)]).ids.shape == (1, 64)
    with pytest.raises(FactError, match=r"'xxx.* has 65 tokens, .* at most 64; shorten"):
        encode(gpt2, [Prompt("Kel"), Prompt(fits + "x")])


# -- contexts -------------------------------------------------------------------------------------


def test_prompts_of_a_fact_are_the_plain_one_and_the_prefixed_ones():
    fact = Fact("Kel", "The set { of {} is", "open")
    contexts = ["I am. {}", PLAIN, "A { b. {}"]
    texts = [p.text for p in prompts_of(fact, contexts, "open")]
    plain = "The set { of Kel is"
    assert texts == [plain, f"I am. {plain}", f"A {{ b. {plain}"]
    assert [p.text for p in prompts_of(fact, [])] == [plain]
    assert {p.target for p in prompts_of(fact, contexts)} == {None}
    assert {p.target for p in prompts_of(fact, contexts, "open")} == {"open"}


def test_contexts_are_the_models_own_words(gpt2):
    contexts = sample_contexts(gpt2, seed=3)
    assert contexts[0] == PLAIN
    assert len(contexts) == 1 + len(SEEDS)
    for context, word in zip(contexts[1:], SEEDS, strict=True):
        assert context.startswith(word)
        assert context.endswith(". {}")
        assert context.count("{") == context.count("}") == context.count("{}") == 1
        assert context.removesuffix(". {}") == " ".join(context.removesuffix(". {}").split())


def test_contexts_follow_from_seed_and_model(gpt2):
    once = sample_contexts(gpt2, seed=3)
    torch.manual_seed(99)  # the global generator has no say
    assert sample_contexts(gpt2, seed=3) == once
    assert sample_contexts(gpt2, seed=4) != once
    assert sample_contexts(shared_model("gpt2", seed=1), seed=3) != once


def test_braces_are_taken_out_of_contexts():
    """Planted: a model that says nothing but braces."""
    model = tiny_model("gpt2")
    braces = model.tokenizer.convert_tokens_to_ids(["{", "}"])

    def says(_, __, asked, out):
        out.logits[:] = 0.0
        out.logits[..., braces[asked["input_ids"].shape[1] % 2]] = 100.0
        return out

    model.speaker.register_forward_hook(says, with_kwargs=True)
    assert sample_contexts(model) == [PLAIN, *(f"{word}. {{}}" for word in SEEDS)]


@pytest.mark.parametrize("name", ["world", "world-sequential"])
def test_contexts_are_drawn_one_word_after_the_other(name):
    """Against the whole model, word by word and token by token, with one generator."""
    model, generator, found = pl.load(name), torch.Generator().manual_seed(7), [PLAIN]
    for word in SEEDS:
        ids = torch.tensor([plain_ids(model, word, True)[0]])
        while ids.shape[1] < 10:
            with torch.no_grad():
                logits = model.forward(ids, torch.ones_like(ids))[0, -1]
            best = logits.topk(5)
            pick = torch.multinomial(best.values.softmax(0), 1, generator=generator)
            ids = torch.cat([ids, best.indices[pick][None]], dim=1)
        found.append(model.tokenizer.decode(ids[0], skip_special_tokens=True) + ". {}")
    assert sample_contexts(model, seed=7) == found


def test_a_batch_takes_no_more_padding_than_it_may():
    lengths, budget = [3, 9, 4, 4, 3, 10], 100
    assert chunks(lengths, budget) == [[0, 4, 2, 3, 1, 5]]
    assert chunks(lengths, budget, padding=0) == [[0, 4], [2, 3], [1], [5]]
    assert chunks(lengths, budget, padding=2) == [[0, 4, 2, 3], [1, 5]]
    assert chunks(lengths, 8, padding=2) == [[0, 4], [2, 3], [1], [5]]
