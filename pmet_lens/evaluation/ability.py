"""What an edit does to the rest of the model: text it models, answers it gives, facts it knows.

A good edit changes its facts and what follows from them, and nothing here.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pmet_lens.data import datasets, world
from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.data.progress import line
from pmet_lens.evaluation import metrics, scoring
from pmet_lens.evaluation.real_facts import real_facts
from pmet_lens.models import activations, likelihood, tokens
from pmet_lens.models.loading import of_the_world
from pmet_lens.models.model import Model

HELD_OUT = 2
"""Seed of the world's text that perplexity is measured on: second moments take that of seed 1, and
the bundled models were trained on neither."""


_ROWS = 16
"""Distributions over the vocabulary that are compared at a time."""
_Next = tuple[Int[Tensor, " prompt"], Float[Tensor, "prompt vocab"]]


@runtime_checkable
class Applicable(Protocol):
    """What is asked of an edit here: to be applied for a while, and to name its facts."""

    @property
    def facts(self) -> Sequence[Fact]: ...

    def applied(self, model: Model) -> AbstractContextManager[object]: ...


def general_ability(
    model: Model,
    edit: Applicable | None = None,
    *,
    texts: Iterable[str] | None = None,
    prompts: Sequence[str] | None = None,
    others: Fact | Sequence[Fact] | None = None,
    n_texts: int = 200,
    batch_tokens: int = 4096,
) -> pd.DataFrame:
    """The model with `edit` applied (None: as it is) on what the edit is not about: a table like
    that of `summarise`, one row per metric (index), columns mean, ci_low, ci_high (95 % bootstrap
    over texts, prompts or facts) and n. The model is left unchanged.

    - perplexity: exp of the mean −log P per token, nats, of `texts`; from 1, lower is better. The
      first token of a text is read and not predicted; texts are cut to what the model reads. The
      mean is over tokens, so that long texts count more. n texts.
    - KL: KL(before ‖ with the edit) of the distribution of the next token, nats, mean over
      `prompts`; from 0 (always so without an edit), lower is better. n prompts.
    - recall: share of the facts `others` whose true answer is the argmax, 0 to 100, higher is
      better; see `scoring.recall`. n facts.

    Args:
        texts: the first `n_texts` are read. None: text about the bundled world in another draw
            than its models and moments saw; the facts in it are the same. For a model of another
            world: one sentence for each of `pl.real_facts()`.
        prompts: None: a sentence about each of 200 subjects of the bundled world that none of its
            records edits; for another model the first 200 prompts of `pl.real_facts()`, but those
            about edited subjects.
        others: facts with `target_true`. None: every fact of the bundled world (for another model
            of `pl.real_facts()`) but those with subject and relation of an edited one (all of the
            subject, where no relation is given).
        batch_tokens: padded tokens per forward pass.

    An empty collection leaves its row out. A real model knows only a part of the real facts: of
    these defaults the difference an edit makes has a meaning.

    Raises:
        FactError: for texts or prompts that are one string, hold no token or (prompts) are longer
            than the model reads; for facts without `target_true`.
    """
    if isinstance(texts, str) or isinstance(prompts, str):
        raise FactError("texts and prompts are lists of texts; put one text into a list.")
    edited = () if edit is None else edit.facts
    bundled = of_the_world(model)
    real = [] if bundled else others_of(real_facts(), edited)
    if texts is None:
        said = (f"{fact.text} {fact.target_true}." for fact in real)
        texts = world.build().texts(HELD_OUT) if bundled else said
    read = list(itertools.islice(texts, n_texts))
    if prompts is None:
        about = {fact.subject for fact in edited}
        safe = [fact.text for fact in real if fact.subject not in about]
        prompts = _prompts() if bundled else safe[:200]
    if others is None:
        others = others_of(datasets.knowns(), edited) if bundled else real
    others = listed(others)
    before = list(_next_token(model, prompts, batch_tokens)) if len(prompts) else []
    table = {}
    with nullcontext() if edit is None else edit.applied(model):
        if read:
            table["perplexity"] = _perplexity(*_nll(model, read, batch_tokens))
        if before:
            after = before if edit is None else _next_token(model, prompts, batch_tokens)
            table["KL"] = metrics.interval(_divergence(before, after))
        if len(others):
            right = 100 * scoring.recall(model, others)["correct"].to_numpy()
            table["recall"] = metrics.interval(right)
    return metrics.interval_table(table)


def _prompts(n: int = 200) -> list[str]:
    """Prompts about `n` subjects of pool B, which no record of the bundled world edits."""
    bundled = world.build()
    safe = {e.name for e in bundled.entities if e.pool == "B"}
    every = {r["subject"]: r["prompt"] for r in bundled.knowns() if r["subject"] in safe}
    return list(every.values())[:: max(1, len(every) // n)][:n]


def others_of(facts: Sequence[Fact], edited: Sequence[Fact]) -> list[Fact]:
    """The facts of a known world that were not edited: those with another (subject, relation), and
    with another subject than an edited fact without a relation (zsRE)."""
    gone = {(f.subject, f.relation) for f in edited}
    return [f for f in facts if not {(f.subject, f.relation), (f.subject, None)} & gone]


def _next_token(model: Model, prompts: Sequence[str], batch_tokens: int) -> Iterator[_Next]:
    """The numbers of some prompts and log P of every next token of each, batch after batch; nats,
    float64 on the CPU."""
    asked = [tokens.Prompt(prompt) for prompt in prompts]
    # In float64, before and after the softmax: four times the logits.
    most, done = likelihood.readable(model, copies=4), 0
    with line("next tokens", "prompt") as tell:
        for chosen, batch in activations.batches(model, asked, batch_tokens):
            for part in torch.arange(len(batch)).split(most):
                rows = batch[part.to(batch.ids.device)]
                logits = model.logits_at(rows.ids, rows.mask, scoring.last_places(rows))
                yield chosen[part], logits.cpu().double().log_softmax(-1)
                done += len(part)
                tell(done, len(asked))


def _divergence(before: Iterable[_Next], after: Iterable[_Next]) -> metrics.Numbers:
    """KL(before ‖ after) of every prompt, in the order of their numbers."""
    order, found = [], []
    for (chosen, old), (_, new) in zip(before, after, strict=True):
        order.append(chosen)
        pairs = zip(old.split(_ROWS), new.split(_ROWS), strict=True)
        found += [(b.exp() * (b - a)).sum(1).clamp(min=0) for b, a in pairs]
    return torch.cat(found)[torch.cat(order).argsort()].numpy()


def _nll(
    model: Model, texts: Sequence[str], batch_tokens: int
) -> tuple[metrics.Numbers, metrics.Numbers]:
    """Per text with at least two tokens: the sum of −log P over its tokens but the first, nats,
    and the number of these tokens."""
    read = [model.tokenizer(text)["input_ids"][: model.n_positions] for text in texts]
    read = [ids for ids in read if len(ids) > 1]
    if not read:
        raise FactError("The texts hold no token to predict; pass texts of two tokens or more.")
    total: list[float] = []
    count: list[float] = []
    budget = likelihood.readable(model, batch_tokens)
    with line("perplexity", "text") as tell:
        for chunk in tokens.chunks([len(ids) for ids in read], budget):
            ids, mask = tokens.pad(model, [read[i] for i in chunk])
            at = mask[:, 1:].nonzero()  # the tokens but the last, each of which predicts the next
            parts = []
            for some in at.split(budget):  # a longer text runs several times
                log_p = likelihood.log_probs(model.logits_at(ids, mask, some))
                wanted = ids[some[:, 0], some[:, 1] + 1]
                parts.append(-likelihood.of_labels(log_p, wanted).double())
            nll = torch.cat(parts)
            total += likelihood.row_sums(nll, at[:, 0], len(chunk)).tolist()
            count += [len(read[i]) - 1.0 for i in chunk]
            tell(len(total), len(read))
    return np.array(total), np.array(count)


def _perplexity(total: metrics.Numbers, count: metrics.Numbers) -> metrics.Interval:
    nll = (total.sum() / count.sum(), *metrics.bootstrap_ratio(total, count))
    mean, low, high = (float(np.exp(value)) for value in nll)
    return mean, low, high, len(total)


def lm_eval_model(model: Model, **options: Any) -> Any:
    """The model for EleutherAI's lm-evaluation-harness, e.g.
    `lm_eval.simple_evaluate(model=lm_eval_model(model), tasks=["lambada_openai"])`.

    It wraps the user's Hugging Face model and tokenizer, so that an applied edit counts;
    `options` go to its `HFLM`. lm_eval is no dependency of this package, and its tasks download
    their data.

    Raises ImportError where lm_eval is not installed, with the command that installs it.
    """
    try:
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise ImportError(
            f'lm_eval is not installed; run  pip install "lm_eval[hf]"  and try again. ({error})'
        ) from error
    return wrapper(pretrained=model.hf, tokenizer=model.tokenizer, **options)
