"""The page of the models, from the tables of `model_tables.py`: `docs/models.md`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from common import of, read

import pmet_lens as pl

METHODS = ("unedited", "PMET", "+ W_O", "MEMIT", "AlphaEdit", "ROME", "EMMET")
METHODS += ("FT-W", "FT+L", "MEND")
COMPONENTS = {"resid_post": "output", "attn_out": "attention", "mlp_out": "MLP"}
SCORES = ("S", "ES", "PS", "NS", "EA", "PA", "NA")
HEAD = """# Every model, step by step

What this package does with two real models and with its own, from loading to an adapter. The
command `make model-tables` makes this page; a model that was not fetched is left out
(`pmet-lens models` lists them). The numbers as CSV: `figures/results/models/`.

Real models are asked the 455 facts of {where}`pmet_lens.real_facts`, bundled ones those of the
invented world. Intervals are 95 % bootstrap intervals over facts. *Logits*: the largest difference
of a logit from those of transformers alone, on eight prompts, and the largest logit."""
TRACE = """## Where they recall

The causal trace ({where}`pmet_lens.causal_trace`): the subject's tokens are corrupted with noise (3
standard deviations of what enters layer 0), the clean value is put back at one place, and the share
of the lost probability of the answer that comes back is told; per component and place at the layer
where it is highest, which makes the numbers a little too high. Attention and MLP are restored in
several layers around it together, the output of a layer alone (that of the last layer at the last
token is all there is, so it gives 1)."""
EDITS = """## Edits by every method

Per cent, higher is better. ES, PS, NS: the share of rewrite, paraphrase and neighbour prompts on
which the wanted answer is likelier; S their harmonic mean; EA, PA, NA: the same with every token of
the answer the arg-max. Not all neighbours of a real fact are known to the model: compare NS and NA
with the row *unedited*. "+ W_O" is PMET that writes into the attention's output projection, too.
The settings are below; none was tuned here."""
CHECKS = """## What becomes of an edit

*Undone*: weights and logits are the same bits again after the edit was taken back. Then the largest
difference of a logit, on eight prompts, from those of the edited model: *loaded*, of the edit
saved, read again and applied; *merged*, of the edited model saved with `save_pretrained` and read
by transformers alone; *adapter*, of the edit as a LoRA adapter on the unedited model, in peft. 0:
the same bits. *Moved*: the largest change of a logit by the edit itself."""
SETTINGS = """## Settings

Bundled models have settings of their own ({where}`pmet_lens.HPARAMS`). Of the real ones the layers
are given, and all else is as released for the method, λ by the number of facts. The clamp is in
units of the norm named behind it."""


def page(tables: Path) -> str:
    """The page as Markdown, from the tables in a folder."""
    models, trace = read(tables, "models"), read(tables, "trace")
    scores, checks = in_order(read(tables, "scores")), in_order(read(tables, "checks"))
    parts = [HEAD, table_of_models(models), TRACE, table_of_traces(trace), EDITS]
    if missing := [name for name in models["model"] if name not in set(trace["model"])]:
        parts.insert(-1, f"Not traced yet: {', '.join(missing)}.")
    for name in models["model"]:
        own = of(scores, model=name)
        parts += [f"**{name}**, {int(own['n'].max())} facts at once", table_of_scores(own)]
        parts += refused(of(checks, model=name))
        if missing := set(METHODS[1:]) - set(of(checks, model=name)["method"]):
            parts.append(f"Not measured yet: {', '.join(sorted(missing, key=METHODS.index))}.")
    parts += [CHECKS, table_of_checks(checks), SETTINGS, settings(checks), made(models)]
    return "\n\n".join(parts) + "\n"


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of every model by `METHODS`."""
    parts = [of(table, model=name) for name in dict.fromkeys(table["model"])]
    key = {"by": "method", "key": lambda m: m.map(METHODS.index), "kind": "stable"}
    return pd.concat([part.sort_values(**key) for part in parts])


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def spread(row: Any, digits: int = 1) -> str:
    """A mean and its interval."""
    values = (round(v, digits) + 0.0 for v in (row.mean_, row.ci_low, row.ci_high))  # no -0.0
    mean, low, high = (f"{v:.{digits}f}" for v in values)
    return f"{mean} [{low}, {high}]"


def table_of_models(models: pd.DataFrame) -> str:
    head = ["model", "architecture", "parameters", "layers", "vocabulary", "weights"]
    head += ["logits", "knows (per cent)", "relations"]
    rows = [
        [
            m.model,
            m.architecture,
            f"{m.parameters / 1e6:.1f} M",
            m.layers,
            f"{m.vocabulary:,}",
            m.weights,
            f"{m.logits:.0e} (of {m.largest:.0f})",
            f"{spread(m)}, n = {m.n}",
            m.relations,
        ]
        for m in models.rename(columns={"known": "mean_"}).itertuples()
    ]
    return markdown(head, rows)


def table_of_traces(trace: pd.DataFrame) -> str:
    places, rows, n = list(dict.fromkeys(trace["place"])), [], int(trace["n"].max())
    for (model, stream, window), own in trace.groupby(["model", "stream", "window"], sort=False):
        at = own.rename(columns={"recovered": "mean_"}).set_index("place")
        found = [at.loc[place] if place in at.index else None for place in places]
        cells = ["" if c is None else f"{spread(c, 2)}, layer {int(c.layer)}" for c in found]
        of_fewer = ["" if c is None or c.n == n else f", {int(c.n)} facts" for c in found]
        cells = [cell + fewer for cell, fewer in zip(cells, of_fewer, strict=True)]
        rows.append([model, f"{COMPONENTS[stream]} ({window})", *cells])
    whole = trace[trace["n"] == n].groupby("model", sort=False).first().itertuples()
    odds = ", ".join(f"{m.Index} {m.p_clean:.2f} and {m.p_corrupted:.2f}" for m in whole)
    said = f"{n} facts, or as many as have such a token. Mean probability of the answer without and"
    said += f" with the noise: {odds}."
    return f"{markdown(['model', 'component (layers restored)', *places], rows)}\n\n{said}"


def table_of_scores(scores: pd.DataFrame) -> str:
    cells = scores.rename(columns={"mean": "mean_"})
    cells = cells.assign(text=[spread(row) for row in cells.itertuples()])
    wide = cells.pivot(index="method", columns="metric", values="text")
    wide = wide.loc[list(dict.fromkeys(scores["method"])), list(SCORES)]
    return markdown(["method", *SCORES], [list(row) for row in wide.itertuples()])


def refused(checks: pd.DataFrame) -> Iterator[str]:
    for row in checks.dropna(subset="refused").itertuples():
        yield f"{row.method}: {row.refused}"


def table_of_checks(checks: pd.DataFrame) -> str:
    head = ["model", "method", "rank", "undone", "loaded", "merged", "adapter", "moved"]
    rows = []
    for row in checks[checks["refused"].isna()].itertuples():
        gaps = [f"{gap:.0e}" if gap else "0" for gap in (row.loaded, row.merged, row.adapter)]
        undone = "yes" if row.undone else "no"
        rows.append([row.model, row.method, int(row.rank), undone, *gaps, f"{row.moved:.1f}"])
    return markdown(head, rows)


def settings(checks: pd.DataFrame) -> str:
    own = checks[checks["refused"].isna()]
    same = own.groupby(["model", "settings"], sort=False)["method"].agg(", ".join).reset_index()
    return markdown(["model", "methods", "settings"], same[["model", "method", "settings"]].values)


def made(models: pd.DataFrame) -> str:
    lines = [
        f"- {m.model}: second moments of {m.tokens:,} tokens of {m.text}; {m.made}"
        for m in models.itertuples()
    ]
    return "\n".join(["## How and when", "", *lines])


def told(hparams: Any, solver: Any = None) -> str:
    """Strengths in words, without those that the solver does not read."""
    if isinstance(hparams, pl.MendHparams):
        return f"strength {hparams.strength:g}"
    if isinstance(hparams, pl.FineTuneHparams):
        bound = hparams.norm_constraint
        end = "" if bound is None else f", bound {bound:g}"
        return f"layer {hparams.layer}; {hparams.n_steps} steps, lr {hparams.lr:g}{end}"
    if isinstance(solver, pl.NullSpace):
        protects = f", null space below {hparams.null_space_threshold:g}"
        protects += f", weight there {hparams.null_space_l2:g}"
    else:
        exact = isinstance(solver, pl.Exact)
        protects = "" if exact else f", λ {hparams.second_moment_weight:g}"
    return (
        f"layer{'s' * (len(hparams.layers) > 1)} {', '.join(map(str, hparams.layers))}; "
        f"{hparams.n_steps} steps, "
        f"lr {hparams.lr:g}, clamp {hparams.clamp:g} ({hparams.reference_norm}), "
        f"decay {hparams.weight_decay:g}, KL {hparams.kl_weight:g}, easing {hparams.easing:g}"
        f"{protects}"
    )
