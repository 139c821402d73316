"""Cells of committed tables, as the sentences of `said.py` need them.

Scores are per cent and differences points, as in the tables; a list holds what one sentence tells
in its order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pandas as pd
from common import of, read

RESULTS = Path(__file__).resolve().parent / "results"
BENCH = RESULTS.parents[1] / "tests" / "benchmarks" / "results"
NUMBER = r"[+−]?\d[\d,]*(?:\.\d+)?"
SMOL, GEMMA = "smollm2-135m", "gemma-3-270m"
FAST, PUBLISHED, ALONE = ", fast steps", ", published steps", "w/o δ^a"
WHOLE = "TL hidden state, sqrt spread"
DIFFERENCE = ("difference", "difference_low", "difference_high")
HOP = "free portability (second hop)"
ON_KNOWN, PARTS_ON_KNOWN = "real/known/edits", "real/known/ablations"
BUNDLED = ("world", "world-sequential")
LOADS = (100, 1_000, 9_921)
PER_UNIT = 10_000 / 16_384
"""10,000 edits per MLP unit of GPT-J."""
WIDTHS = (576, 1_536)
"""Of SmolLM2: of its residual stream, and of an MLP's keys."""
SEARCHED = {"model": SMOL, "run": "MEMIT", "stage": "3"}
"""The last stage of the search that a grid judges."""


def cell(table: str, column: str, **where: object) -> float:
    """The one cell of a table of `results`."""
    own = rows(table, **where)
    if len(own) != 1:
        raise ValueError(f"{len(own)} rows of {table} where {where}")
    return float(own[column].iloc[0])


def most(table: str, column: str, **where: object) -> float:
    """The largest of such cells."""
    return float(rows(table, **where)[column].max())


def rows(table: str, **where: object) -> pd.DataFrame:
    """The rows with these values."""
    return of(_table(table), **where)


@cache
def _table(name: str) -> pd.DataFrame:
    return read(RESULTS, name)


def told(page: Path, column: str, *row: str, at: int = 0) -> float:
    """The number `at` this place in the cell of a page's table whose row begins with these cells;
    the page is the record, there is no CSV beside it."""
    head: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif tuple(cells[: len(row)]) == row and column in head:
            found = re.findall(f"-?{NUMBER}", cells[head.index(column)])
            return float(found[at].replace(",", ""))
    raise ValueError(f"{page.name} has no row {row} with {column!r}")


def waited(name: str, what: str, column: str = "here", at: int = 0) -> float:
    """Of a page of benchmarks: what a row says."""
    return told(BENCH / f"{name}.md", column, what, at=at)


def of_edit(
    model: str, edits: int, run: str, *metrics: str, table: str = "real/edits"
) -> list[float]:
    """Means of edits: of CounterFact's records, or of facts that the model knows (`ON_KNOWN`)."""
    where = {"model": model, "edits": edits, "run": run, "benchmark": "facts"}
    return [cell(table, "mean", metric=metric, **where) for metric in metrics]


def better_than_guess(model: str, run: str) -> list[float]:
    """By how much the settings that were found for them beat the first guess, where both were
    tried, with the interval: the words of the search, kept with the settings."""
    own = rows("real/known/settings", model=model, method=run)["why"].iloc[0]
    words = re.search(rf"first guess is ({NUMBER}) \[(-?{NUMBER}), ({NUMBER})\] below", str(own))
    if words is None:
        raise ValueError(f"{own} says nothing of the first guess")
    return [float(number) for number in words.groups()]


def on_zsre(model: str, *runs: str) -> list[float]:
    """Scores of 100 edits of zsRE."""
    where = {"model": model, "edits": 100, "benchmark": "zsre", "metric": "score"}
    return [cell("real/edits", "mean", run=run, **where) for run in runs]


def ablated(model: str, run: str, *metrics: str, table: str = "real/ablations") -> list[float]:
    """Means of an ablation."""
    where = {"model": model, "run": run}
    return [cell(table, "mean", metric=metric, **where) for metric in metrics]


def held(model: str, run: str, factor: float, *metrics: str) -> list[float]:
    """Means of an edit with so many times its tuned strength."""
    where = {"model": model, "run": run, "factor": factor}
    return [cell("real/strength", "mean", metric=metric, **where) for metric in metrics]


def gap(
    model: str, run: str, metric: str, edits: int = 100, table: str = "real/edits"
) -> list[float]:
    """A paired difference (to MEMIT; of an ablation: to PMET) and its interval."""
    where: dict[str, object] = {"model": model, "edits": edits, "run": run, "metric": metric}
    where |= {"benchmark": "facts"} if table.endswith("edits") else {}
    return [cell(table, column, **where) for column in DIFFERENCE]


def without(model: str, run: str, metric: str = "S", table: str = "real/ablations") -> list[float]:
    """The same of an ablation."""
    return gap(model, run, metric, table=table)


def cost(difference: Iterable[float]) -> list[float]:
    """A difference and its interval, told as what is lost."""
    mean, low, high = difference
    return [-mean, -high, -low]


def nats(model: str, *added: tuple[str, str, str]) -> list[float]:
    """What the new answer stands at with some deltas added: (settings, method, which)."""
    names = ("settings", "method", "added")
    return [
        cell("real/losses", "mean", model=model, **dict(zip(names, way, strict=True)))
        for way in added
    ]


def written(model: str, quantity: str, *ways: tuple[str, str]) -> list[float]:
    """What has arrived once every layer is written: (settings, method)."""
    found = []
    for settings, method in ways:
        own = rows("real/arrival", model=model, settings=settings, method=method)
        last = own[(own["quantity"] == quantity) & (own["written"] == own["written"].max())]
        found.append(float(last["mean"].iloc[0]))
    return found


def answered(model: str, *methods: str, settings: str = "released") -> list[float]:
    """The EA of 20 facts, edited with released strengths where nothing else is asked."""
    where = {"model": model, "settings": settings, "quantity": "EA"}
    return [cell("real/arrival", "mean", method=method, **where) for method in methods]


def restored(stream: str, place: str) -> list[float]:
    """The most that comes back of a component, %, on both models."""
    where = {"stream": stream, "place": place}
    return [100 * most("real/trace", "recovered", model=model, **where) for model in (SMOL, GEMMA)]


def stored(kind: str, column: str) -> list[float]:
    """The least and the most of the edited tensors that are stored so, %."""
    found = 100 * rows("stored", stored=kind)[column]
    return [float(found.min()), float(found.max())]


def claimed(statement: str, column: str = "against") -> list[float]:
    """A number of one of the paper's statements, on both models."""
    for text in _table("real/claims")["statement"].unique():
        if text.startswith(statement):
            statement = text
    return [
        cell("real/claims", column, model=model, statement=statement) for model in (SMOL, GEMMA)
    ]


def asked(model: str, method: str, *metrics: str, how: str = "as edited") -> list[float]:
    """Means of 100 facts whose free answers were read."""
    where = {"method": method, "asked": how}
    return [cell(f"free_answers/{model}/scores", "mean", metric=m, **where) for m in metrics]


def framed(model: str, method: str, *metrics: str) -> list[float]:
    """The same inside a chat or a question."""
    return asked(model, method, *metrics, how="framed")


def bundled(look: Callable[..., list[float]], metric: str) -> list[float]:
    """One of them of both methods on a bundled model."""
    return [look("world-sequential", method, metric)[0] for method in ("MEMIT", "PMET")]


def tried(model: str, run: str, metric: str) -> list[float]:
    """The mean of a variant, 100 facts at once."""
    where = {"model": model, "run": run, "metric": metric, "edits": 100}
    other = "PMET" if run == "MEMIT" else "MEMIT"
    return [cell("variants/compared", "mean", against=other, **where)]


def fair(run: str, metric: str) -> list[float]:
    """The mean of a tuned method on SmolLM2."""
    return [cell("tune/compared", "mean", model=SMOL, run=run, metric=metric)]


def fairly(run: str, metric: str, model: str = SMOL) -> list[float]:
    """Its difference to PMET and the interval."""
    return [cell("tune/compared", c, model=model, run=run, metric=metric) for c in DIFFERENCE]


def behind(run: str) -> float:
    """By how much the first guess of settings is behind those found, on the facts of the search."""
    found = rows("tune/tried", model=SMOL, run=run)
    return float(-found[found["guess"] & (found["facts"] == 40)]["difference"].iloc[0])


def best_by(what: str) -> list[float]:
    """The best S of a grid for every value of one setting."""
    grid = rows("tune/grid_MEMIT")
    return list(grid.groupby(grid["settings"].str.extract(rf"{what} ([\d. ]+)")[0])["mean"].max())


def judged(metric: str, run: str = "best of the grid") -> list[float]:
    """The best settings of a grid, or the first guess, against those that were tuned."""
    where = {"run": run, "metric": metric}
    return [cell("tune/judged_MEMIT", column, **where) for column in DIFFERENCE]


def ends(numbers: Iterable[float]) -> list[float]:
    """The least and the most of some."""
    every = sorted(numbers)
    return [every[0], every[-1]]


def interval(model: str, run: str, metric: str) -> list[float]:
    """A mean of 100 edits and its interval."""
    where = {"model": model, "edits": 100, "run": run, "metric": metric, "benchmark": "facts"}
    return [cell("real/edits", column, **where) for column in ("mean", "ci_low", "ci_high")]


def gained(model: str, way: tuple[str, str]) -> list[float]:
    """Nats that both deltas gain, that of the FFN alone, and that of attention alone."""
    before, *after = nats(
        model, *((*way, added) for added in ("nothing", "all", "mlp_out", "attn_out"))
    )
    return [before - now for now in after]


def same(one: list[float], other: list[float]) -> list[float]:
    """A number that is told once of two."""
    if [round(x) for x in one] != [round(x) for x in other]:
        raise ValueError(f"{one} and {other} are told as one number")
    return one


def all_facts() -> list[float]:
    """How many facts the bundled models were asked."""
    return same(*([cell("models/models", "n", model=model)] for model in BUNDLED))


def sizes() -> list[float]:
    """Parameters of the bundled models, millions, the smaller one first."""
    return ends(cell("models/models", "parameters", model=model) / 1e6 for model in BUNDLED)


def scaled(edits: int, *runs: str) -> list[float]:
    """S of so many edits of CounterFact's kind at once, on both bundled models."""
    where = {"benchmark": "counterfact", "edits": edits, "metric": "S"}
    return [
        cell("paper/scaling", "mean", model=model, run=run, **where)
        for model in BUNDLED
        for run in runs
    ]


def released(metric: str) -> float:
    """PMET on 100 real facts with released strengths, by published steps."""
    return waited("fast_preset_pmet", metric, "published steps")


def on_gpu(method: str, *what: str) -> list[float]:
    """Milliseconds per fact of many at once."""
    page = RESULTS / "mass_edit" / "mass_edit.md"
    return [told(page, "ms per fact", part, method) for part in what]


def more_memory(few: int, many: int) -> float:
    """kB per fact from so many on, as the table counts them (1,024 bytes)."""
    table = pd.read_csv(BENCH / "memory.csv").set_index("facts")
    beside = table["peak"] - table["before"]
    return float(beside[many] - beside[few]) * 1_024 / (many - few)


def spent(*stages: str) -> list[float]:
    """Minutes that a whole `make real` spent in these stages (none: in all), on SmolLM2 and on
    Gemma; the larger sum is what the run took, since both begin together."""
    table = _table("real/known/made")
    own = table[table["stage"].isin(stages)] if stages else table
    return [float(of(own, model=model)["minutes"].sum()) for model in (SMOL, GEMMA)]
