"""The table says what the plain model says, prompt by prompt, the summary what the table says."""

from __future__ import annotations

import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens import evaluation, metrics
from pmet_lens.adapter import Model
from pmet_lens.evaluation import ask, evaluate, generate, recall, score, summarise
from pmet_lens.tokens import Prompt

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
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return tiny_model("gpt2")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """Intervals are tested with the metrics; here they only have to be there."""
    monkeypatch.setattr(metrics, "bootstrap", partial(metrics.bootstrap, n_resamples=100))


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
    with pytest.raises(pl.FactError, match="recall needs facts with target_true"):
        recall(model, FACTS)


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
    forward = Model.forward

    def spy(self, input_ids, attention_mask, **more):
        ran.extend(
            tuple(ids[m.bool()].tolist()) for ids, m in zip(input_ids, attention_mask, strict=True)
        )
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(Model, "forward", spy)
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


def test_generation_ends_with_the_text_and_with_the_model(monkeypatch):
    model = tiny_model("gpt2")
    asked = []
    forward = Model.forward
    end = model.tokenizer.eos_token_id

    def spy(self, input_ids, attention_mask, **more):
        asked.append(input_ids.shape[1])
        logits = forward(self, input_ids, attention_mask, **more)
        logits[..., end] = 1e9 if input_ids.shape[1] in stops else -1e9
        return logits

    monkeypatch.setattr(Model, "forward", spy)
    first = len(model.tokenizer("Kel")["input_ids"])
    stops: set[int] = set()
    for length, stop, last in ((12, 0, 11), (12, 7, 7), (1000, 0, model.n_positions - 1)):
        asked.clear()
        stops.clear()
        stops.add(stop)
        text = generate(model, "Kel", length=length)
        assert asked == list(range(first, last + 1))
        assert "<|endoftext|>" not in text


def test_generation_prompts_are_rows_of_their_own(gpt2, monkeypatch):
    monkeypatch.setattr(
        evaluation, "generate", lambda model, prompt, seed: f"{prompt} a b c {seed}"
    )
    wordy = pl.Fact("Kel", "{} is", "open", generation=("Kel", "In Kel"))
    rows = evaluate(gpt2, [FACTS[1], wordy], generate=True)
    own = rows[rows["kind"] == "generation"]
    assert own["text"].tolist() == ["Kel a b c 0", "In Kel a b c 1"]
    assert own["fact"].tolist() == [1, 1]
    words = [metrics.fluency([text]) for text in own["text"]]
    assert own["fluency"].tolist() == words
    assert rows.index.is_unique
    assert summarise(rows).loc["GE", "mean"] == pytest.approx(np.mean(words))
    silent = evaluate(gpt2, FACTS[1:2], generate=True)
    assert "GE" not in summarise(silent).index


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
