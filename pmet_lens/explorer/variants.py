"""The same fact under variations of PMET, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from pmet_lens.data.facts import Fact
from pmet_lens.editing import locate_and_edit
from pmet_lens.editing.method import Hparams, Method, SettingsError
from pmet_lens.editing.methods import ALPHAEDIT, PMET
from pmet_lens.editing.solvers import Exact, NullSpace, Ridge
from pmet_lens.editing.targets import OnStep, Targets, optimise
from pmet_lens.evaluation import scoring
from pmet_lens.explorer.session import OnProgress, Session
from pmet_lens.models.model import Model, Site

SOLVERS = {"ridge": Ridge(), "exact": Exact(), "null space": NullSpace()}
"""The solvers by name: PMET's and MEMIT's, ROME's and EMMET's, AlphaEdit's."""


def variants(
    attention: Sequence[bool] = (True,),
    write_attention: Sequence[bool] = (False,),
    spread: Sequence[str] = ("sqrt",),
    solver: Sequence[str] = ("ridge",),
) -> dict[str, Method]:
    """PMET in every combination of these choices: whether attention gets a delta (δ^a), whether
    W_O is written too, the spread, the solver (`SOLVERS`). Names say what differs from PMET; W_O
    is not written without δ^a, for nothing would tell it what to produce."""
    out: dict[str, Method] = {}
    for delta, attn, how, by in itertools.product(attention, write_attention, spread, solver):
        if attn and not delta:
            continue
        parts = [
            "" if delta else "w/o δ^a",
            "+ W_O" if attn else "",
            "" if how == "sqrt" else f"{how} spread",
            "" if by == "ridge" else by,
        ]
        out[", ".join(filter(None, parts)) or "PMET"] = Method(
            delta_at=("attn_out", "mlp_out") if delta else ("mlp_out",),
            write=("attn", "mlp") if attn else ("mlp",),
            spread="sqrt" if how == "sqrt" else "linear",
            solver=SOLVERS[by],
        )
    return out


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """`ablate` in one row per method (index): answer, p_new (of the edited prompt),
    paraphrases (per cent that give the new answer), neighbours (per cent whose answer is still
    the old one; NaN where there are none), relative (‖ΔW‖/‖W‖)."""
    rows = {}
    for method, rows_of_it in table.groupby("method", sort=False):
        kinds = {kind: rows_of_it.loc[rows_of_it["kind"] == kind] for kind in scoring.KINDS}
        first, other = kinds["rewrite"].iloc[0], kinds["neighbour"]
        rows[method] = {
            "answer": first["after"],
            "p_new": first["p_after"],
            "paraphrases": 100 * kinds["paraphrase"]["says_new"].astype(float).mean(),
            "neighbours": 100 * (other["after"] == other["before"]).astype(float).mean(),
            "relative": first["relative"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def ablate(
    session: Session,
    fact: Fact,
    methods: Mapping[str, Method],
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """The same fact under each method, on the unedited model, with PMET's strengths (AlphaEdit's
    for what only its solver takes); what is optimised at the same streams is optimised once.

    One row per method and prompt: column method, those of `Session.answers`, and relative
    (‖ΔW‖/‖W‖, the largest of the written weights). Raises as `pl.edit` does.
    """
    model, hp = session.model, _strengths(session)
    targets: dict[Any, Targets] = {}
    tables = []
    with model.live_edits.bare():
        for i, (name, method) in enumerate(methods.items()):
            known, contexts = session.needed(method, hp, on_progress)
            if on_progress is not None:
                on_progress(i, len(methods), name)
            key = (method.delta_at, method.position)
            if key not in targets:
                targets[key] = optimise(model, [fact], method, hp, contexts, on_step)
            made = locate_and_edit.edit(
                model, [fact], known, method, hp, contexts, targets=targets[key]
            )
            size = max(_relative(model, site, d) for site, d in made.deltas.items())
            tables.append(session.answers(fact, made).assign(method=name, relative=size))
    return pd.concat(tables, ignore_index=True).set_index("method").reset_index()


def _strengths(session: Session) -> Hparams:
    hp = session.settings(PMET)
    if not isinstance(hp, Hparams):
        raise TypeError("PMET has no settings here")
    try:
        other = session.settings(ALPHAEDIT) or hp
    except SettingsError:  # none known: those of the class
        other = hp
    return replace(
        hp, null_space_l2=other.null_space_l2, null_space_threshold=other.null_space_threshold
    )


def _relative(model: Model, site: Site, delta: torch.Tensor) -> float:
    return float(delta.double().norm() / model.weight(site).double().norm())
