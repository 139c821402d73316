"""What an edit did: weights, norms, and what the model says of every fact before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pmet_lens.data.facts import Fact
from pmet_lens.evaluation import scoring
from pmet_lens.models import tokens
from pmet_lens.models.model import Model


@dataclass(frozen=True)
class Receipt:
    """Shows itself as two tables in a notebook; `to_frame` is the one of the facts."""

    sites: pd.DataFrame
    """One row per written weight (index: its name in the Hugging Face model): site, rank, norm
    (Frobenius, of the change), relative (to the norm of the weight)."""
    facts: pd.DataFrame
    """One row per fact: subject, prompt, wanted; before, after (the likeliest next token); nll
    before and after (−log P of the wanted answer, nats per token, from 0, lower is surer); said
    (whether every token of it is now the arg-max)."""
    left_out: int
    """Facts of the edit that were not asked about."""

    def to_frame(self) -> pd.DataFrame:
        """The table of the facts."""
        return self.facts

    def __repr__(self) -> str:
        more = f"\n… and {self.left_out} more facts" if self.left_out else ""
        return f"{self.sites.to_string()}\n\n{self.facts.round(3).to_string()}{more}"

    def _repr_html_(self) -> str:
        said = int(self.facts["said"].sum())
        head = f"<p><b>{said} of {len(self.facts)}</b> facts are answered as wanted now"
        head += f" ({self.left_out} more were not asked about)" if self.left_out else ""
        facts = self.facts.round(3).to_html(index=False, border=0)
        sites = self.sites.to_html(border=0, float_format="{:.3g}".format)
        return f"{head}.</p>{facts}<p>Weights written:</p>{sites}"


def receipt(edit: Any, model: Model, n: int | None = 50) -> Receipt:
    """What `edit` (a `pl.Edit`) does to `model`, asked about its first `n` facts (None: all). The
    model may have the edit on already; it is left as it was found."""
    chosen = [fact for fact in edit.facts if fact.target_new is not None][:n]
    with model.live_edits.without(edit):
        sites = _sites(edit, model)
        before = _said(model, chosen)
        with edit.applied(model):
            after = _said(model, chosen)
    facts = pd.DataFrame(
        {
            "subject": [f.subject for f in chosen],
            "prompt": [f.text for f in chosen],
            "wanted": [f.target_new for f in chosen],
            "before": before["token"],
            "after": after["token"],
            "nll before": before["nll"],
            "nll after": after["nll"],
            "said": after["said"],
        }
    )
    return Receipt(sites, facts, len(edit.facts) - len(chosen))


def _sites(edit: Any, model: Model) -> pd.DataFrame:
    rows = []
    for site, delta in edit.deltas.items():
        norm = float(delta.double().norm())
        rows.append(
            {
                "weight": model.parameter_name(site),
                "site": str(site),
                "rank": edit.factors[site][0].shape[1],
                "norm": norm,
                "relative": norm / float(model.weight(site).double().norm()),
            }
        )
    return pd.DataFrame(rows).set_index("weight")


def _said(model: Model, facts: Sequence[Fact]) -> pd.DataFrame:
    """The likeliest next token, and the wanted answer's nll and whether it is said."""
    asked = scoring.ask(model, [f.text for f in facts], k=1)
    scores = scoring.score(model, [tokens.Prompt(f.text, None, f.target_new) for f in facts])
    return pd.DataFrame(
        {
            "token": asked["token"].str.strip(),
            "nll": [s.nll for s in scores],
            "said": [s.right == 1 for s in scores],
        }
    )
