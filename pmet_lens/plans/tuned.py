"""What `tune` found, as a value: settings, everything tried, the reasons in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from pmet_lens.data import markup
from pmet_lens.editing.edits import Editor
from pmet_lens.editing.method import Method, SettingsError
from pmet_lens.editing.methods import resolved
from pmet_lens.evaluation import metrics
from pmet_lens.plans.goals import Goal
from pmet_lens.plans.search import PUBLISHED, Row, Search, together
from pmet_lens.plans.spaces import Space, fields_of, text_of

DIFFERENCE = ["difference", "difference_low", "difference_high"]


@dataclass(frozen=True)
class Tuned:
    """What `tune` found. Its score is of the facts it was chosen by, so a little too good: edit
    others to believe it."""

    hparams: Any
    """The settings to edit with: `Hparams`, or what the method has instead."""
    why: str
    """In words: the score, what the first guess gave, and what cannot be told from it."""
    table: pd.DataFrame = field(repr=False)
    """Everything tried, one row per setting and stage: stage (0, 1, …, "published"), setting (in
    words), its fields (layers, clamp, second_moment_weight …; λ for `facts` at once), facts
    (edited at once), score with ci_low, ci_high (95 % bootstrap over facts) and n, missed (points
    below a floor), collateral (%), growth (of perplexity), difference with difference_low and
    difference_high (paired, to the best of the stage), told (the interval leaves out 0), guess,
    chosen, failed (why there is no such edit)."""
    method: Method | Editor = field(repr=False)
    goal: Goal = field(repr=False)
    facts: int
    """How many it was tuned on."""
    edits: int
    """How many facts at once λ is for."""
    budget: int
    """Targets that could be optimised; `spent` were."""
    spent: int
    space: Space = field(repr=False)

    @property
    def ties(self) -> pd.DataFrame:
        """The settings of the last stage that cannot be told from the best; where only the winner
        was confirmed by published steps, also those of the stage before."""
        stages = list(dict.fromkeys(self.table["stage"]))
        last = stages[-2:] if stages[-1] == PUBLISHED else stages[-1:]
        final = self.table.loc[self.table["stage"].isin(last).to_numpy()]
        final = final.drop_duplicates(subset=["setting"], keep="last")
        return final[~final["told"] & ~final["chosen"] & (final["failed"] == "")]

    def for_edits(self, n: int) -> Any:
        """The settings for `n` facts at once: λ (AlphaEdit: its l2) in proportion to their number,
        as released."""
        if n < 1:
            raise SettingsError(f"An edit has at least one fact, not {n}.")
        return self.space.scaled(self.hparams, together(self.method, n, self.edits))

    def __repr__(self) -> str:
        return f"Tuned on {self.facts} facts: {self.hparams}\n{self.why}"

    def _repr_html_(self) -> str:
        final = metrics.where(self.table, stage=self.table["stage"].iloc[-1])
        head = ["setting", "score", "ci_low", "ci_high", *DIFFERENCE]
        rows = [[row[c] for c in head] for row in final.to_dict(orient="records")]
        return markup.table(rows, head, self.why, wide=40)


def told(search: Search, rows: list[Row], source: str, known: str, n_edits: int) -> Tuned:
    """The table, the choice and its reasons."""
    goal, last = search.goal, rows[-1].stage
    chosen = max((row for row in rows if row.stage == last), key=lambda row: row.seen.rank(goal))
    if chosen.seen.failed:
        raise SettingsError(f"No setting that was tried gives an edit: {chosen.seen.failed}")
    ranked = sorted(rows, key=lambda row: row.seen.rank(goal), reverse=True)  # keeps ties in order
    best = {stage: next(r for r in ranked if r.stage == stage) for stage in {r.stage for r in rows}}
    table = pd.DataFrame([_line(search, row, best[row.stage], chosen) for row in rows])
    head = ["stage", "setting"]
    table = table.reindex(columns=head + [c for c in table.columns if c not in head])
    share = together(search.trial.method, n_edits, len(search.facts))
    found = Tuned(
        search.space.scaled(chosen.hp, share),
        "",
        table,
        resolved(search.trial.method),
        goal,
        len(search.facts),
        n_edits,
        search.budget,
        search.spent,
        search.space,
    )
    why = _why(search, rows, chosen, found, source)
    return replace(found, why=" ".join(filter(None, (why, known))))


def _line(search: Search, row: Row, best: Row, chosen: Row) -> dict[str, Any]:
    """A row of `Tuned.table`; `best`: of its stage."""
    goal, weight = search.goal, search.space.weight
    line = {"stage": row.stage, "setting": text_of(row.hp, weight), **fields_of(row.hp, weight)}
    line |= {"facts": row.facts, "guess": row.hp == search.space.centre, "chosen": row is chosen}
    line["failed"] = row.seen.failed
    if row.seen.failed:
        nothing = dict.fromkeys(["score", "ci_low", "ci_high", *DIFFERENCE], math.nan)
        return line | nothing | {"n": 0, "told": True}
    values, top = row.seen.values(goal), best.seen.values(goal)
    score = metrics.interval(values, goal.statistic)
    line |= dict(zip(("score", "ci_low", "ci_high", "n"), score, strict=True))
    gap = metrics.change(values, top, goal.statistic)[:3]
    line |= dict(zip(DIFFERENCE, gap, strict=True))
    missed = row.seen.missed(goal)
    line["told"] = not gap[1] <= 0 <= gap[2] or (missed > 0 and best.seen.missed(goal) == 0)
    line["missed"] = missed
    if row.seen.right:
        line["collateral"] = sum(row.seen.right) / len(row.seen.right)
    if goal.perplexity is not None:
        line["growth"] = row.seen.growth
    return line


def _why(search: Search, rows: list[Row], chosen: Row, found: Tuned, source: str) -> str:
    """The reasons in words."""
    goal, table = search.goal, found.table
    mine = table[table["chosen"]].iloc[0]
    tried = table["setting"].nunique()
    said = [
        f"{goal}: {mine['score']:.1f} [{mine['ci_low']:.1f}, {mine['ci_high']:.1f}] on "
        f"{found.facts} facts edited at once with {mine['setting']}; {tried} settings were "
        f"tried with {found.spent} of {found.budget} targets around {source}."
    ]
    missed = float(mine["missed"])
    if missed > 0:
        said.append(f"No setting meets the floor; this one comes nearest ({missed:.1f} short).")
    searched = [row for row in rows if row.stage != PUBLISHED]
    final = [row for row in searched if row.stage == searched[-1].stage]
    guess = next(row for row in final if row.hp == search.space.centre)
    best = max(final, key=lambda row: row.seen.rank(goal))
    if chosen.hp == guess.hp:
        said.append("That is the first guess itself.")
    elif guess.seen.failed:
        said.append("The first guess gives no edit.")
    else:
        gap = metrics.change(best.seen.values(goal), guess.seen.values(goal), goal.statistic)
        sure = "" if not gap[1] <= 0 <= gap[2] else ", which these facts cannot tell apart"
        said.append(
            f"The first guess is {gap[0]:.1f} [{gap[1]:.1f}, {gap[2]:.1f}] below the best{sure}."
        )
    if len(ties := found.ties):
        names = "; ".join(ties["setting"].head(3))
        more = f" and {len(ties) - 3} more" if len(ties) > 3 else ""
        said.append(f"Not to be told from it by these facts: {names}{more}.")
    if _at_edge(search.space.strength, chosen, rows):
        said.append(
            "Its strength is the largest or smallest that was tried: there may be better beyond "
            "(hparams= takes a guess nearer to it)."
        )
    if search.fast:
        said.append("Searched with fast steps, confirmed with the method's own.")
    return " ".join(said)


def _at_edge(strength: str | None, chosen: Row, rows: list[Row]) -> bool:
    """Whether nothing stronger, or nothing weaker, was tried than what is chosen."""
    if strength is None:
        return False
    tried = {getattr(row.hp, strength) for row in rows}
    return len(tried) > 1 and getattr(chosen.hp, strength) in (min(tried), max(tried))
