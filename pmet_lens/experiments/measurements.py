"""Measured edits: the numbers a results table is made of, the same way for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from pmet_lens.data.facts import Fact
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.locate_and_edit import Moments, edit, edit_sequentially
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.editing.solvers import Factor
from pmet_lens.editing.targets import Targets
from pmet_lens.evaluation import ability, metrics, scoring
from pmet_lens.evaluation.ability import others_of as others_of
from pmet_lens.models.model import Model, Site

OnFact = Callable[[int, int], object]


def measure(
    model: Model,
    facts: Sequence[Fact],
    edit: Edit | None = None,
    others: Sequence[Fact] = (),
    *,
    generate: int = 0,
) -> pd.DataFrame:
    """`summarise` of the facts with `edit` applied (None: the model as it is), and, where `others`
    are given, the row "collateral": the share of those facts, none of them edited, that is still
    answered right (per cent, higher is better). GE and RS are those of the first `generate` facts.
    The model is left as it was."""
    if edit is not None:
        with edit.applied(model):
            return measure(model, facts, None, others, generate=generate)
    rows = scoring.evaluate(model, facts)
    if generate and any(f.generation for f in facts[:generate]):
        texts = scoring.evaluate(model, facts[:generate], generate=True)
        rows = pd.concat([rows, texts.loc[texts["kind"] == "generation"]], ignore_index=True)
    table = scoring.summarise(rows)
    if others:
        right = 100 * scoring.recall(model, others)["correct"].to_numpy()
        table.loc["collateral"] = list(metrics.interval(right))
    return table.astype({"n": int})


def one_at_a_time(
    model: Model,
    facts: Sequence[Fact],
    moments: Moments,
    method: Method,
    hparams: Hparams,
    contexts: Sequence[str],
    targets: Targets,
    on_fact: OnFact | None = None,
) -> pd.DataFrame:
    """Every fact edited alone, each on the clean model: the rows of `evaluate` of all of them.

    `targets` are those of all facts (facts never interact, so they are optimised once).
    """
    factorised: dict[Site, Factor] = {}
    rows = []
    for i, fact in enumerate(facts):
        single = edit(
            model,
            [fact],
            moments,
            method,
            hparams,
            contexts,
            targets[i : i + 1],
            factorised=factorised,
        )
        with single.applied(model):
            rows.append(scoring.evaluate(model, [fact]).assign(fact=i))
        if on_fact is not None:
            on_fact(i + 1, len(facts))
    return pd.concat(rows, ignore_index=True)


def sequential(
    model: Model,
    facts: Sequence[Fact],
    moments: Moments,
    method: Method,
    hparams: Hparams,
    contexts: Sequence[str],
    *,
    batch_size: int,
    protect: bool = False,
    others: Sequence[Fact] = (),
    collapse: float = 3.0,
    on_fact: OnFact | None = None,
) -> pd.DataFrame:
    """Edit batch after batch and measure after each: does the model keep the earlier edits, and
    does it hold together?

    One row per number of edits and metric: edits, metric, mean, ci_low, ci_high, n, collapsed.
    Metrics: those of `measure` on *all* facts edited so far; perplexity on held-out text of the
    world (`ability.general_ability`); weight_norm, the largest ‖W + ΣΔ‖ / ‖W‖ of a written weight
    (Frobenius, no interval). `edits` 0 is the model before. collapsed: from the first batch on
    after which perplexity is more than `collapse` times what it was before, or not finite.

    `protect`: see `edit_sequentially`. The model is left as it was.
    """
    sites = [Site(layer, projection) for layer in hparams.layers for projection in method.write]
    norms = {site: model.weight(site).norm() for site in sites}
    tables: dict[int, pd.DataFrame] = {}

    def look(done: int, _: Edit | None = None) -> None:
        table = ability.general_ability(model, prompts=(), others=())
        if done:
            table = pd.concat([measure(model, facts[:done], None, others), table])
        grown = max(float(model.weight(site).norm() / norms[site]) for site in sites)
        table.loc["weight_norm"] = [grown, grown, grown, len(sites)]
        tables[done] = table
        if on_fact is not None:
            on_fact(done, len(facts))

    look(0)
    edit_sequentially(
        model, facts, moments, method, hparams, contexts,
        batch_size=batch_size, protect=protect, on_batch=look,
    )  # fmt: skip
    limit = collapse * tables[0].loc["perplexity", "mean"]
    broken = [n for n, t in tables.items() if not t.loc["perplexity", "mean"] <= limit]
    frames = [
        t.reset_index().assign(edits=n, collapsed=bool(broken) and n >= min(broken))
        for n, t in tables.items()
    ]
    columns = ["edits", "metric", "mean", "ci_low", "ci_high", "n", "collapsed"]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One tidy frame of many `measure` tables: columns run, metric, mean, ci_low, ci_high, n."""
    frames = [t.reset_index().assign(run=name) for name, t in tables.items()]
    columns = ["run", "metric", "mean", "ci_low", "ci_high", "n"]
    return pd.concat(frames, ignore_index=True).reindex(columns=columns)
