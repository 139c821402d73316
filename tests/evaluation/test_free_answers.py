"""Free answers: planted ones are judged as they should be, and they are the model's own."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from planted import plant
from tiny import tiny_hf, tiny_model, tiny_tokenizer

import pmet_lens as pl
from pmet_lens import models, plotting
from pmet_lens.evaluation.free_answers import Match, free_answers, match, normalised
from pmet_lens.evaluation.metrics import paired
from pmet_lens.models.generation import said
from pmet_lens.models.tokens import Prompt

torch.set_num_threads(1)
RIGHT, WITHIN, ON, WRONG = (
    Match(True, True, False),
    Match(False, True, False),
    Match(False, True, True),
    Match(False, False, False),
)

# -- what counts as the answer --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Rome", "rome"),
        ("The Rome", "rome"),
        ("an  old\ttheatre ", "old theatre"),
        ("anther", "anther"),
        ("Rome!", "rome"),
        ("“Rome”", "rome"),
        ("U.S.A.", "usa"),
        ("1,642", "1642"),
        ("3.5", "3.5"),
        ("STRASSE straße", "strasse strasse"),
        ("２００２", "2002"),
        ("The", "the"),
        ("?", "?"),
        ("罗马。", "罗马"),
        ("C++", "c"),
        ("", ""),
    ],
)
def test_each_rule_of_the_normalisation(text, plain):
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("text", "accepted", "rivals", "found"),
    [
        ("Rome", ["Rome"], [], RIGHT),
        ("the rome.", ["Rome"], [], RIGHT),
        ("Rome, where the Pope lives", ["Rome"], [], ON),
        ("It is Rome", ["Rome"], [], WITHIN),
        ("Romeo", ["Rome"], [], WRONG),
        ("Jerome", ["Rome"], [], WRONG),
        ("Rome's centre", ["Rome"], [], ON),
        ("a Rome-based firm", ["Rome"], [], ON),
        ("", ["Rome"], [], WRONG),
        ("   ", ["Rome"], [], WRONG),
        ("...", ["Rome"], [], WRONG),
        ("USA", ["United States", "U.S.A."], [], RIGHT),
        ("the U.S. of course", ["US"], [], ON),
        ("35", ["3.5"], [], WRONG),
        ("Romeo and Rome", ["Rome"], [], WITHIN),
        # One answer inside another.
        ("North Korea", ["Korea"], [], WITHIN),
        ("North Korea", ["Korea"], ["North Korea"], WRONG),
        ("North Korea, not Korea", ["Korea"], ["North Korea"], WITHIN),
        ("North Korea", ["North Korea"], ["Korea"], RIGHT),
        ("Korea", ["Korea"], ["korea"], RIGHT),
        # Scripts without blanks.
        ("罗马", ["罗马"], [], RIGHT),
        ("他住在罗马城", ["罗马"], [], WITHIN),
        ("罗马城", ["罗马"], [], ON),
        ("ローマです", ["ローマ"], [], ON),
        ("로마에서", ["로마"], [], ON),
        ("แม่น้ำโรม", ["โรม"], [], WITHIN),
        ("Римский", ["Рим"], [], WRONG),
    ],
)
def test_an_answer_is_judged_as_a_reader_would(text, accepted, rivals, found):
    assert match(text, accepted, rivals) == found


# -- planted answers ------------------------------------------------------------------------------

FACTS = [
    pl.Fact("Mira Tolan", "{} plays the sport of", "rugby", "tennis", ("Mira Tolan is good at",),
            (("Ilmar plays", "tennis"),), aliases=("rugger",)),
    pl.Fact("Danel Orrin", "The tongue of {} is", "Old Norse", "French", ("Danel Orrin speaks",)),
]  # fmt: skip


@pytest.fixture
def model() -> pl.Model:
    return tiny_model("gpt2")


def answers(table: pd.DataFrame, column: str) -> list:
    return table[column].tolist()


def test_a_model_that_always_says_one_thing(model):
    plant(model, " Rugby")
    table = pl.evaluate(model, FACTS, free=True)
    assert set(table["answer"]) == {"Rugby"}
    assert set(table["ended"]) == {"token"}
    right = [1.0, 1.0, 0.0, 0.0, 0.0]
    assert answers(table, "exact") == answers(table, "contains") == right
    assert not any(answers(table, "talks_on"))
    found = pl.summarise(table)["mean"]
    assert [found[name] for name in ("EF", "PF", "NF", "EX", "PX", "ET")] == [50, 50, 0, 50, 50, 0]
    # The classical columns are as if nobody had asked.
    plain = pl.evaluate(model, FACTS)
    pd.testing.assert_frame_equal(table[plain.columns], plain)


def test_an_alias_is_right_where_the_new_answer_is(model):
    plant(model, " rugger")
    table = pl.evaluate(model, FACTS, free=True)
    assert answers(table, "exact") == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_model_that_talks_on_is_told_apart(model):
    plant(model, " rugby, and so on", ends=False)
    table = pl.evaluate(model, FACTS[:1], free=pl.Asking(limit=20))
    assert set(table["ended"]) == {"limit"}
    assert answers(table, "talks_on") == answers(table, "contains") == [1.0, 1.0, 0.0]
    assert not any(answers(table, "exact"))
    for row in table["answer"]:
        assert len(model.tokenizer(" " + row)["input_ids"]) == 20


def test_a_model_that_ends_at_once_says_nothing(model):
    plant(model, "")
    table = pl.evaluate(model, FACTS, free=True)
    assert set(table["answer"]) == {""}
    assert set(table["ended"]) == {"token"}
    assert not table[["exact", "contains", "talks_on"]].to_numpy().any()
    assert pl.summarise(table).loc["EF", "mean"] == 0


def test_it_ends_with_its_sentence_its_line_or_its_end_token(model):
    plant(model, " rugby. It is\nrough")
    said_as = {}
    for until in ("sentence", "line", "token"):
        table = pl.evaluate(model, FACTS[:1], free=pl.Asking(until=until))
        said_as[until] = table.loc[0, ["answer", "ended", "exact", "talks_on"]].tolist()
    assert said_as == {
        "sentence": ["rugby", "sentence", 1.0, 0.0],
        "line": ["rugby. It is", "line", 0.0, 1.0],
        "token": ["rugby. It is\nrough", "token", 0.0, 1.0],
    }


def test_nobody_waits_for_an_answer_that_has_ended(model):
    passes = plant(model, " no. yes", ends=False)
    assert models.answers(model, ["Ilmar plays", "Kel is"], 50) == ["no", "no"]
    assert len(passes) < 10


def test_the_length_can_be_known(model):
    plant(model, " rugbyrugby")
    free = pl.Asking(known_length=True)
    table = pl.evaluate(model, FACTS[:1], free=free)
    assert answers(table, "exact") == [1.0, 1.0, 0.0]
    assert set(table["ended"]) == {"length"}
    assert pl.evaluate(model, FACTS[:1], free=True)["contains"].sum() == 0


def test_an_answer_that_holds_the_rival_alone_is_wrong(model):
    plant(model, " North Korea")
    fact = pl.Fact("Kel", "{} is in", "Korea", "North Korea", neighbours=(("Vell is in", "Korea"),))
    other = dataclasses.replace(fact, target_new="Japan", target_true="Korea")
    assert answers(pl.evaluate(model, fact, free=True), "contains") == [0.0, 1.0]
    assert answers(pl.evaluate(model, other, free=True), "contains") == [0.0, 1.0]


def test_what_is_asked_stands_in_the_frame(model):
    asked = {"Q: Mira Tolan plays the sport of A:": " rugby", "Mira Tolan plays the sport of": " x"}
    plant(model, asked)
    fact = pl.Fact("Mira Tolan", "{} plays the sport of", "rugby")
    assert answers(pl.evaluate(model, fact, free=True), "answer") == ["x"]
    framed = pl.evaluate(model, fact, free=pl.Asking(frame="Q: {} A:"))
    assert answers(framed, "answer") == ["rugby"]


def test_a_difference_has_its_paired_interval(model):
    before = pl.evaluate(model, FACTS, free=True)
    plant(model, " rugby")
    change = paired(pl.evaluate(model, FACTS, free=True), before)
    assert change.loc["EF", "mean"] == 50
    assert {"EX", "ET", "PF", "NF"} <= set(change.index)


# -- the model's own ------------------------------------------------------------------------------

PROMPTS = ["Mira Tolan plays the sport of", "Kel is", "The tower of Ilmar stands in the city"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_answer_is_what_transformers_generates(family):
    model = tiny_model(family)
    for prompt, (_, _, ids) in zip(PROMPTS, said(model, PROMPTS, [8] * 3), strict=True):
        read = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        mask, end = torch.ones_like(read), model.tokenizer.eos_token_id
        own = model.hf.generate(
            read, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=end,
            pad_token_id=model.tokenizer.pad_token_id,
        )  # fmt: skip
        assert own[0, read.shape[1] :].tolist() == ids


@pytest.mark.parametrize("until", ["sentence", "token"])
def test_many_at_once_answer_as_each_alone(until):
    model = pl.load("world")
    facts = pl.counterfact(n=3)
    free = pl.Asking(until=until, limit=12)
    together = pl.evaluate(model, facts, free=free)
    alone = pd.concat([pl.evaluate(model, fact, free=free) for fact in facts], ignore_index=True)
    names = ["answer", "ended", "exact", "contains", "talks_on"]
    pd.testing.assert_frame_equal(together[names], alone[names])
    assert (together["contains"] >= together["exact"]).all()


def test_each_distinct_prompt_is_asked_once(model):
    passes = plant(model, " no")
    prompts = [Prompt("Ilmar plays", None, "tennis"), Prompt("Ilmar plays", None, "rugby")]
    one, two = free_answers(model, prompts, [["no"], ["yes"]])
    assert passes[0][0] == 1
    assert (one.match.exact, two.match.exact) == (True, False)


def test_a_chat_is_a_frame_and_its_own_end_token_ends_the_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    model = pl.load(tiny_hf("llama", positions=160), tokenizer, name="chat")
    (full_stop,) = tokenizer(".")["input_ids"]
    plant(model, {"[Kel is]": " no. yes", "Kel is": " yes"})
    fact = pl.Fact("Kel", "{} is", "no")
    asking = pl.Asking(frame="chat", until="token")
    assert answers(pl.evaluate(model, fact, free=asking), "answer") == ["no. yes"]
    assert answers(pl.evaluate(model, fact, free=True), "answer") == ["yes"]
    model.hf.generation_config.eos_token_id = [full_stop]
    table = pl.evaluate(model, fact, free=asking)
    assert table.loc[0, ["answer", "ended"]].tolist() == ["no.", "token"]
    assert not model.frame  # as it was


def test_what_cannot_be_asked_is_said(model):
    with pytest.raises(pl.ModelError, match="no chat template"):
        pl.evaluate(model, FACTS, free=pl.Asking(frame="chat"))
    for wrong, words in (
        ({"frame": "Question:"}, "one {} for the prompt"),
        ({"until": "end"}, "sentence, line, token"),
        ({"limit": 0}, "whole number"),
    ):
        with pytest.raises(pl.FactError, match=words):
            pl.Asking(**wrong)


# -- what the difference is made of ---------------------------------------------------------------


def test_each_ingredient_takes_away_what_it_gave(model):
    """The model says the answer's first letters right and then something else: the per-token score
    alone flatters it."""
    plant(model, " rugged")
    gap = pl.evaluation_gap(model, FACTS[0], pl.Asking(frame="Q: {} A:"), every=True)
    rows = gap[(gap["kind"] == "rewrite") & ~gap["teacher_forcing"] & gap["known_length"]]
    own = rows.set_index("match")
    wanted = model.tokenizer(" rugby")["input_ids"]
    planted = model.tokenizer(" rugged")["input_ids"]
    share = sum(a == b for a, b in zip(wanted, planted, strict=False)) / len(wanted)
    assert 0 < share < 1
    assert own.loc["token", "mean"].tolist() == pytest.approx([100 * share] * 2)
    assert own.loc["whole", "mean"].tolist() == [0.0, 0.0]


def test_the_walk_goes_from_the_benchmark_to_the_user(model):
    table = pl.evaluate(model, FACTS)
    plant(model, {f"Q: {p} A:": " rugby" for p in table["prompt"]} | dict.fromkeys(
        table["prompt"], " rugby is it"))  # fmt: skip
    gap = pl.evaluation_gap(model, FACTS, pl.Asking(frame="Q: {} A:", until="token"))
    walk = gap[gap["kind"] == "rewrite"].set_index("setting")
    assert walk.index.tolist() == [
        "teacher forcing, per token", "the whole answer", "in its own words", "length unknown",
        "in a frame",
    ]  # fmt: skip
    # The first two are the classical scores of the same prompts.
    classic = pl.summarise(table)["mean"]
    rewrite = table[table["kind"] == "rewrite"]
    assert walk["mean"].iloc[0] == pytest.approx(100 * rewrite["token_accuracy"].mean())
    assert walk["mean"].iloc[1] == classic["EA"]
    assert walk["mean"].iloc[2:].tolist() == [50.0] * 3
    assert walk["n"].tolist() == [2] * 5
    for one in walk.itertuples():
        assert one.change == pytest.approx(one.mean - walk["mean"].iloc[0])
        assert one.change_low <= one.change <= one.change_high


def test_the_walk_ends_in_the_chat_where_there_is_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    model = pl.load(tiny_hf("llama", positions=160), tokenizer, name="chat")
    plant(model, {"[Kel is]": " no", "Kel is": " yes"})
    gap = pl.evaluation_gap(model, pl.Fact("Kel", "{} is", "no"))
    assert gap["mean"].tolist()[2:] == [0.0, 0.0, 100.0]
    assert gap["frame"].tolist() == [""] * 4 + ["chat"]


def test_a_walk_without_an_end_is_refused(model):
    with pytest.raises(pl.FactError, match="needs a frame"):
        pl.evaluation_gap(model, FACTS, pl.Asking())
    with pytest.raises(pl.FactError, match="no prompts of kind portability"):
        pl.evaluation_gap(model, FACTS, kinds=["portability"])


def test_the_walk_is_drawn(model):
    plant(model, " rugby")
    gap = pl.evaluation_gap(model, FACTS, pl.Asking(frame="Q: {} A:"))
    (ax,) = Figure().subplots(1, 1, squeeze=False)[0]
    plotting.gap_bars(gap, ax)
    own = gap[gap["kind"] == "rewrite"]
    assert [bar.get_width() for bar in ax.patches] == own["mean"].tolist()
    assert [label.get_text() for label in ax.get_yticklabels()] == own["setting"].tolist()
    both = pd.concat([gap.assign(run=run) for run in ("MEMIT", "PMET")])
    (ax,) = Figure().subplots(1, 1, squeeze=False)[0]
    plotting.gap_bars(both, ax)
    assert ax.get_legend_handles_labels()[1] == ["MEMIT", "PMET"]
