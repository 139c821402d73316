"""Model and facts to a tidy table, one row per (fact, kind of prompt, prompt).

Two families are kept apart: *success* compares the likelihoods of two answers (ES, PS, NS),
*accuracy* asks whether every token of the wanted answer is the argmax (EA, PA, NA), or how many
are (zsRE). Free answers (`free_answers.py`) stand beside them. `summarise` (in `metrics.py`) turns
the table into metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pmet_lens.data import world
from pmet_lens.data.facts import Fact, FactError, listed, with_answer
from pmet_lens.data.progress import Tell, shown
from pmet_lens.evaluation import metrics
from pmet_lens.evaluation.free_answers import Answer, Asking, free_answers
from pmet_lens.evaluation.metrics import summarise as summarise
from pmet_lens.evaluation.teacher_forcing import Score as Score
from pmet_lens.evaluation.teacher_forcing import last_places as last_places
from pmet_lens.evaluation.teacher_forcing import score as score
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.generation import check_end, generate_batch
from pmet_lens.models.generation import generate as generate
from pmet_lens.models.model import Model

References = Mapping[tuple[str | None, str], Sequence[str]]
"""(relation, answer) -> texts about subjects that have that answer, for consistency."""
KINDS = ("rewrite", "paraphrase", "neighbour")


def answered(model: Model, facts: Sequence[Fact]) -> int:
    """For how many facts every token of the new answer is the argmax on the fact's prompt."""
    scores = score(model, [tokens.Prompt(f.text, None, f.target_new) for f in facts])
    return sum(one.right == 1 for one in scores)


@shown("evaluation", "prompt", "on_prompts")
def evaluate(
    model: Model,
    facts: Fact | Sequence[Fact],
    generate: bool = False,
    *,
    references: References | None = None,
    free: bool | Asking = False,
    on_prompts: Tell | None = None,
) -> pd.DataFrame:
    """One row per fact, kind of prompt and prompt.

    Columns: fact (position in `facts`), case_id, relation, kind ("rewrite", "paraphrase",
    "neighbour", and "portability" and "locality" where facts have such prompts, as `implications`
    say), index (of the prompt within its kind), prompt, wanted and other (the answer that should
    win and its rival; no rival: None), nll_wanted, nll_other (nats per token), margin (the
    difference of the probabilities, wanted minus other, −1 to 1), success (wanted likelier than
    other; NaN without a rival), correct (every token of wanted is the argmax), token_accuracy
    (share of its tokens that are). If some facts have a `benchmark` also that; if some have
    implications also implication, their kind.

    Of what follows or stays every accepted answer is tried: correct and token_accuracy are those of
    the best, wanted and nll_wanted those of the first.

    The wanted answer is `target_new` on rewrite and paraphrase prompts (`target_true` for facts
    without a new one) and the prompt's own answer elsewhere.

    With `free` the model is also asked to answer every prompt in its own words, greedily, until the
    sentence ends (True) or as an `Asking` has it, inside a chat, say. Then also the columns answer
    (its text), ended ("sentence", "line", "token": an end token, "limit": of 32 tokens), and of
    that text exact (it is wanted, or an alias of it, after SQuAD's normalisation), contains (one of
    these stands in it, as whole words) and talks_on (it begins with one of them and goes on). The
    other columns stay those of teacher forcing on the prompt as it is. `evaluation_gap` tells what
    the difference between the two is made of.

    With `generate` also one row per generation prompt, of kind "generation", with text and fluency
    (bits × 100), and consistency (0 to 100) where there are `references` for the fact: texts about
    subjects that have the wanted answer, by (relation, wanted answer). It is one number per fact,
    of all its texts together, repeated in each of their rows. None takes the references of the
    bundled world for facts about its subjects; for other facts consistency is then absent.

    Raises:
        FactError: for no facts, a prompt that cannot be read, or `references` without `generate`.
        ModelError: with `generate`, for a tokenizer without an end-of-text token; for the frame
            "chat" and a tokenizer without a chat template.
    """
    facts = listed(facts)
    rows = prompt_rows(facts)
    if not rows:
        raise FactError("There are no facts to evaluate; pass at least one Fact.")
    if generate:
        check_end(model)
    elif references is not None:
        raise FactError("references are compared with generated texts: pass generate=True, too.")

    scores = iter(score(model, list(_tried(facts, rows)), on_prompts=on_prompts))
    for row in rows:
        first, *more = (next(scores) for _ in _answers_of(row))
        nll, accuracy = first.nll, max(one.right for one in (first, *more))
        row.update(nll_wanted=nll, token_accuracy=accuracy, correct=float(accuracy == 1))
        row.update(nll_other=np.nan, margin=np.nan, success=np.nan)
        if row["other"] is not None:
            other = next(scores).nll
            row.update(nll_other=other, margin=float(np.exp(-nll) - np.exp(-other)))
            row.update(success=float(metrics.says_new(nll, other)))
    if free:
        said = asked_freely(model, facts, rows, None if free is True else free, on_prompts)
        for row, answer in zip(rows, said, strict=True):
            row.update(answer=answer.text, ended=answer.ended)
            row.update({k: float(v) for k, v in vars(answer.match).items()})
    frame = pd.DataFrame(rows).drop(columns=["accepted"])
    if not any(fact.implications for fact in facts):
        frame = frame.drop(columns=["implication"])
    if generate:
        generated = _generations(model, facts, references, on_prompts)
        frame = pd.concat([frame, generated], ignore_index=True)
    if any(fact.benchmark for fact in facts):
        frame["benchmark"] = [facts[i].benchmark for i in frame["fact"]]
    return frame


def prompt_rows(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """The rows of `evaluate` before anything is asked: fact, case_id, relation, kind, index,
    prompt, wanted, other, accepted (all answers that are right where they are free), implication
    (its kind, else None)."""
    return [row for i, fact in enumerate(facts) for row in _prompts(i, fact)]


def _prompts(i: int, fact: Fact) -> Iterator[dict[str, Any]]:
    """The scored prompts of one fact, with the answer that should win and its rival."""
    new, true, wanted = fact.target_new, fact.target_true, _wanted(fact)
    own = [wanted] if new is None else [wanted, *fact.aliases]
    rival = true if new is not None else None
    cases = [("rewrite", 0, fact.text, own, rival, None)]
    cases += [("paraphrase", n, p, own, rival, None) for n, p in enumerate(fact.paraphrases)]
    # The rival on a neighbour prompt is the edited answer, where the two answer the same relation.
    cases += [
        ("neighbour", n, p, [answer], new if answer == true else None, None)
        for n, (p, answer) in enumerate(fact.neighbours)
    ]
    follow = [(p, (answer,), None, False) for p, answer in fact.portability]
    follow += [(one.prompt, one.answers, one.kind, one.stays) for one in fact.implications]
    for kind, stay in (("portability", False), ("locality", True)):
        some = [one for one in follow if one[3] == stay]
        cases += [(kind, n, p, [*a], None, name) for n, (p, a, name, _) in enumerate(some)]
    for kind, n, prompt, accepted, loser, name in cases:
        found = {"wanted": accepted[0], "other": loser, "accepted": accepted, "implication": name}
        yield _row(i, fact, kind, n, prompt, **found)


def _answers_of(row: Mapping[str, Any]) -> list[str]:
    """The answers that teacher forcing tries: of what follows from an edit all, else the wanted."""
    return row["accepted"] if row["kind"] in ("portability", "locality") else [row["wanted"]]


def _tried(facts: Sequence[Fact], rows: Sequence[Mapping[str, Any]]) -> Iterator[tokens.Prompt]:
    """What is scored, row by row: the answers, then the rival where there is one."""
    for row in rows:
        rival = [] if row["other"] is None else [row["other"]]
        for answer in [*_answers_of(row), *rival]:
            yield tokens.Prompt(row["prompt"], None, answer, facts[row["fact"]].blank)


def asked_freely(
    model: Model,
    facts: Sequence[Fact],
    rows: Sequence[Mapping[str, Any]],
    asking: Asking | None = None,
    on_prompts: Tell | None = None,
) -> list[Answer]:
    """The free answer to the prompt of each of these rows (`prompt_rows`)."""
    prompts, rivals = [], []
    for row in rows:
        fact = facts[row["fact"]]
        prompts.append(tokens.Prompt(row["prompt"], None, row["wanted"], fact.blank))
        new = [] if fact.target_new is None else [fact.target_new, *fact.aliases]
        own = row["kind"] in ("rewrite", "paraphrase")
        rivals.append([row["other"]] * (row["other"] is not None) if own else new)
    accepted = [row["accepted"] for row in rows]
    return free_answers(model, prompts, accepted, rivals, asking, on_prompts=on_prompts)


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
