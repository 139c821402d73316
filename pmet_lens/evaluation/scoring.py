"""Model and facts to a tidy table, one row per (fact, kind of prompt, prompt).

Two families are kept apart: *success* compares the likelihoods of two answers (ES, PS, NS),
*accuracy* asks whether every token of the wanted answer is the argmax (EA, PA, NA), or how many
are (zsRE). `summarise` (in `metrics.py`) turns the table into metrics.

Prompts of many facts share a forward pass, sorted by length. Each distinct (prompt, answer) is
scored once, and answers that need the same tokens to be read, as all answers of one token to one
prompt do, share one row of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from pmet_lens.data import world
from pmet_lens.data.facts import Fact, FactError, listed, with_answer
from pmet_lens.data.progress import Tell, shown
from pmet_lens.evaluation import metrics
from pmet_lens.evaluation.metrics import summarise as summarise
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.generation import check_end, generate_batch
from pmet_lens.models.generation import generate as generate
from pmet_lens.models.memory import halving
from pmet_lens.models.model import Model

References = Mapping[tuple[str | None, str], Sequence[str]]
"""(relation, answer) -> texts about subjects that have that answer, for consistency."""
KINDS = ("rewrite", "paraphrase", "neighbour")
_Key = tuple[str, str | None, bool | None]
_Pairs = Sequence[tuple[int, int]]
_AT_ONCE = 2048  # prompts encoded together


@dataclass(frozen=True)
class Score:
    """How a model takes one answer to one prompt, under teacher forcing."""

    nll: float
    """Mean −log P per target token, nats, ≥ 0; lower is likelier."""
    right: float
    """Share of the target tokens that are the argmax, 0 to 1."""


@shown("scoring answers", "answer", "on_prompts")
def score(
    model: Model,
    prompts: Sequence[tokens.Prompt],
    *,
    batch_tokens: int | None = None,
    on_prompts: Tell | None = None,
) -> list[Score]:
    """Score every prompt's target, each distinct (text, target) once, in passes of `batch_tokens`
    padded tokens (None: 2,048 on a CPU, 32,768 elsewhere; fewer of a large vocabulary).
    `on_prompts(scored so far, all)` counts distinct (text, target)."""
    if batch_tokens is None:
        batch_tokens = 2048 if model.device.type == "cpu" else 32768
    distinct = {_key(p): tokens.Prompt(p.text, None, p.target, p.blank) for p in prompts}
    # The answers to one text stand side by side, and texts of about one length.
    keys = sorted(distinct, key=lambda key: (len(key[0]), key[0], key[1] or "", str(key[2])))
    scores: dict[_Key, Score] = {}
    while len(scores) < len(keys):
        start = stop = len(scores)
        while stop < len(keys) and (stop < start + _AT_ONCE or keys[stop][0] == keys[stop - 1][0]):
            stop += 1
        batch = tokens.encode(model, [distinct[key] for key in keys[start:stop]])
        for pairs in _shared_rows(batch, batch_tokens, likelihood.readable(model)):
            parts = halving(pairs, partial(_score_rows, model, batch), "prompts")
            new = [one for part in parts for one in part]
            scores.update(zip([keys[start + row] for row, _ in pairs], new, strict=True))
            if on_prompts is not None:
                on_prompts(len(scores), len(keys))
    return [scores[_key(p)] for p in prompts]


def _key(prompt: tokens.Prompt) -> _Key:
    """What two prompts with the same score have in common."""
    return prompt.text, prompt.target, prompt.blank


def _shared_rows(batch: tokens.Batch, budget: int, readable: int) -> Iterator[_Pairs]:
    """(row, host) pairs of `batch` to be scored in one pass: a row is read from its host, which
    begins with it, because what follows cannot change it (causal attention)."""
    ids = [row[:n] for row, n in zip(batch.ids.tolist(), batch.mask.sum(1).tolist(), strict=True)]
    readers: dict[int, list[int]] = {}
    host = -1
    # In sorted order a row that begins others stands right before one of them.
    for row in sorted(range(len(ids)), key=ids.__getitem__, reverse=True):
        if host < 0 or ids[host][: len(ids[row])] != ids[row]:
            host = row
        readers.setdefault(host, []).append(row)
    hosts, scored = sorted(readers), batch.scored.cpu()
    lengths = [len(ids[host]) for host in hosts]
    reads = [int(scored[readers[host]].any(0).sum()) for host in hosts]
    for chunk in tokens.chunks(lengths, budget, reads=reads, readable=readable):
        yield [(row, hosts[i]) for i in chunk for row in readers[hosts[i]]]


def _score_rows(model: Model, batch: tokens.Batch, pairs: _Pairs) -> list[Score]:
    """The scores of the rows of (row, host) `pairs`."""
    chosen, host = torch.tensor(pairs, device=batch.ids.device).T
    hosts, host_row = torch.unique(host, return_inverse=True)
    run, labels = batch[hosts], batch.labels[chosen]
    row, place = (labels != -100).nonzero(as_tuple=True)
    at, which = torch.unique(torch.stack([host_row[row], place], 1), dim=0, return_inverse=True)
    logits = model.logits_at(run.ids, run.mask, at)
    wanted = labels[row, place]
    nll = -likelihood.log_probs(logits)[which, wanted].double()
    right = (logits.argmax(-1)[which] == wanted).double()
    n = torch.bincount(row, minlength=len(chosen))
    nll, right = (likelihood.row_sums(v, row, len(chosen)) / n for v in (nll, right))
    return [Score(a, b) for a, b in zip(nll.tolist(), right.tolist(), strict=True)]


def answered(model: Model, facts: Sequence[Fact]) -> int:
    """For how many facts every token of the new answer is the argmax on the fact's prompt."""
    scores = score(model, [tokens.Prompt(f.text, None, f.target_new) for f in facts])
    return sum(one.right == 1 for one in scores)


def last_places(batch: tokens.Batch) -> Int[Tensor, "row 2"]:
    """(row, token) of the last prompt token of every row, as `Model.forward` takes them."""
    return torch.stack([torch.arange(len(batch), device=batch.last.device), batch.last], dim=1)


@shown("evaluation", "prompt", "on_prompts")
def evaluate(
    model: Model,
    facts: Fact | Sequence[Fact],
    generate: bool = False,
    *,
    references: References | None = None,
    on_prompts: Tell | None = None,
) -> pd.DataFrame:
    """One row per fact, kind of prompt and prompt.

    Columns: fact (position in `facts`), case_id, relation, kind ("rewrite", "paraphrase",
    "neighbour", and "portability" where facts have such prompts), index (of the prompt within its
    kind), prompt, wanted and other (the answer that should win and its rival; no rival: None),
    nll_wanted, nll_other (nats per token), margin (the difference of the probabilities, wanted
    minus other, −1 to 1), success (wanted likelier than other; NaN without a rival), correct (every
    token of wanted is the argmax), token_accuracy (share of its tokens that are). If some facts
    have a `benchmark` also that.

    The wanted answer is `target_new` on rewrite and paraphrase prompts (`target_true` for facts
    without a new one) and the prompt's own answer on neighbour and portability prompts.

    With `generate` also one row per generation prompt, of kind "generation", with text and fluency
    (bits × 100), and consistency (0 to 100) where there are `references` for the fact: texts about
    subjects that have the wanted answer, by (relation, wanted answer). It is one number per fact,
    of all its texts together, repeated in each of their rows. None takes the references of the
    bundled world for facts about its subjects; for other facts consistency is then absent.

    Raises:
        FactError: for no facts, a prompt that cannot be read, or `references` without `generate`.
        ModelError: with `generate`, for a tokenizer without an end-of-text token.
    """
    facts = listed(facts)
    rows = [row for i, fact in enumerate(facts) for row in _prompts(i, fact)]
    if not rows:
        raise FactError("There are no facts to evaluate; pass at least one Fact.")
    if generate:
        check_end(model)
    elif references is not None:
        raise FactError("references are compared with generated texts: pass generate=True, too.")

    def answered(answer: str) -> list[tokens.Prompt]:
        asked = [r for r in rows if r[answer] is not None]
        return [tokens.Prompt(r["prompt"], None, r[answer], facts[r["fact"]].blank) for r in asked]

    wanted, rival = answered("wanted"), answered("other")
    scores = score(model, [*wanted, *rival], on_prompts=on_prompts)
    others = iter(scores[len(wanted) :])
    for row, of_wanted in zip(rows, scores, strict=False):
        nll, accuracy = of_wanted.nll, of_wanted.right
        row.update(nll_wanted=nll, token_accuracy=accuracy, correct=float(accuracy == 1))
        row.update(nll_other=np.nan, margin=np.nan, success=np.nan)
        if row["other"] is not None:
            other = next(others).nll
            row.update(nll_other=other, margin=float(np.exp(-nll) - np.exp(-other)))
            row.update(success=float(metrics.says_new(nll, other)))
    frame = pd.DataFrame(rows)
    if generate:
        generated = _generations(model, facts, references, on_prompts)
        frame = pd.concat([frame, generated], ignore_index=True)
    if any(fact.benchmark for fact in facts):
        frame["benchmark"] = [facts[i].benchmark for i in frame["fact"]]
    return frame


def _prompts(i: int, fact: Fact) -> list[dict[str, Any]]:
    """The scored prompts of one fact, with the answer that should win and its rival."""
    new, true, wanted = fact.target_new, fact.target_true, _wanted(fact)
    rival = true if new is not None else None
    cases = [("rewrite", 0, fact.text, wanted, rival)]
    cases += [("paraphrase", n, p, wanted, rival) for n, p in enumerate(fact.paraphrases)]
    # The rival on a neighbour prompt is the edited answer, where the two answer the same relation.
    cases += [
        ("neighbour", n, p, answer, new if answer == true else None)
        for n, (p, answer) in enumerate(fact.neighbours)
    ]
    cases += [("portability", n, p, answer, None) for n, (p, answer) in enumerate(fact.portability)]
    return [
        _row(i, fact, kind, n, prompt, wanted=winner, other=loser)
        for kind, n, prompt, winner, loser in cases
    ]


def _row(i: int, fact: Fact, kind: str, index: int, prompt: str, **more: Any) -> dict[str, Any]:
    of_fact = {"fact": i, "case_id": fact.case_id, "relation": fact.relation}
    return {**of_fact, "kind": kind, "index": index, "prompt": prompt, **more}


def _wanted(fact: Fact) -> str:
    return fact.target_new or fact.target_true or ""  # no fact is without both


def _generations(
    model: Model,
    facts: Sequence[Fact],
    references: References | None,
    on_prompts: Tell | None,
) -> pd.DataFrame:
    """The rows of the generation prompts; a prompt's seed is its place among those of its fact."""
    asked = [(i, n, prompt) for i, f in enumerate(facts) for n, prompt in enumerate(f.generation)]
    prompts, seeds = [prompt for *_, prompt in asked], [n for _, n, _ in asked]
    texts = generate_batch(model, prompts, seeds, on_prompts=on_prompts)
    texts_of: dict[int, list[str]] = {}
    rows = []
    for (i, n, prompt), text in zip(asked, texts, strict=True):
        texts_of.setdefault(i, []).append(text)
        scored = {"text": text, "fluency": metrics.fluency([text])}
        rows.append(_row(i, facts[i], "generation", n, prompt, **scored))
    frame = pd.DataFrame(rows)
    known = _references([facts[i] for i in texts_of], references)
    consistency = {
        i: metrics.consistency(texts, reference)
        for (i, texts), reference in zip(texts_of.items(), known, strict=True)
        if len(reference)
    }
    return frame.assign(consistency=frame["fact"].map(consistency)) if consistency else frame


def _references(facts: Sequence[Fact], given: References | None) -> list[Sequence[str]]:
    """The reference texts of every fact, none where there are none."""
    if given is not None:
        return [given.get((f.relation, _wanted(f)), ()) for f in facts]
    bundled = world.build()
    known = {(f.subject.name, f.relation) for f in bundled.facts}
    answers = [(f.relation or "", _wanted(f)) for f in facts]
    return [
        bundled.references(*answer)
        if (fact.subject, fact.relation) in known and answer in bundled.holders
        else ()
        for fact, answer in zip(facts, answers, strict=True)
    ]


def ask(model: Model, prompts: str | Sequence[str], k: int = 5) -> pd.DataFrame:
    """The `k` likeliest next tokens of each prompt: columns prompt, rank (from 1), token,
    probability (0 to 1)."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    size, best = likelihood.readable(model, len(prompts)), []
    for start in range(0, len(prompts), size):
        batch = tokens.encode(model, [tokens.Prompt(p) for p in prompts[start : start + size]])
        with torch.no_grad():
            logits = model.forward(batch.ids, batch.mask, at=last_places(batch))
        top = logits.float().softmax(-1).topk(min(k, logits.shape[1]))
        best += zip(top.indices.tolist(), top.values.tolist(), strict=True)
    rows = [
        {"prompt": prompt, "rank": rank, "token": model.tokenizer.decode([token]), "probability": p}
        for prompt, (ids, ps) in zip(prompts, best, strict=True)
        for rank, (token, p) in enumerate(zip(ids, ps, strict=True), start=1)
    ]
    return pd.DataFrame(rows, columns=["prompt", "rank", "token", "probability"])


def recall(
    model: Model, facts: Fact | Sequence[Fact], *, on_prompts: Tell | None = None
) -> pd.DataFrame:
    """Whether each fact's true answer is the argmax on its prompt: columns fact, subject,
    relation, correct (0 or 1). On the facts of a known world that were *not* edited its mean is
    the collateral measure: the share still answered correctly."""
    asked = with_answer(facts, "target_true", "recall")
    prompts = [tokens.Prompt(f.text, None, f.target_true, f.blank) for f in asked.values()]
    scores = score(model, prompts, on_prompts=on_prompts)
    named = [(fact, f.subject, f.relation) for fact, f in asked.items()]
    frame = pd.DataFrame(named, columns=["fact", "subject", "relation"])
    return frame.assign(correct=[float(s.right == 1) for s in scores])
