"""What many edits in a row leave of the first ones and of the model, measured on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from pmet_lens.data import datasets
from pmet_lens.data.facts import Fact, FactError, listed
from pmet_lens.evaluation import ability, metrics, scoring
from pmet_lens.evaluation.free_answers import Asking
from pmet_lens.evaluation.real_facts import real_facts
from pmet_lens.models.loading import of_the_world
from pmet_lens.models.model import Model, Site

COLUMNS = ("edits", "facts", *("metric", *metrics.INTERVAL), "collapsed")
OTHERS = 200
"""Facts that nobody edits, of which is asked how many the model still recalls."""

ADVICE = "Take fewer edits, more of them at once, protect=True, or a larger λ."


@dataclass
class Checkpoints:
    """What is measured while facts are edited one batch after the other, and when.

        watch = pl.Checkpoints(every=100)
        pl.edit_sequentially(model, facts, moments, "MEMIT", checkpoints=watch)
        watch.table

    A checkpoint asks the facts edited *first*, those edited *last* and *all* so far, and looks at
    the model: perplexity of a fixed text, recall of facts that nobody edits, and how much the
    written weights have grown. It warns, once each, as soon as the model collapses or a weight has
    outgrown itself.
    """

    every: int | Sequence[int] = 100
    """After so many facts, or after each of these numbers of facts, at the end of the batch that
    reaches them; always before the first and after the last."""
    n: int = 20
    """How many of the first and of the last facts are asked."""
    most: int = 100
    """How many of all facts so far, evenly spread, at most."""
    free: bool | Asking = False
    """Whether free answers are asked for, too, and how (`pl.evaluate`)."""
    texts: Iterable[str] | None = None
    """For perplexity; None: those of `pl.general_ability`."""
    others: Fact | Sequence[Fact] | None = None
    """For recall. None: 200 facts of the bundled world, or of `pl.real_facts()`, that are not
    edited; an empty list: none."""
    collapse: float = 3.0
    """The model has collapsed where perplexity is more than so many times what it was, or not
    finite."""
    growth: float = 10.0
    """The Frobenius norm of a written weight, as a multiple of what it was, beyond which it also
    warns: it foretells a collapse, and is none by itself (the bundled models keep perplexity and
    other facts at 4 times)."""
    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS)))
    """What was found so far, one row per number of edits, facts ("first", "last", "all", or "model"
    for what is not about edited facts) and metric: edits, facts, metric, mean, ci_low, ci_high (95
    % bootstrap over facts), n, collapsed (from this checkpoint on). Metrics are those of
    `pl.summarise`, perplexity and recall those of `pl.general_ability`; weight_norm is the largest
    ‖W‖ of a written weight by what it was. edits 0 is the model before. It is filled before
    `on_batch` is called, which can save it."""

    def __post_init__(self) -> None:
        steps = [self.every] if isinstance(self.every, int) else [*self.every]
        if not steps or not all(isinstance(n, int) and n > 0 for n in (*steps, self.n, self.most)):
            raise FactError("every, n and most of Checkpoints take whole numbers of facts ≥ 1.")
        if not (self.collapse > 1 and self.growth > 1):
            raise FactError("collapse and growth of Checkpoints are multiples above 1.")

    def begin(self, model: Model, facts: Sequence[Fact], sites: Sequence[Site]) -> Watch:
        """Look at the model as it is; the table begins anew."""
        self.table = pd.DataFrame(columns=list(COLUMNS))
        return Watch(self, model, facts, sites)


class Watch:
    """`Checkpoints` of one model and list of facts, while its weights at `sites` are edited."""

    def __init__(
        self, of: Checkpoints, model: Model, facts: Sequence[Fact], sites: Sequence[Site]
    ) -> None:
        self.of, self.model, self.facts, self.seen = of, model, facts, 0
        self.norms = {site: float(model.weight(site).norm()) for site in sites}
        self.texts = None if of.texts is None else list(of.texts)
        self.others = _others(model, facts) if of.others is None else listed(of.others)
        self.collapsed = self.outgrown = False
        self.first = self._model()
        self._keep(0, {"model": self.first})

    def __call__(self, done: int) -> None:
        """Measure, if after `done` facts it is time to; the model has all edits so far."""
        every = self.of.every
        reached = (
            done // every > self.seen // every
            if isinstance(every, int)
            else any(self.seen < n <= done for n in every)
        )
        if not reached and done < len(self.facts):
            return
        self.seen = done
        n, so_far = self.of.n, self.facts[:done]
        spread = so_far[:: math.ceil(done / self.of.most)]
        asked = {"first": so_far[:n], "last": so_far[-n:], "all": spread}
        found = {
            name: metrics.summarise(scoring.evaluate(self.model, facts, free=self.of.free))
            for name, facts in asked.items()
        }
        state = self._model()
        self._warn(f"After {done} of {len(self.facts)} facts", state)
        self._keep(done, {**found, "model": state})

    def _model(self) -> pd.DataFrame:
        """Perplexity, recall, and the growth of the weights."""
        found = ability.general_ability(
            self.model, texts=self.texts, prompts=(), others=self.others
        )
        grown = max(
            float(self.model.weight(site).norm()) / norm for site, norm in self.norms.items()
        )
        found.loc["weight_norm"] = [grown, grown, grown, len(self.norms)]
        return found

    def _warn(self, when: str, state: pd.DataFrame) -> None:
        """Say once what has broken, and once what has grown."""
        grown = _mean(state, "weight_norm")
        if not self.outgrown and not grown <= self.of.growth:
            self.outgrown = True
            warnings.warn(
                f"{when} a written weight has {grown:.1f} times its norm (limit "
                f"{self.of.growth:g}): a collapse may follow. {ADVICE}",
                stacklevel=5,
            )
        now, then = _mean(state, "perplexity"), _mean(self.first, "perplexity")
        if "perplexity" in state.index and not (self.collapsed or now <= self.of.collapse * then):
            self.collapsed = True
            warnings.warn(
                f"{when} perplexity is {now:.4g} and was {then:.4g} (limit {self.of.collapse:g} "
                f"times): the model collapses. {ADVICE}",
                stacklevel=5,
            )

    def _keep(self, edits: int, tables: dict[str, pd.DataFrame]) -> None:
        frames = [
            pd.DataFrame(table).rename_axis("metric").reset_index().assign(
                edits=edits, facts=name, collapsed=self.collapsed
            )
            for name, table in tables.items()
        ]  # fmt: skip
        kept = [self.of.table] if len(self.of.table) else []
        table = pd.concat([*kept, *frames], ignore_index=True)
        self.of.table = table.reindex(columns=list(COLUMNS))


def _mean(table: pd.DataFrame, metric: str) -> float:
    found: pd.Series = table["mean"]
    return float(found.to_dict().get(metric, math.nan))


def _others(model: Model, edited: Sequence[Fact]) -> list[Fact]:
    known = datasets.knowns() if of_the_world(model) else real_facts()
    rest = ability.others_of(known, edited)
    return rest[:: max(1, math.ceil(len(rest) / OTHERS))]
