"""Choose the hyper-parameters of a bundled model: `python figures/sweep.py world PMET`.

One factor at a time around a centre, λ inside every setting (targets do not depend on λ, so that
part is cheap). The facts are records 350 to 449, none of which any results table uses. Appends to
`figures/results/sweep.csv`; settings that are there already are skipped, so it can be resumed.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pmet_lens as pl
from pmet_lens import experiments

TABLE = Path(__file__).parent / "results" / "sweep.csv"
WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)
CENTRE = {
    "PMET": pl.Hparams(layers=(1, 2, 3), clamp=4.0, weight_decay=0.02, second_moment_weight=30.0),
    "MEMIT": pl.Hparams(
        layers=(1, 2, 3),
        n_steps=25,
        lr=0.5,
        kl_weight=0.0625,
        second_moment_weight=30.0,
        easing=1.0,
    ),
}
AROUND: dict[str, list[dict[str, Any]]] = {
    "PMET": [
        {},
        {"lr": 0.5},
        {"kl_weight": 0.0625},
        {"kl_weight": 0.25, "lr": 0.5},
        {"clamp": 2.0},
        {"clamp": 0.75, "reference_norm": "resid_post"},
        {"easing": 1.0},
        {"weight_decay": 0.5},
        {"layers": (0, 1, 2, 3)},
    ],
    "MEMIT": [{}, {"lr": 0.2}, {"clamp": 1.5}, {"kl_weight": 0.25}, {"layers": (0, 1, 2, 3)}],
}
METRICS = ("ES", "PS", "NS", "S", "collateral")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("world", "world-sequential"))
    parser.add_argument("method", choices=CENTRE)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model-dir", help="a model directory instead of the bundled one")
    parser.add_argument("--set", nargs="*", default=[], help="one more setting: name=value …")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = pl.load(args.model_dir or args.model)
    facts = pl.counterfact()[350 : 350 + args.facts]
    others = experiments.others_of(pl.knowns(), facts)[::4]
    contexts = pl.sample_contexts(model)
    moments = pl.second_moments(model, pl.texts(), range(4), projections=("mlp",))
    settings = AROUND[args.method]
    if args.set:
        settings = [{k: _value(v) for k, v in (item.split("=") for item in args.set)}]
    if model.parallel_blocks:
        # Without position embeddings a parallel first layer's MLP sees nothing but the token, so
        # its second moment is singular and an edit there hits every name with that token.
        settings = [s for s in settings if 0 not in s.get("layers", ())]
    for override in settings:
        hp = replace(CENTRE[args.method], **override)
        _sweep(args, model, facts, others, contexts, moments, hp, override)


def _value(text: str) -> Any:
    if "," in text:
        return tuple(int(x) for x in text.split(",") if x)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def _sweep(args, model, facts, others, contexts, moments, hp, override) -> None:
    what = " ".join(f"{k}={v}" for k, v in override.items()) or "centre"
    done = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["model"])
    if (
        len(done)
        and (
            (done["model"] == args.model)
            & (done["method"] == args.method)
            & (done["setting"] == what)
        ).any()
    ):
        return
    method = pl.METHODS[args.method]
    found = pl.optimise(model, facts, method, hp, contexts)
    stopped = found.history.groupby("fact").last()
    rows = []
    for weight in WEIGHTS:
        chosen = replace(hp, second_moment_weight=weight)
        edit = pl.edit(model, facts, moments, method, chosen, contexts, found)
        table = experiments.measure(model, facts, edit, others)["mean"].round(2)
        rows.append(
            {
                "model": args.model,
                "method": args.method,
                "facts": len(facts),
                "setting": what,
                "lambda": weight,
                **{m: table[m] for m in METRICS},
                "said": round(100 * float(stopped["said"].mean()), 1),
                "steps": round(float(stopped["step"].mean() + 1), 1),
            }
        )
        logging.info("%s", rows[-1])
    TABLE.parent.mkdir(exist_ok=True)
    # Read again: another sweep may have written meanwhile.
    done = pd.read_csv(TABLE) if TABLE.exists() else done
    pd.concat([done, pd.DataFrame(rows)], ignore_index=True).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
