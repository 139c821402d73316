"""Model and facts to a tidy table, one row per (fact, kind of prompt, prompt), and its summary.

Two families are kept apart: *success* compares the likelihoods of two answers (ES, PS, NS),
*accuracy* asks whether every token of the wanted answer is the arg-max (EA, PA, NA). Prompts of
many facts share a forward pass, sorted by length; each distinct (prompt, answer) is scored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pmet_lens import metrics, tokens
from pmet_lens.adapter import Model
from pmet_lens.facts import Fact, FactError

OnPrompts = Callable[[int, int], object]
KINDS = ("rewrite", "paraphrase", "neighbour")


@dataclass(frozen=True)
class Score:
    """How a model takes one answer to one prompt, under teacher forcing."""

    nll: float
    """Mean −log P per target token, nats, ≥ 0; lower is likelier."""
    right: float
    """Share of the target tokens that are the arg-max, 0 to 1."""


def score(
    model: Model,
    prompts: Sequence[tokens.Prompt],
    *,
    batch_tokens: int = 4096,
    on_prompts: OnPrompts | None = None,
) -> list[Score]:
    """Score every prompt's target. Each distinct (text, target) is run once."""
    distinct = {(p.text, p.target): tokens.Prompt(p.text, None, p.target) for p in prompts}
    keys = sorted(distinct, key=lambda key: (len(key[0]), key))
    found: dict[tuple[str, str | None], Score] = {}
    start = 0
    while start < len(keys):
        # About four characters are a token; a wrong guess costs memory or time, not truth.
        width = max(8, len(keys[min(start + 64, len(keys) - 1)][0]) // 3)
        stop = min(len(keys), start + max(1, batch_tokens // width))
        batch = tokens.encode(model, [distinct[k] for k in keys[start:stop]])
        found.update(zip(keys[start:stop], _score_batch(model, batch), strict=True))
        start = stop
        if on_prompts is not None:
            on_prompts(stop, len(keys))
    return [found[p.text, p.target] for p in prompts]


def _score_batch(model: Model, batch: tokens.Batch) -> list[Score]:
    at = batch.scored.nonzero()
    with torch.no_grad():
        logits = model.forward(batch.ids, batch.mask, at=at).float()
    labels = batch.labels[at[:, 0], at[:, 1]]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    right = (logits.argmax(-1) == labels).double()
    n = torch.bincount(at[:, 0], minlength=len(batch))
    zero = torch.zeros(len(batch), dtype=torch.float64, device=nll.device)
    nll = zero.index_add(0, at[:, 0], nll) / n
    right = zero.index_add(0, at[:, 0], right) / n
    return [Score(a, b) for a, b in zip(nll.tolist(), right.tolist(), strict=True)]


def evaluate(
    model: Model,
    facts: Sequence[Fact],
    generate: bool = False,
    *,
    on_prompts: OnPrompts | None = None,
) -> pd.DataFrame:
    """One row per fact, kind of prompt and prompt.

    Columns: fact (position in `facts`), case_id, relation, kind ("rewrite", "paraphrase",
    "neighbour"), index (of the prompt within its kind), prompt, wanted and other (the answer that
    should win and its rival; no rival: None), nll_wanted, nll_other (nats per token), margin (the
    difference of the probabilities, wanted minus other, −1 to 1), success (wanted likelier than
    other; NaN without a rival), correct (every token of wanted is the arg-max), token_accuracy
    (share of its tokens that are). With `generate` also one row per generation prompt, of kind
    "generation", with text and fluency (bits × 100).

    The wanted answer is `target_new` on rewrite and paraphrase prompts (`target_true` for facts
    without a new one) and the neighbour's own answer on neighbour prompts.
    """
    rows = [row for i, fact in enumerate(facts) for row in _prompts(i, fact)]
    if not rows:
        raise FactError("There are no facts to evaluate; pass at least one Fact.")
    wanted = [tokens.Prompt(r["prompt"], None, r["wanted"]) for r in rows]
    rival = [tokens.Prompt(r["prompt"], None, r["other"]) for r in rows if r["other"] is not None]
    scores = score(model, [*wanted, *rival], on_prompts=on_prompts)
    others = iter(scores[len(wanted) :])
    for row, own in zip(rows, scores, strict=False):
        row.update(nll_wanted=own.nll, token_accuracy=own.right, correct=float(own.right == 1))
        row.update(nll_other=np.nan, margin=np.nan, success=np.nan)
        if row["other"] is not None:
            other = next(others)
            row.update(
                nll_other=other.nll,
                margin=float(np.exp(-own.nll) - np.exp(-other.nll)),
                success=float(metrics.says_new(own.nll, other.nll)),
            )
    frame = pd.DataFrame(rows)
    if not generate:
        return frame
    return pd.concat([frame, _generations(model, facts)], ignore_index=True)


def _prompts(i: int, fact: Fact) -> list[dict[str, Any]]:
    """The scored prompts of one fact, with the answer that should win and its rival."""
    new, true = fact.target_new, fact.target_true
    wanted, rival = (new, true) if new is not None else (true, None)
    cases = [("rewrite", fact.text, wanted, rival)]
    cases += [("paraphrase", p, wanted, rival) for p in fact.paraphrases]
    # The rival on a neighbour prompt is the edited answer, where the two answer the same relation.
    cases += [("neighbour", p, a, new if a == true else None) for p, a in fact.neighbours]
    head = {"fact": i, "case_id": fact.case_id, "relation": fact.relation}
    counts: dict[str, int] = {}
    rows = []
    for kind, prompt, want, other in cases:
        index = counts[kind] = counts.get(kind, -1) + 1
        rows.append(
            {**head, "kind": kind, "index": index, "prompt": prompt, "wanted": want, "other": other}
        )
    return rows


def _generations(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    rows = []
    for i, fact in enumerate(facts):
        for index, prompt in enumerate(fact.generation):
            text = generate(model, prompt, seed=index)
            row = {"fact": i, "case_id": fact.case_id, "relation": fact.relation}
            row.update(kind="generation", index=index, prompt=prompt, text=text)
            rows.append({**row, "fluency": metrics.fluency([text])})
    return pd.DataFrame(rows)


def generate(model: Model, prompt: str, length: int = 100, top_k: int = 5, seed: int = 0) -> str:
    """`prompt` continued to `length` tokens in all, top-k sampled (1: greedy); stops at the
    end-of-text token. Deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    while ids.shape[1] < min(length, model.n_positions):
        at = torch.tensor([[0, ids.shape[1] - 1]], device=model.device)
        with torch.no_grad():
            best = model.forward(ids, torch.ones_like(ids), at=at)[0].float().cpu().topk(top_k)
        pick = best.indices[torch.multinomial(best.values.softmax(0), 1, generator=generator)]
        if int(pick) == model.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, pick.to(model.device)[None]], dim=1)
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)


def ask(model: Model, prompts: str | Sequence[str], k: int = 5) -> pd.DataFrame:
    """The `k` likeliest next tokens of each prompt: columns prompt, rank (from 1), token,
    probability (0 to 1)."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    batch = tokens.encode(model, [tokens.Prompt(p) for p in prompts])
    at = torch.stack([torch.arange(len(batch), device=model.device), batch.last], dim=1)
    with torch.no_grad():
        best = model.forward(batch.ids, batch.mask, at=at).float().softmax(-1).topk(k)
    rows = [
        {"prompt": prompt, "rank": rank, "token": model.tokenizer.decode([token]), "probability": p}
        for prompt, ids, ps in zip(
            prompts, best.indices.tolist(), best.values.tolist(), strict=True
        )
        for rank, (token, p) in enumerate(zip(ids, ps, strict=True), start=1)
    ]
    return pd.DataFrame(rows)


def recall(
    model: Model, facts: Sequence[Fact], *, on_prompts: OnPrompts | None = None
) -> pd.DataFrame:
    """Whether each fact's true answer is the arg-max on its prompt: columns fact, subject,
    relation, correct (0 or 1). On the facts of a known world that were *not* edited its mean is
    the collateral measure: the share still answered correctly."""
    if any(f.target_true is None for f in facts):
        raise FactError("recall needs facts with target_true.")
    prompts = [tokens.Prompt(f.text, None, f.target_true) for f in facts]
    scores = score(model, prompts, on_prompts=on_prompts)
    columns = {
        "fact": range(len(facts)),
        "subject": [f.subject for f in facts],
        "relation": [f.relation for f in facts],
        "correct": [float(s.right == 1) for s in scores],
    }
    return pd.DataFrame(columns)


_COLUMNS: Mapping[str, tuple[str, str]] = {
    "ES": ("rewrite", "success"),
    "PS": ("paraphrase", "success"),
    "NS": ("neighbour", "success"),
    "EA": ("rewrite", "correct"),
    "PA": ("paraphrase", "correct"),
    "NA": ("neighbour", "correct"),
    "EM": ("rewrite", "margin"),
    "PM": ("paraphrase", "margin"),
    "NM": ("neighbour", "margin"),
    "GE": ("generation", "fluency"),
}


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per metric (index), columns mean, ci_low, ci_high (95 % bootstrap over facts), n.

    In per cent, higher is better: ES, PS, NS (success on rewrite, paraphrase and neighbour
    prompts), S (their harmonic mean), EA, PA, NA (accuracies), EM, PM, NM (mean probability
    margins, −100 to 100). GE (fluency) in bits × 100. Averaged per fact first, then over facts.
    """
    cases = {}
    for name, (kind, column) in _COLUMNS.items():
        if column in rows:
            chosen = rows.loc[rows["kind"] == kind].dropna(subset=[column])
            if len(chosen):
                scale = 1 if name == "GE" else 100
                cases[name] = scale * chosen.groupby("fact")[column].mean()
    out = {name: _interval(values.to_numpy(), "mean") for name, values in cases.items()}
    if {"ES", "PS", "NS"} <= set(cases):
        parts = pd.concat([cases[k] for k in ("ES", "PS", "NS")], axis=1).to_numpy()
        out["S"] = _interval(parts, "harmonic")
    order = [k for k in ("S", *_COLUMNS) if k in out]
    return pd.DataFrame(
        [out[k] for k in order],
        index=pd.Index(order, name="metric"),
        columns=pd.Index(["mean", "ci_low", "ci_high", "n"]),
    )


def _interval(per_case: metrics.Numbers, statistic: str) -> tuple[float, float, float, int]:
    means = np.nanmean(per_case, axis=0)
    mean = float(means) if statistic == "mean" else metrics.harmonic_mean(list(means))
    return (mean, *metrics.bootstrap(per_case, statistic), len(per_case))
