"""Evaluation: a padded batch of its own for every record, against all of them together."""

from __future__ import annotations

import plain
import pytest
import subjects

import pmet_lens as pl


@pytest.mark.parametrize("name", ["world", "medium"])
def test_evaluation(name, compare, device, small):
    """100 records without generation, at the medium shape 4; the plain side some of them."""
    model = subjects.medium(small, device) if name == "medium" else subjects.bundled(name, device)
    facts = pl.counterfact(n=4 if small or name == "medium" else 100)
    every = 4

    def slow(_: int) -> float:
        chosen = facts[::every]
        for fact in chosen:
            plain.record(model.hf, model.tokenizer, fact)
        return float(len(chosen))

    def fast(_: int) -> float:
        pl.evaluate(model, facts)
        return float(len(facts))

    pl.evaluate(model, facts[:2])
    what = f"evaluate {len(facts)} records, {name} (per record)"
    compare(what, slow, fast, allows="3 to 4 ×", wanted=2.5, unit="ms", scale=1e3)
