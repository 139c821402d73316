"""Targets: one fact at a time with the whole model in every step, against the tail on suffixes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pandas as pd
import pytest
import subjects
import torch
from conftest import keep, number

import pmet_lens as pl
from pmet_lens.editing import targets
from pmet_lens.plans import costs

shares: list[dict[str, str]] = []


@pytest.mark.parametrize("name", ["world", "world-sequential", "medium"])
def test_targets(name, compare, device, small, request):
    """40 facts, per fact and step, since facts stop early (both sides after as many steps:
    test_plain.py). The plain side takes other facts in every round: two, at the medium shape one.
    """
    medium = name == "medium"
    model = subjects.medium(small, device) if medium else subjects.bundled(name, device)
    hp, own = subjects.settings(model), subjects.contexts(model)
    facts = pl.counterfact(n=20 if small else 40)
    plainly = subjects.plainly(model, hp, own)
    # Also makes the tail; at the medium shape, where no fact stops, of few facts.
    first = targets.optimise(model, facts[:2] if medium else facts, pl.PMET, hp, own).history
    count = [hp.n_steps] * len(facts) if medium else first.groupby("fact").size().tolist()

    def slow(i: int) -> float:
        chosen = [i] if medium or small else list(range(i, len(facts), 20))
        for fact in chosen:
            plainly(facts[fact])
        return float(sum(count[fact] for fact in chosen))

    def fast(i: int) -> float:
        # At the medium shape every round takes another tenth of the facts.
        chosen = range(i, len(facts), 10) if medium else range(len(facts))
        targets.optimise(model, [facts[fact] for fact in chosen], pl.PMET, hp, own)
        return float(sum(count[fact] for fact in chosen))

    known = {"world": "about 5 ×", "world-sequential": "about 5 ×", "medium": "about 8 ×"}[name]
    what = f"find targets for {len(facts)} facts, {name} (per fact and step)"
    how = {"unit": "ms", "scale": 1e3, "rounds": 2}
    compare(what, slow, fast, allows=known, wanted=6.0, **how)
    share(model, facts[:10] if medium else facts, hp, own, request.config)


def share(model, facts, hp, own, config) -> None:
    """Operations of a step of all facts, and how fast they are done against a matrix product."""
    counted = costs.estimate(model, facts, pl.PMET, hp, own)
    more = replace(hp, n_steps=6, stop_loss=0.0, kl_stop=0.0)
    times = []
    for _ in range(2):
        pair = []
        for settings in (replace(more, n_steps=2), more):
            start = time.perf_counter()
            targets.optimise(model, facts, pl.PMET, settings, own)
            pair.append(time.perf_counter() - start)
        times.append((pair[1] - pair[0]) / 4)
    reached = counted.step / statistics.median(times)
    most = rate(model)
    shares.append(
        {
            "model": model.name,
            "facts": str(len(facts)),
            "whole model, whole prompts": f"{number(counted.whole_step / 1e9)} GFLOP",
            "tail and suffix": f"{number(counted.step / 1e9)} GFLOP",
            "fewer": f"{counted.whole_step / counted.step:.1f} ×",
            "reached": f"{number(reached / 1e9)} GFLOP/s",
            "matrix product": f"{number(most / 1e9)} GFLOP/s",
            "share": f"{100 * reached / most:.0f} %",
        }
    )
    note = "One optimisation step of all facts; the rate is that of the steps alone."
    where = "" if model.device.type == "cpu" else f"_{model.device.type}"
    keep(f"operations{where}", pd.DataFrame(shares), note, config)


def rate(model: pl.Model) -> float:
    """Operations per second of a product of the shape of one MLP layer on 1,024 tokens."""
    d_in = model.d_in(pl.Site(0, "mlp"))
    a = torch.randn(1024, model.d_model, device=model.device, dtype=model.dtype)
    b = torch.randn(model.d_model, d_in, device=model.device, dtype=model.dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        a @ b
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * 1024 * model.d_model * d_in / statistics.median(times)
