"""The table says what the plain model says, prompt by prompt, the summary what the table says."""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from kept import shared_model
from tiny import FAMILIES, tiny_batch, tiny_model

import pmet_lens as pl
from pmet_lens.data import world
from pmet_lens.evaluation import metrics
from pmet_lens.evaluation.scoring import (
    ask,
    evaluate,
    generate,
    generate_batch,
    recall,
    score,
    summarise,
)
from pmet_lens.models.model import Model
from pmet_lens.models.tokens import Prompt

torch.set_num_threads(1)
FACTS = [
    pl.Fact(
        "Mira Tolan",
        "{} plays the sport of",
        "rugby",
        "tennis",
        paraphrases=("Fine weather. Mira Tolan competes in", "The sport of Mira Tolan is"),
        neighbours=(("Ilmar plays", "tennis"), ("Vell plays", "tennis"), ("Kel is", "in Ostria")),
        relation="P641",
        case_id=20952,
    ),
    pl.Fact(
        "Danel Orrin",
        "The mother tongue of {} is",
        "Old Norse",
        "French",
        paraphrases=("Danel Orrin speaks",),
        neighbours=(("The mother tongue of Kel is", "French"),),
    ),
    pl.Fact("Ilmar", "The tower of {} stands in", "Ostria"),
    pl.Fact(
        "Kel", "{} is the capital of", target_true="Ostria", neighbours=(("Vell is", "in Kel"),)
    ),
]


@pytest.fixture(scope="module", params=["gpt2", "gptj", "llama"])
def model(request) -> Model:
    return shared_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return shared_model("gpt2")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Intervals are tested with the metrics; here they only have to be there."""
    monkeypatch.setattr(
        "pmet_lens.evaluation.intervals.bootstrap", partial(metrics.bootstrap, n_resamples=100)
    )


@pytest.fixture(scope="module")
def rows(gpt2) -> pd.DataFrame:
    return evaluate(gpt2, FACTS)


def naive(model: Model, prompt: str, target: str) -> tuple[float, float]:
    """Mean −log P and share of arg-max tokens, one text at a time, on the user's own model."""
    read = model.tokenizer(prompt)["input_ids"]
    answer = model.tokenizer(f"{prompt} {target}")["input_ids"][len(read) :]
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([read + answer])).logits[0]
    logits = logits[len(read) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    right = (logits.argmax(-1) == torch.tensor(answer)).double().mean()
    return float(nll), float(right)


# -- the table ------------------------------------------------------------------------------------


def test_every_row_is_what_the_plain_model_says(model):
    for row in evaluate(model, FACTS).itertuples():
        nll, right = naive(model, row.prompt, row.wanted)
        assert row.nll_wanted == pytest.approx(nll, abs=1e-5)
        assert row.token_accuracy == right
        assert row.correct == (right == 1)
        if pd.isna(row.other):
            assert all(map(math.isnan, (row.nll_other, row.margin, row.success)))
            continue
        rival = naive(model, row.prompt, row.other)[0]
        assert row.nll_other == pytest.approx(rival, abs=1e-5)
        assert row.margin == pytest.approx(math.exp(-nll) - math.exp(-rival), abs=1e-6)
        assert row.success == (nll < rival)


def test_there_is_a_row_for_every_prompt_with_the_answers_that_count(rows):
    told = rows[["fact", "kind", "index", "prompt", "wanted", "other"]].astype(object)
    told = [tuple(row) for row in told.where(told.notna(), None).to_numpy()]
    one, two, three, four = FACTS
    assert told == [
        (0, "rewrite", 0, "Mira Tolan plays the sport of", "rugby", "tennis"),
        (0, "paraphrase", 0, one.paraphrases[0], "rugby", "tennis"),
        (0, "paraphrase", 1, one.paraphrases[1], "rugby", "tennis"),
        (0, "neighbour", 0, "Ilmar plays", "tennis", "rugby"),
        (0, "neighbour", 1, "Vell plays", "tennis", "rugby"),
        # The edited answer is a rival only where the same question is asked.
        (0, "neighbour", 2, "Kel is", "in Ostria", None),
        (1, "rewrite", 0, "The mother tongue of Danel Orrin is", "Old Norse", "French"),
        (1, "paraphrase", 0, two.paraphrases[0], "Old Norse", "French"),
        (1, "neighbour", 0, "The mother tongue of Kel is", "French", "Old Norse"),
        (2, "rewrite", 0, three.text, "Ostria", None),
        (3, "rewrite", 0, four.text, "Ostria", None),
        (3, "neighbour", 0, "Vell is", "in Kel", None),
    ]
    assert list(rows["case_id"].dropna().unique()) == [20952]
    assert list(rows["relation"].dropna().unique()) == ["P641"]
    assert rows.index.is_unique


def planted(answers: dict[str, str]) -> Model:
    """A model of which every prompt's next token is known: logits are a table, not computed."""
    model = tiny_model("gpt2")
    ids = {p: model.tokenizer(f"{p} {a}")["input_ids"] for p, a in answers.items()}

    def forward(input_ids, attention_mask, *, at=None, **_):
        logits = torch.zeros(*input_ids.shape, 320)
        for row, mask, out in zip(input_ids, attention_mask, logits, strict=True):
            text = row[mask.bool()].tolist()
            for known in ids.values():
                for n in range(1, len(known)):
                    if text[:n] == known[:n] and n <= len(text):
                        out[n - 1, known[n]] = 10.0
        return logits if at is None else logits[at[:, 0], at[:, 1]]

    model.forward = forward
    model.logits_at = lambda ids, mask, at: forward(ids, mask, at=at)
    return model


def test_a_planted_answer_is_found():
    """ES asks which answer is likelier, EA whether it is said: one token wrong is not said."""
    prompts = [fact.text for fact in FACTS[:2]]
    says = planted({prompts[0]: "rugby", prompts[1]: "Old Nort"})
    table = evaluate(says, FACTS[:2]).query("kind == 'rewrite'").set_index("fact")
    assert table["success"].tolist() == [1, 1]
    assert table["correct"].tolist() == [1, 0]
    assert table.loc[0, "token_accuracy"] == 1
    assert 0 < table.loc[1, "token_accuracy"] < 1
    assert table.loc[0, "margin"] > 0.9


def test_recall_is_whether_the_true_answer_is_said():
    facts = [FACTS[0], FACTS[1], FACTS[3]]
    model = planted({facts[0].text: "tennis", facts[1].text: "Fren", facts[2].text: "Ostria"})
    table = recall(model, facts)
    assert table["correct"].tolist() == [1, 0, 1]
    assert table["subject"].tolist() == ["Mira Tolan", "Danel Orrin", "Kel"]
    assert table["fact"].tolist() == [0, 1, 2]
    with pytest.warns(UserWarning, match="target_true"):
        assert recall(model, FACTS)["fact"].tolist() == [0, 1, 3]


def test_there_must_be_facts(gpt2):
    with pytest.raises(pl.FactError, match="no facts to evaluate; pass at least one"):
        evaluate(gpt2, [])


# -- scoring --------------------------------------------------------------------------------------

PROMPTS = [
    Prompt("Kel is", None, "open"),
    Prompt("Kel is", None, "shut"),
    Prompt("{} is", "Kel", "open"),  # the same text
    Prompt("The tower of Ilmar stands in the harbour city of", None, "Vell"),
    Prompt("Kel is", None, "open"),
]


def test_every_distinct_prompt_is_run_once(gpt2, monkeypatch):
    ran = []
    real = Model.logits_at

    def spy(self, input_ids, attention_mask, at):
        ran.extend(
            tuple(ids[m.bool()].tolist()) for ids, m in zip(input_ids, attention_mask, strict=True)
        )
        return real(self, input_ids, attention_mask, at)

    monkeypatch.setattr(Model, "logits_at", spy)
    scores = score(gpt2, PROMPTS)
    assert len(ran) == len(set(ran)) == 3
    assert scores[0] == scores[2] == scores[4]
    assert scores[0] != scores[1]


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_the_batches_do_not_matter(gpt2, batch_tokens):
    scores = score(gpt2, PROMPTS, batch_tokens=batch_tokens)
    for prompt, found in zip(PROMPTS, scores, strict=True):
        nll, right = naive(gpt2, prompt.text, prompt.target)
        assert found.nll == pytest.approx(nll, abs=1e-5)
        assert found.right == right


@pytest.fixture(scope="module")
def exact() -> Model:
    model = tiny_model("gpt2", torch.float64)
    model.from_layer(0)  # made now, so that no test counts the rows it is tried with
    return model


@pytest.fixture
def forward_rows(monkeypatch) -> list[int]:
    """The number of rows of every forward pass that scores or continues prompts."""
    ran: list[int] = []
    for name in ("forward", "logits_at"):
        real = getattr(Model, name)

        def spy(self, input_ids, *more, real=real, **named):
            ran.append(len(input_ids))
            return real(self, input_ids, *more, **named)

        monkeypatch.setattr(Model, name, spy)
    return ran


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_the_wrapper_are_those_with_it(family):
    """The last MLP runs for the asked tokens alone; in float64 families that compute norms in
    float32 keep the wrapper."""
    model = tiny_model(family, torch.float64)
    ids, mask = tiny_batch()
    at = torch.tensor([[1, 7], [0, 9], [0, 3], [1, 0]])
    got = model.logits_at(ids, mask, at)
    assert not got.requires_grad
    with torch.no_grad():
        wanted = model.forward(ids, mask, at=at)
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert not torch.allclose(got[0], got[1])


def answers(model: Model, n_tokens: int) -> list[str]:
    """Answers of so many tokens behind a space."""
    pieces = model.tokenizer.decode
    single = [pieces([i])[1:] for i in range(320) if pieces([i])[:1] == " "]
    single = [word for word in single if word.isalpha()]
    found = [" ".join(single[i : i + n_tokens]) for i in range(len(single) - n_tokens)]
    read = model.tokenizer
    return [
        a
        for a in found
        if len(read(f"Kel {a}")["input_ids"]) - len(read("Kel")["input_ids"]) == n_tokens
    ]


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        (1, 1, 1),  # nothing of either answer is read
        (1, 2, 1),  # the row of the longer one begins with that of the shorter
        (2, 2, 2),  # their first tokens differ, and are read
    ],
)
def test_answers_that_read_the_same_tokens_share_a_row(exact, forward_rows, one, other, rows):
    words = {n: answers(exact, n) for n in (1, 2)}
    a, b = words[one][0], words[other][-1]
    assert a.split()[0] != b.split()[0]
    texts = ["Kel is", "The tower of Ilmar stands in the harbour city of"]
    prompts = [Prompt(text, None, answer) for text in texts for answer in (a, b)]
    together = score(exact, prompts)
    assert sum(forward_rows) == rows * len(texts)
    forward_rows.clear()
    alone = [score(exact, [prompt])[0] for prompt in prompts]
    assert sum(forward_rows) == len(prompts)
    assert len({s.nll for s in alone}) == len(prompts)
    for now, then, prompt in zip(together, alone, prompts, strict=True):
        assert now.nll == pytest.approx(then.nll, abs=1e-12)
        assert now.right == then.right
        assert now.nll == pytest.approx(naive(exact, prompt.text, prompt.target)[0], abs=1e-6)


def test_two_answers_with_one_beginning_share_a_row(exact, forward_rows):
    first, second = answers(exact, 2)[0].split()
    third = next(w for w in answers(exact, 1) if w not in (first, second))
    prompts = [Prompt("Kel is", None, f"{first} {last}") for last in (second, third)]
    found = score(exact, prompts)
    assert forward_rows == [1]
    assert [s.nll for s in found] == pytest.approx(
        [score(exact, [p])[0].nll for p in prompts], abs=1e-12
    )


def test_a_whole_table_is_the_same_however_rows_are_shared(exact, forward_rows, monkeypatch):
    wanted, rival, *_ = answers(exact, 1)
    fact = pl.Fact(
        "Kel", "{} is", wanted, rival, paraphrases=("Vell is",), neighbours=(("Ilmar is", rival),)
    )
    together = evaluate(exact, [fact, FACTS[1]])
    shared = sum(forward_rows)
    forward_rows.clear()
    scored = score
    monkeypatch.setattr(
        "pmet_lens.evaluation.scoring.score",
        lambda model, prompts, **more: [scored(model, [p])[0] for p in prompts],
    )
    alone = evaluate(exact, [fact, FACTS[1]])
    pd.testing.assert_frame_equal(together, alone, rtol=0, atol=1e-12)
    assert sum(forward_rows) == 2 * len(alone)
    assert shared <= sum(forward_rows) - 3  # one row for each prompt of the first fact


def test_numbers_do_not_depend_on_how_many_prompts_are_read_at_once(gpt2, monkeypatch):
    whole = score(gpt2, PROMPTS)
    monkeypatch.setattr("pmet_lens.evaluation.teacher_forcing._AT_ONCE", 1)
    for one, two in zip(score(gpt2, PROMPTS), whole, strict=True):
        assert one.nll == pytest.approx(two.nll, abs=1e-5)


def test_progress_is_told(gpt2):
    told = []
    score(gpt2, PROMPTS, batch_tokens=1, on_prompts=lambda *now: told.append(now))
    assert told == [(1, 3), (2, 3), (3, 3)]


# -- the summary ----------------------------------------------------------------------------------


def table(**columns) -> pd.DataFrame:
    """(fact, kind, success, correct, margin) per row."""
    names = ["fact", "kind", "success", "correct", "margin"]
    return pd.DataFrame(columns["rows"], columns=names)


HAND = [
    (0, "rewrite", 1.0, 1.0, 0.5),
    (0, "paraphrase", 1.0, 0.0, 0.1),
    (0, "paraphrase", 0.0, 0.0, -0.1),
    (0, "neighbour", 1.0, 1.0, 0.2),
    (1, "rewrite", 1.0, 0.0, 0.3),
    (1, "paraphrase", 1.0, 1.0, 0.3),
    (1, "neighbour", 1.0, 1.0, 0.4),
    (1, "neighbour", 0.0, 0.0, -0.4),
    (1, "neighbour", 0.0, 0.0, -0.4),
    (1, "neighbour", 0.0, 0.0, -0.4),
]


def test_the_summary_by_hand():
    """Per fact first, then over facts; in per cent."""
    found = summarise(table(rows=HAND))
    want = {"ES": 100, "PS": 75, "NS": 62.5, "EA": 50, "PA": 50, "NA": 62.5}
    want |= {"EM": 40, "PM": 15, "NM": 0, "S": 3 / (1 / 100 + 1 / 75 + 1 / 62.5)}
    assert found.index.name == "metric"
    assert list(found.index) == ["S", "ES", "PS", "NS", "EA", "PA", "NA", "EM", "PM", "NM"]
    assert list(found.columns) == ["mean", "ci_low", "ci_high", "n"]
    assert found["mean"].to_dict() == pytest.approx(want, abs=1e-9)
    assert set(found["n"]) == {2}
    assert (found["ci_low"] <= found["mean"]).all()
    assert (found["mean"] <= found["ci_high"]).all()
    assert found.loc["ES", ["ci_low", "ci_high"]].tolist() == [100, 100]
    assert found.loc["PS", ["ci_low", "ci_high"]].tolist() == [50, 100]


def test_the_number_of_prompts_of_a_fact_gives_it_no_weight():
    more = HAND + [HAND[1]] * 20 + [HAND[2]] * 20
    assert summarise(table(rows=more)).equals(summarise(table(rows=HAND)))


def test_only_what_was_measured_is_summarised():
    without = [row for row in HAND if row[1] != "neighbour"]
    assert list(summarise(table(rows=without)).index) == ["ES", "PS", "EA", "PA", "EM", "PM"]
    no_rival = [(f, k, np.nan, c, np.nan) for f, k, _, c, _ in HAND]
    assert list(summarise(table(rows=no_rival)).index) == ["EA", "PA", "NA"]


def test_facts_without_a_rival_count_where_they_have_one(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarise(rows)
    names = ("S", "ES", "PS", "NS", "EA", "PA", "NA", "EM", "PM", "NM")
    assert found["n"].to_dict() == dict(zip(names, (2, 2, 2, 2, 4, 2, 3, 2, 2, 2), strict=True))
    assert not found.isna().any(axis=None)
    accuracy = rows.query("kind == 'rewrite'")["correct"].mean()
    assert found.loc["EA", "mean"] == pytest.approx(100 * accuracy)


def test_a_score_of_facts_of_which_some_lack_neighbours_has_an_interval():
    rows = [row for row in HAND if row[:2] != (0, "neighbour")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summarise(table(rows=rows))
    assert found["n"].to_dict()["NS"] == 1
    assert not found.isna().any(axis=None)
    assert found.loc["S", "mean"] == pytest.approx(3 / (1 / 100 + 1 / 75 + 1 / 25))


# -- zsRE -----------------------------------------------------------------------------------------

ZSRE = [
    pl.Fact(
        "Kel",
        "Where is {}?",
        "Old Norse",
        paraphrases=("In which land lies Kel?",),
        neighbours=(("nq question: who sang it?", "Tina"),),
        benchmark="zsre",
    ),
    pl.Fact("Vell", "Where is {}?", "open", benchmark="zsre"),
]


def zsre_table(rows: list[tuple[int, str, float]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["fact", "kind", "token_accuracy"])
    return frame.assign(correct=(frame["token_accuracy"] == 1).astype(float), benchmark="zsre")


def test_the_zsre_summary_by_hand():
    """Shares of tokens, per fact first; the whole answer counts for EA, PA and NA alone."""
    rows = [(0, "rewrite", 1.0), (0, "paraphrase", 0.5), (0, "neighbour", 0.0)]
    rows += [(1, "rewrite", 0.5), (1, "paraphrase", 0.25), (1, "neighbour", 0.5)]
    rows += [(1, "paraphrase", 0.75)]
    found = summarise(zsre_table(rows))
    want = {"efficacy": 75, "paraphrase": 50, "specificity": 25, "EA": 50, "PA": 0, "NA": 0}
    want["score"] = 3 / (1 / 75 + 1 / 50 + 1 / 25)
    assert found["mean"].to_dict() == pytest.approx(want, abs=1e-9)
    order = ["EA", "PA", "NA", "score", "efficacy", "paraphrase", "specificity"]
    assert list(found.index) == order
    assert set(found["n"]) == {2}
    assert found.loc["efficacy", ["ci_low", "ci_high"]].tolist() == [50, 100]
    assert (found["ci_low"] <= found["mean"]).all()
    assert (found["mean"] <= found["ci_high"]).all()


def test_zsre_scores_are_those_of_zsre_facts_alone(gpt2, rows):
    """In a mixed list each family is told of the facts it belongs to, and CounterFact's is as
    it would be without the others, but for the accuracies all facts have."""
    mixed = evaluate(gpt2, [*FACTS, *ZSRE])
    assert "benchmark" not in rows
    pd.testing.assert_frame_equal(mixed[: len(rows)].drop(columns="benchmark"), rows, atol=1e-6)
    assert mixed["benchmark"].fillna("").tolist() == [""] * len(rows) + ["zsre"] * 4
    found, plain = summarise(mixed), summarise(rows)
    only = summarise(evaluate(gpt2, ZSRE))
    names = ["score", "efficacy", "paraphrase", "specificity"]
    assert not set(names) & set(plain.index)
    success = ["S", "ES", "PS", "NS", "EM", "PM", "NM"]
    assert not set(success) & set(only.index)
    assert found.loc[success].to_numpy() == pytest.approx(plain.loc[success].to_numpy(), abs=1e-4)
    assert found.loc[names].equals(only.loc[names])
    assert found.loc["efficacy", "n"] == 2
    assert found.loc["specificity", "n"] == 1
    assert found.loc["EA", "n"] == 6


def test_zsre_rows_hold_the_share_of_right_tokens():
    """The planted model says the first token of the answer to the question and all of the other."""
    fact = ZSRE[0]
    locality = fact.neighbours[0][0]
    says = planted({fact.text: "Old Nort", locality: "Tina"})
    table = evaluate(says, ZSRE[:1]).set_index("kind")
    assert 0 < table.loc["rewrite", "token_accuracy"] < 1
    assert table.loc["rewrite", "correct"] == 0
    assert table.loc["neighbour", ["prompt", "wanted"]].tolist() == [locality, "Tina"]
    assert table.loc["neighbour", "token_accuracy"] == 1
    found = summarise(table.reset_index())["mean"]
    assert found["specificity"] == 100
    assert found["efficacy"] == 100 * table.loc["rewrite", "token_accuracy"]


# -- text -----------------------------------------------------------------------------------------


def greedy(model: Model, prompt: str, length: int) -> str:
    ids = model.tokenizer(prompt)["input_ids"]
    while len(ids) < length:
        with torch.no_grad():
            ids.append(int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_likeliest_continuation_is_that_of_the_plain_model(model):
    assert generate(model, "Mira Tolan", length=20, top_k=1) == greedy(model, "Mira Tolan", 20)


def test_generations_follow_from_their_seed(gpt2):
    once = generate(gpt2, "Kel", length=15, seed=1)
    torch.manual_seed(5)
    assert generate(gpt2, "Kel", length=15, seed=1) == once
    assert generate(gpt2, "Kel", length=15, seed=2) != once
    assert once.startswith("Kel")


def test_generation_ends_with_the_text_and_with_the_model():
    model = tiny_model("gpt2")
    asked: list[int] = []
    end = model.tokenizer.eos_token_id

    def spy(_, __, out):
        asked.append(asked[-1] + 1 if asked else first)
        out.logits[..., end] = 1e9 if asked[-1] in stops else -1e9
        return out

    model.speaker.register_forward_hook(spy)
    first = len(model.tokenizer("Kel")["input_ids"])
    stops: set[int] = set()
    for length, stop, last in ((12, 0, 11), (12, 7, 7), (1000, 0, model.n_positions - 1)):
        asked.clear()
        stops.clear()
        stops.add(stop)
        text = generate(model, "Kel", length=length)
        assert asked == list(range(first, last + 1))
        assert "<|endoftext|>" not in text


PROMPTED = ["Kel", "The tower of Ilmar stands in", "Mira", "Kel"]


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_a_text_does_not_depend_on_its_batch(exact, batch_tokens):
    alone = [generate(exact, p, length=15, seed=s) for s, p in enumerate(PROMPTED)]
    batch = generate_batch(exact, PROMPTED, range(4), 15, batch_tokens=batch_tokens)
    assert batch == alone
    assert batch[0] != batch[3]  # one prompt, two seeds
    back = generate_batch(exact, PROMPTED[::-1], range(4)[::-1], 15, batch_tokens=batch_tokens)
    assert back == alone[::-1]


def test_prompts_are_continued_together(gpt2):
    read = [len(gpt2.tokenizer(p)["input_ids"]) for p in PROMPTED]
    rows: list[int] = []
    spy = gpt2.speaker.register_forward_hook(lambda _, __, out: rows.append(len(out.logits)))
    generate_batch(gpt2, PROMPTED, [0] * 4, length=max(read) + 2, top_k=1)
    spy.remove()
    assert max(rows) == 4
    assert len(rows) == max(read) + 2 - min(read)  # one pass per token of the longest run
    told = []
    size = 2 * (max(read) + 2)
    generate_batch(
        gpt2,
        PROMPTED,
        [0] * 4,
        length=max(read) + 2,
        batch_tokens=size,
        on_prompts=lambda *now: told.append(now),
    )
    assert told == [(2, 4), (4, 4)]
    assert generate_batch(gpt2, [], []) == []


def test_a_text_that_ended_is_not_continued_while_others_are():
    model = tiny_model("gpt2")
    end = model.tokenizer.eos_token_id
    ends = torch.tensor(model.tokenizer("Kel")["input_ids"])

    def spy(_, __, asked, out):
        ids = asked["input_ids"]
        out.logits[..., end] = -1e9
        if ids.shape[1] >= len(ends):  # the prompts, padded on the left
            out.logits[(ids[:, -len(ends) :] == ends).all(1), :, end] = 1e9
        return out

    model.speaker.register_forward_hook(spy, with_kwargs=True)
    one, other = generate_batch(model, ["Kel", "Mira Tolan"], [0, 0], length=20)
    assert one == "Kel"
    assert len(model.tokenizer(other)["input_ids"]) > 10


def test_generation_needs_an_end_and_a_beginning(gpt2):
    endless = tiny_model("gpt2")
    endless.tokenizer.eos_token = None
    wordy = pl.Fact("Kel", "{} is", "open", generation=("Kel",))
    for run in (
        lambda: generate(endless, "Kel"),
        lambda: generate_batch(endless, ["Kel"], [0]),
        lambda: evaluate(endless, [wordy], generate=True),
    ):
        with pytest.raises(pl.ModelError, match=r"'gpt2' has no end-of-text token.*set tokenizer"):
            run()
    assert len(evaluate(endless, [wordy])) == 1  # nothing is generated here
    with pytest.raises(pl.FactError, match="prompt '' has no token to continue"):
        generate(gpt2, "")


@pytest.fixture
def parrot(monkeypatch):
    """Generations that only repeat prompt and seed."""

    def say(model, prompts, seeds, **_):
        return [f"{p} a b c {s}" for p, s in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr("pmet_lens.evaluation.scoring.generate_batch", say)


@pytest.mark.usefixtures("parrot")
def test_generation_prompts_are_rows_of_their_own(gpt2):
    wordy = pl.Fact("Kel", "{} is", "open", generation=("Kel", "In Kel"))
    rows = evaluate(gpt2, [FACTS[1], wordy], generate=True)
    own = rows[rows["kind"] == "generation"]
    assert own["text"].tolist() == ["Kel a b c 0", "In Kel a b c 1"]
    assert own["fact"].tolist() == [1, 1]
    words = [metrics.fluency([text]) for text in own["text"]]
    assert own["fluency"].tolist() == words
    assert rows.index.is_unique
    found = summarise(rows)
    assert found.loc["GE", "mean"] == pytest.approx(np.mean(words))
    # Nobody told what texts about the new answer are like.
    assert "consistency" not in rows
    assert "RS" not in found.index
    silent = evaluate(gpt2, FACTS[1:2], generate=True)
    assert "GE" not in summarise(silent).index


@pytest.mark.usefixtures("parrot")
def test_consistency_compares_all_texts_of_a_fact_with_its_references(gpt2):
    first = pl.Fact("Kel", "{} is", "open", "shut", generation=("Kel", "In Kel"), relation="P1")
    second = pl.Fact("Vell", "{} is", "open", generation=("Vell",), relation="P2")
    known = {("P1", "open"): ["Kel is open", "so is Vell"], ("P2", "shut"): ["Not asked"]}
    rows = evaluate(gpt2, [first, second], generate=True, references=known)
    own = rows[rows["kind"] == "generation"]
    told = own.loc[own["fact"] == 0, "text"].tolist()
    rs = metrics.consistency(told, known["P1", "open"])
    assert 0 < rs < 100
    assert own["consistency"].tolist()[:2] == [rs, rs]
    assert math.isnan(own["consistency"].tolist()[2])  # no texts for (P2, open)
    found = summarise(rows)
    assert found.loc["RS", ["mean", "n"]].tolist() == [pytest.approx(rs), 1]
    assert found.loc["GE", "n"] == 2


@pytest.mark.usefixtures("parrot")
def test_the_bundled_world_brings_its_own_references(gpt2):
    fact = dataclasses.replace(pl.counterfact(n=1)[0], paraphrases=(), neighbours=())
    stranger = dataclasses.replace(fact, subject="Kel")
    rows = evaluate(gpt2, [fact, stranger], generate=True)
    own = rows[rows["kind"] == "generation"].set_index("fact")
    texts = world.build().references(fact.relation, fact.target_new)
    rs = metrics.consistency(own.loc[0, "text"].tolist(), texts)
    assert own.loc[0, "consistency"].tolist() == pytest.approx([rs] * len(fact.generation))
    assert own.loc[1, "consistency"].isna().all()
    none = evaluate(gpt2, [fact], generate=True, references={})
    assert "consistency" not in none


def test_ask_tells_the_likeliest_next_tokens(model):
    prompts = ["Mira Tolan plays", "Kel"]
    found = ask(model, prompts, k=3)
    assert found["prompt"].tolist() == [p for p in prompts for _ in range(3)]
    assert found["rank"].tolist() == [1, 2, 3] * 2
    for prompt, own in found.groupby("prompt"):
        ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            best = model.hf(input_ids=ids).logits[0, -1].softmax(-1).topk(3)
        assert own["probability"].tolist() == pytest.approx(best.values.tolist(), abs=1e-6)
        assert own["token"].tolist() == [model.tokenizer.decode([t]) for t in best.indices]
    assert ask(model, "Kel", k=3).equals(ask(model, ["Kel"], k=3))


# -- generation is transformers' own --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_text_is_that_of_transformers_with_an_edit_on(family):
    """Against `generate` of the user's own model, whose generation settings must not get in."""
    model = tiny_model(family)
    model.hf.generation_config.update(repetition_penalty=9.0, min_length=40, do_sample=True)
    with torch.no_grad():
        model.weight(pl.Site(1, "mlp")).mul_(1.5)  # as an edit does, after the model was copied
    prompts = ["The tower of", "Mira Tolan plays the sport of tennis; her", "Ostria"]
    texts = pl.generate_batch(model, prompts, [0, 0, 0], length=24, top_k=1)
    plain = type(model.hf.generation_config)(do_sample=False, eos_token_id=0, pad_token_id=1)
    model.hf.generation_config = plain
    for prompt, text in zip(prompts, texts, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")
        out = model.hf.generate(**ids, max_length=24)
        assert text == model.tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.few("dtype1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_text_does_not_depend_on_the_batch_in_any_dtype(dtype):
    """Windows shorter than the padding among them: there padded queries are NaN in float64."""
    for family in ("gemma2", "gemma3", "llama"):
        model = shared_model(family, dtype)
        prompts = ["Ostria", "the capital of Ostria is Kel, and the tower of Ilmar stands in Vell"]
        together = pl.generate_batch(model, prompts, [3, 4], length=40)
        alone = [pl.generate(model, p, 40, seed=s) for p, s in zip(prompts, (3, 4), strict=True)]
        assert together == alone


def test_a_text_follows_from_its_seed():
    model = shared_model("llama")
    texts = pl.generate_batch(model, ["Ostria"] * 3, [1, 2, 1], length=30, top_k=50)
    assert texts[0] == texts[2] != texts[1]
    assert pl.generate(model, "Ostria", 30, top_k=10**6, seed=1)  # more than there are


@pytest.mark.parametrize(
    ("prompts", "seeds", "top_k", "words"),
    [
        ("Kel is", [0], 1, "prompts and seeds are lists; for one prompt call generate"),
        (["Kel is", "Vell is"], [0], 1, "2 prompts need as many seeds, not 1"),
        (["Kel is"], [0], 0, "top_k at least 1, not 0"),
    ],
)
def test_what_cannot_be_continued_is_refused(gpt2, prompts, seeds, top_k, words):
    with pytest.raises(pl.FactError, match=words):
        generate_batch(gpt2, prompts, seeds, 10, top_k)
