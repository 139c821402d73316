"""The metrics of both benchmarks, written a second time: record by record, prompt by prompt, with
plain transformers and nothing of the package, from the definitions of the papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pmet_lens as pl

torch.set_num_threads(1)
N = 15
CLOSE = 1e-5  # nats, for GPT-J, which computes attention in float32 in any dtype
COUNTERFACT = "counterfact/counterfact_500.json"
ZSRE = "zsre/zsre_mend_eval_500.json"


# -- the second implementation --------------------------------------------------------------------


def answer(hf, tokenizer, prompt: str, target: str) -> tuple[float, float]:
    """Mean −log P per target token, and the share of them that are the arg-max."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + " " + target)["input_ids"]
    assert whole[: len(before)] == before
    with torch.no_grad():
        # Logits where the answer is predicted, and behind it: others cost most of the time.
        logits = hf(torch.tensor([whole]), logits_to_keep=len(whole) - len(before) + 1).logits[0]
    nll, right = [], []
    for token, own in zip(whole[len(before) :], logits, strict=False):
        chances = torch.log_softmax(own, dim=0)
        nll.append(-float(chances[token]))
        right.append(int(chances.argmax()) == token)
    return float(np.mean(nll)), float(np.mean(right))


def counterfact_case(hf, tokenizer, record: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Kind of prompt -> per prompt success, magnitude, accuracy and both nlls."""
    asked = record["requested_rewrite"]
    new, true = asked["target_new"]["str"], asked["target_true"]["str"]
    kinds = {
        "rewrite": [asked["prompt"].format(asked["subject"])],
        "paraphrase": record["paraphrase_prompts"],
        "neighbour": record["neighborhood_prompts"],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for kind, prompts in kinds.items():
        for prompt in prompts:
            nll_new, right_new = answer(hf, tokenizer, prompt, new)
            nll_true, right_true = answer(hf, tokenizer, prompt, true)
            row = {"wanted": nll_new, "other": nll_true, "all right": right_new == 1}
            if kind == "neighbour":
                row = {"wanted": nll_true, "other": nll_new, "all right": right_true == 1}
            row["success"] = row["wanted"] < row["other"]
            row["magnitude"] = np.exp(-row["wanted"]) - np.exp(-row["other"])
            found.setdefault(kind, []).append(row)
    return found


def counterfact_metrics(cases: list[dict[str, list[dict[str, float]]]]) -> dict[str, float]:
    out = {}
    letters = {"rewrite": "E", "paraphrase": "P", "neighbour": "N"}
    for kind, letter in letters.items():
        for what, second in (("success", "S"), ("all right", "A"), ("magnitude", "M")):
            values = [np.mean([row[what] for row in case[kind]]) for case in cases]
            out[letter + second] = 100 * float(np.mean(values))
    out["S"] = harmonic(out["ES"], out["PS"], out["NS"])
    return out


def zsre_case(hf, tokenizer, record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Metric -> nll and share of right tokens."""
    asked = {
        "efficacy": (record["src"], record["answers"][0]),
        "paraphrase": (record["rephrase"], record["answers"][0]),
        "specificity": (record["loc"] + "?", record["loc_ans"]),
    }
    return {name: answer(hf, tokenizer, *pair) for name, pair in asked.items()}


def zsre_metrics(cases: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    out = {
        name: 100 * float(np.mean([case[name][1] for case in cases]))
        for name in ("efficacy", "paraphrase", "specificity")
    }
    return {**out, "score": harmonic(*out.values())}


def harmonic(*values: float) -> float:
    return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)


# -- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_gpt2(shared):
    """A random GPT-2 of two layers behind GPT-2's own tokenizer.

    Its head is taught some of the answers, in that their rows are what it then reads: else every
    accuracy would be 0, in any implementation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    files = [str(shared / "data/tokenizer_gpt2" / name) for name in ("vocab.json", "merges.txt")]
    bpe = Tokenizer(models.BPE.from_file(*files))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=end, eos_token=end)
    taught = []
    for record in records(shared, COUNTERFACT, N)[::2]:
        asked = record["requested_rewrite"]
        taught.append((asked["prompt"].format(asked["subject"]), asked["target_new"]["str"]))
        taught.append((record["paraphrase_prompts"][0], asked["target_new"]["str"]))
        taught.append((record["neighborhood_prompts"][0], asked["target_true"]["str"]))
    for record in records(shared, ZSRE, N)[1::2]:
        taught.append((record["src"], record["answers"][0]))
        taught.append((record["loc"] + "?", record["loc_ans"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=2, n_embd=32, n_head=4, n_positions=160, tie_word_embeddings=False
        )
        hf = GPT2LMHeadModel(config).double().eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            read: dict[int, list[torch.Tensor]] = {}
            for prompt, target in taught:
                ids = tokenizer(f"{prompt} {target}")["input_ids"]
                states = hf.transformer(torch.tensor([ids])).last_hidden_state[0]
                for place in range(len(tokenizer(prompt)["input_ids"]), len(ids)):
                    read.setdefault(ids[place], []).append(states[place - 1])
            mean = torch.stack([state for own in read.values() for state in own]).mean(0)
            for token, own in read.items():
                hf.lm_head.weight[token] = torch.stack(own).mean(0) - mean
    return hf, tokenizer


def records(shared: Path, file: str, n: int) -> list[dict[str, Any]]:
    return json.loads((shared / "data" / file).read_text(encoding="utf-8"))[:n]


def check_counterfact(hf, tokenizer, shared: Path, n: int, close: float = 1e-6) -> dict[str, float]:
    cases = [counterfact_case(hf, tokenizer, record) for record in records(shared, COUNTERFACT, n)]
    facts = pl.counterfact(shared / "data" / COUNTERFACT, n)
    rows = pl.evaluate(pl.load(hf, tokenizer), facts)
    assert len(rows) == sum(len(own) for case in cases for own in case.values())
    for row in rows.rename(columns={"index": "place"}).itertuples():
        own = cases[row.fact][row.kind][row.place]
        assert row.nll_wanted == pytest.approx(own["wanted"], abs=close)
        assert row.nll_other == pytest.approx(own["other"], abs=close)
        assert row.margin == pytest.approx(own["magnitude"], abs=close)
        assert (row.success, row.correct) == (own["success"], own["all right"])
    want = counterfact_metrics(cases)
    agree(pl.summarise(rows), want, n, close)
    return want


def check_zsre(
    hf, tokenizer, shared: Path, file: str, n: int, close: float = 1e-6
) -> dict[str, float]:
    cases = [zsre_case(hf, tokenizer, record) for record in records(shared, file, n)]
    rows = pl.evaluate(pl.load(hf, tokenizer), pl.zsre(shared / "data" / file, n))
    assert len(rows) == 3 * n
    names = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighbour": "specificity"}
    for row in rows.itertuples():
        nll, right = cases[row.fact][names[row.kind]]
        assert row.nll_wanted == pytest.approx(nll, abs=close)
        assert row.token_accuracy == pytest.approx(right, abs=1e-12)
        assert row.correct == (right == 1)
    want = zsre_metrics(cases)
    agree(pl.summarise(rows).loc[list(want)], want, n, close)
    return want


def agree(found: pd.DataFrame, want: dict[str, float], n: int, close: float) -> None:
    assert found["mean"].to_dict() == pytest.approx(want, abs=close)
    assert set(found["n"]) == {n}


# -- agreement ------------------------------------------------------------------------------------


def test_counterfact(random_gpt2, shared):
    found = check_counterfact(*random_gpt2, shared, N)
    shares = ("S", "ES", "PS", "NS", "EA", "PA", "NA")
    assert all(0 < found[name] < 100 for name in shares)  # or the agreement would say little


def test_zsre(random_gpt2, shared):
    found = check_zsre(*random_gpt2, shared, ZSRE, N)
    assert all(0 < value < 100 for value in found.values())


@pytest.mark.slow
def test_a_model_that_knows_the_facts(shared):
    path = shared / "models" / "counterfact-gptj"
    if not path.is_dir():
        pytest.skip(f"needs the model at {path}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = check_counterfact(hf, tokenizer, shared, 20, CLOSE)
    assert found["NS"] > 90 > 10 > found["ES"]
    assert found["NA"] > 90
    found = check_zsre(hf, tokenizer, shared, "zsre/zsre_known_locality_150.json", 10, CLOSE)
    assert found["specificity"] > 80 > found["efficacy"]
