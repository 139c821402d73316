"""What can be said of a fact while it is typed: its tokens, where the subject ends, and what the
model says now."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmet_lens.data import markup
from pmet_lens.data.facts import Fact
from pmet_lens.evaluation import scoring
from pmet_lens.models import generation, tokens
from pmet_lens.models.model import Model


@dataclass(frozen=True)
class Typed:
    """A fact that can be used as it stands there."""

    fact: Fact
    tokens: tuple[str, ...]
    """Of the prompt, one text each."""
    last_subject: int
    """The place of the subject's last token in `tokens`, where an edit acts; from 0."""
    n_new: int
    """Tokens of the new answer; 0: there is none yet."""
    says: str | None = None
    """What the model says now (greedily, up to 6 tokens); None: not asked yet."""
    p_new: float | None = None
    """Probability of the new answer per token, 0 to 1."""


def typed(model: Model, subject: str, prompt: str, new: str = "") -> Typed:
    """Where the tokens of a typed fact lie; costs no forward pass.

    Raises:
        FactError: as `pl.Fact` does, for a subject that is not found in the tokens, and for a text
            that is longer than the model reads.
    """
    fact = Fact(subject, prompt, new.strip() or None, None if new.strip() else "?")
    batch, texts = tokens.shown(model, fact)
    target = [tokens.Prompt(fact.text, None, new.strip(), fact.blank)] if new.strip() else []
    n_new = int(tokens.encode(model, target).scored.sum()) if target else 0
    return Typed(fact, tuple(texts), int(batch.at("last_subject")[0]), n_new)


def asked(model: Model, of: Typed) -> Typed:
    """The same, with what the model says now: a few forward passes."""
    fact = of.fact
    (says,) = generation.answers(model, [fact.text])
    p_new = None
    if of.n_new:
        wanted = tokens.Prompt(fact.text, None, fact.target_new, fact.blank)
        (score,) = scoring.score(model, [wanted])
        p_new = math.exp(-score.nll)
    return Typed(fact, of.tokens, of.last_subject, of.n_new, says, p_new)


def shown(of: Typed) -> str:
    """HTML of two lines: the tokens, the subject's last one underlined, and what the model says."""
    marked = [_token(text, i == of.last_subject) for i, text in enumerate(of.tokens)]
    last = of.tokens[of.last_subject].strip()
    where = f"the subject's last token is “{last}”, number {of.last_subject + 1}"
    lines = [f"{' '.join(marked)} – {markup.escape(f'{len(of.tokens)} tokens; {where}.')}"]
    if of.says is not None:
        says = f"The model says now: <b>{markup.escape(of.says or '(nothing)')}</b>"
        lines.append(says + _about_new(of))
    return "".join(f'<div style="line-height: 1.6">{line}</div>' for line in lines)


def _about_new(of: Typed) -> str:
    if of.p_new is None:
        return ". No new answer yet."
    count = f"{of.n_new} token{'s' if of.n_new > 1 else ''}"
    new = f". The new answer has {count}, and probability {of.p_new:.2g} per token now."
    said = (of.says or "").casefold().startswith(str(of.fact.target_new).casefold())
    return markup.escape(f"{new} The model says it already." if said else new)


def _token(text: str, last: bool) -> str:
    style = f"border: {markup.LINE}; padding: 0 0.2em; white-space: pre"
    style += "; text-decoration: underline; font-weight: bold" if last else ""
    return f'<span style="{style}">{markup.escape(text.strip() or repr(text)[1:-1])}</span>'
