"""Numbers in sentences: each is a cell of a committed table, put there by `quotes.py`.

A sentence is told by its words, in which a mark stands for every number: # a whole number, #.# one
with a digit behind the point, +# and +#.# one with its sign. No page has the words twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from common import of, read

RESULTS = Path(__file__).resolve().parent / "results"
SMOL, GEMMA = "smollm2-135m", "gemma-3-270m"
FAST, PUBLISHED, ALONE = ", fast steps", ", published steps", "w/o δ^a"
WHOLE = "TL hidden state, sqrt spread"
DIFFERENCE = ("difference", "difference_low", "difference_high")
HOP = "free portability (second hop)"
SEARCHED = {"model": SMOL, "run": "MEMIT", "stage": "3"}
"""The last stage of the search that a grid judges."""
MARK = re.compile(r"\+?#(?:\.#+)?")
NUMBER = r"[+−]?\d[\d,]*(?:\.\d+)?"


class Said(NamedTuple):
    """Words of a page, and the numbers for their marks."""

    page: str
    words: str
    numbers: tuple[float, ...]

    @property
    def pattern(self) -> re.Pattern[str]:
        """The words with any numbers."""
        return re.compile(NUMBER.join(map(re.escape, MARK.split(self.words))))

    @property
    def text(self) -> str:
        """The words with their numbers."""
        marks = MARK.findall(self.words)
        if len(marks) != len(self.numbers):
            raise ValueError(f"{len(self.numbers)} numbers for the marks of {self.words!r}")
        numbers = iter(self.numbers)
        return MARK.sub(lambda mark: shown(next(numbers), mark.group()), self.words)


def shown(number: float, mark: str) -> str:
    """The number as a page writes it."""
    digits = len(mark.partition(".")[2])
    text = f"{number:{'+' * mark.startswith('+')},.{digits}f}"
    if not float(text.replace(",", "")):
        text = text.lstrip("+-")  # no zero has a sign
    return text.replace("-", "−")


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


def of_edit(model: str, edits: int, run: str, *metrics: str) -> list[float]:
    """Means of the edits of CounterFact's records."""
    where = {"model": model, "edits": edits, "run": run, "benchmark": "facts"}
    return [cell("real/edits", "mean", metric=metric, **where) for metric in metrics]


def on_zsre(model: str, *runs: str) -> list[float]:
    """Scores of 100 edits of zsRE."""
    where = {"model": model, "edits": 100, "benchmark": "zsre", "metric": "score"}
    return [cell("real/edits", "mean", run=run, **where) for run in runs]


def ablated(model: str, run: str, *metrics: str) -> list[float]:
    """Means of an ablation."""
    where = {"model": model, "run": run}
    return [cell("real/ablations", "mean", metric=metric, **where) for metric in metrics]


def held(model: str, run: str, factor: float, *metrics: str) -> list[float]:
    """Means of an edit with so many times its tuned strength."""
    where = {"model": model, "run": run, "factor": factor}
    return [cell("real/strength", "mean", metric=metric, **where) for metric in metrics]


def gap(model: str, run: str, metric: str, edits: int = 100, table: str = "edits") -> list[float]:
    """A paired difference (to MEMIT; of an ablation: to PMET) and its interval."""
    where: dict[str, object] = {"model": model, "edits": edits, "run": run, "metric": metric}
    where |= {"benchmark": "facts"} if table == "edits" else {}
    return [cell(f"real/{table}", column, **where) for column in DIFFERENCE]


def without(model: str, run: str, metric: str = "S") -> list[float]:
    """The same of an ablation."""
    return gap(model, run, metric, table="ablations")


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


def answered(model: str, *methods: str) -> list[float]:
    """The EA of 20 facts edited with released strengths."""
    where = {"model": model, "settings": "released", "quantity": "EA"}
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


def said() -> list[Said]:
    """Every sentence, with what its numbers are now."""
    best = "MEMIT" + PUBLISHED  # on Gemma
    results = {
        "restoring the FFN's outputs at the subject's last token in early layers brings # "
        "(SmolLM2) and # % (Gemma) of the answer back, those of MHSA there # and # %; at the last "
        "token MHSA brings # and # %.": [
            *restored("mlp_out", "last subject token"),
            *restored("attn_out", "last subject token"),
            *restored("attn_out", "last"),
        ],
        "(variance #.## and #.## on SmolLM2, #.## and #.## on Gemma)": [
            number
            for both in zip(
                claimed("MHSA holds general patterns", "number"),
                claimed("MHSA holds general patterns"),
                strict=True,
            )
            for number in both
        ],
        "carries the donor's answer with it (# and # % of the pairs)": [
            100 * share for share in claimed("MHSA output at the answer position")
        ],
        "of which SmolLM2 knows # % and Gemma # %;": [
            cell("real/recall", "mean", model=model, list="CounterFact", relation="all")
            for model in (SMOL, GEMMA)
        ],
        "EA is # and #), on zsRE (# and #; FT-W #) and at 300 (#.# and #.#, +#.# [+#.#, +#.#])": [
            *of_edit(SMOL, 20, "PMET", "EA"),
            *of_edit(SMOL, 20, "MEMIT", "EA"),
            *on_zsre(SMOL, "MEMIT", "PMET", "FT-W"),
            *of_edit(SMOL, 300, "MEMIT", "S"),
            *of_edit(SMOL, 300, "PMET", "S"),
            *gap(SMOL, "PMET", "S", 300),
        ],
        "AlphaEdit's with 0.3 of its tuned ridge: EA # with # % of": held(
            SMOL, "AlphaEdit", 0.3, "EA", "collateral"
        ),
        "word for word in # and # % (+# [+#, #]), and in paraphrases less often "
        "(+#.# [+#.#, +#.#]).": [
            *of_edit(GEMMA, 100, "PMET", "EA"),
            *of_edit(GEMMA, 100, best, "EA"),
            *gap(GEMMA, "PMET", "EA"),
            *gap(GEMMA, "PMET", "PA"),
        ],
        "PMET keeps # % [#, #], MEMIT # % [#, #] (# by fast steps), and MEMIT held back ten times "
        "more keeps # to # % and": [
            *interval(GEMMA, "PMET", "collateral"),
            *interval(GEMMA, best, "collateral"),
            *of_edit(GEMMA, 100, "MEMIT", "collateral"),
            *sorted(
                held(GEMMA, "MEMIT", 10, "collateral") + held(GEMMA, best, 10, "collateral")
            ),
        ],
        "PMET gives more answers (EA # and #, +#.# [#.#, #.#]; paraphrases word for word +#.# "
        "[#.#, #.#]) for #.# [#.#, #.#] of the neighbours, S # and #.": [
            *of_edit(GEMMA, 300, "PMET", "EA"),
            *of_edit(GEMMA, 300, "MEMIT", "EA"),
            *gap(GEMMA, "PMET", "EA", 300),
            *gap(GEMMA, "PMET", "PA", 300),
            *cost(gap(GEMMA, "PMET", "NS", 300)),
            *of_edit(GEMMA, 300, "PMET", "S"),
            *of_edit(GEMMA, 300, "MEMIT", "S"),
        ],
        "MEMIT is #.# points ahead [#.#, #.#], and on zsRE # [#, #] (# and #; fine-tuning # and "
        "#).": [
            *cost(gap(GEMMA, "PMET", "S", 1)),
            *cost(
                cell("real/edits", column, model=GEMMA, run="PMET", metric="score")
                for column in DIFFERENCE
            ),
            *on_zsre(GEMMA, "MEMIT", "PMET", "FT-W", "FT+L"),
        ],
        "PMET is worse on Gemma (S #, EA #, collateral #), on SmolLM2 better (# and #).": [
            *of_edit(GEMMA, 100, "PMET" + PUBLISHED, "S", "EA", "collateral"),
            *of_edit(SMOL, 100, "PMET", "S"),
            *of_edit(SMOL, 100, "PMET" + FAST, "S"),
        ],
        "S # (+#.# [#.#, #.#] against MEMIT), paraphrases word for word +#.# [#.#, #.#], of what "
        "nobody edited # % instead of # (+# [#, #]).": [
            *of_edit(GEMMA, 100, ALONE + PUBLISHED, "S"),
            *gap(GEMMA, ALONE + PUBLISHED, "S"),
            *gap(GEMMA, ALONE + PUBLISHED, "PA"),
            *of_edit(GEMMA, 100, ALONE + PUBLISHED, "collateral"),
            *of_edit(GEMMA, 100, best, "collateral"),
            *gap(GEMMA, ALONE + PUBLISHED, "collateral"),
        ],
        "with the root spread MEMIT is not better (#), so": ablated(
            GEMMA, WHOLE + PUBLISHED, "S"
        ),
        "On SmolLM2 the same costs answers (EA #).": of_edit(SMOL, 100, ALONE, "EA"),
        "breaks Gemma before the hundredth (perplexity #);": of_edit(
            GEMMA, 100, "ROME", "perplexity"
        ),
        "with 300 facts S is MEMIT's (# and #, +#.# [+#.#, #.#]) and more answers come word for "
        "word (EA +# [#, #]), but of what nobody edited # % are left (MEMIT #) and perplexity is "
        "#.": [
            *of_edit(SMOL, 300, "ROME", "S"),
            *of_edit(SMOL, 300, "MEMIT", "S"),
            *gap(SMOL, "ROME", "S", 300),
            *gap(SMOL, "ROME", "EA", 300),
            *of_edit(SMOL, 300, "ROME", "collateral"),
            *of_edit(SMOL, 300, "MEMIT", "collateral"),
            *of_edit(SMOL, 300, "ROME", "perplexity"),
        ],
        "edits little (EA # of 100 facts, # of 300).": [
            *of_edit(SMOL, 100, "FT+L", "EA"),
            *of_edit(SMOL, 300, "FT+L", "EA"),
        ],
        "by fast steps (S +#.# [+#.#, #.#]), and by published ones much is won: +#.# [#.#, #.#] "
        "(EA # instead of #, paraphrases word for word # instead of # %)": [
            *without(GEMMA, ALONE),
            *without(GEMMA, ALONE + PUBLISHED),
            *ablated(GEMMA, ALONE + PUBLISHED, "EA"),
            *ablated(GEMMA, "PMET" + PUBLISHED, "EA"),
            *ablated(GEMMA, ALONE + PUBLISHED, "PA"),
            *ablated(GEMMA, "PMET" + PUBLISHED, "PA"),
        ],
        "word for word in # instead of # % (fast: S +#.# [+#.#, +#.#], # instead of #)": [
            *ablated(SMOL, ALONE, "EA"),
            *ablated(SMOL, "PMET", "EA"),
            *without(SMOL, ALONE + FAST),
            *ablated(SMOL, ALONE + FAST, "EA"),
            *ablated(SMOL, "PMET" + FAST, "EA"),
        ],
        "by either steps (S +#.# [#.#, #.#] and +#.# [#.#, #.#]), on Gemma by published ones "
        "(+#.# [#.#, #.#], neighbours +#.#), and worse by fast ones (+#.# [+#.#, +#.#]).": [
            *without(SMOL, WHOLE),
            *without(SMOL, WHOLE + FAST),
            *without(GEMMA, WHOLE + PUBLISHED),
            without(GEMMA, WHOLE + PUBLISHED, "NS")[0],
            *without(GEMMA, WHOLE),
        ],
        "does harm: +#.# [+#.#, +#.#] on SmolLM2 (EA #), +#.# [+#.#, +#.#] on Gemma.": [
            *without(SMOL, "+ W_O"),
            *ablated(SMOL, "+ W_O", "EA"),
            *without(GEMMA, "+ W_O"),
        ],
        "on Gemma fewer answers come word for word (# instead of # %).": [
            *ablated(GEMMA, "linear spread", "EA"),
            *ablated(GEMMA, "PMET", "EA"),
        ],
        "the subject's first costs # and # points, the last of the prompt # and # (on Gemma it "
        "says the answer more often, # %,": [
            -without(SMOL, "at the first subject token")[0],
            -without(GEMMA, "at the first subject token")[0],
            -without(SMOL, "at the last token")[0],
            -without(GEMMA, "at the last token")[0],
            *ablated(GEMMA, "at the last token", "EA"),
        ],
        "are worth #.# points on SmolLM2, on Gemma #.# [#.#, #.#] of the paraphrases. **Fewer "
        "layers:** the last alone costs # and #.# [#.#, #.#] points;": [
            -without(SMOL, "without prefixes")[0],
            *cost(without(GEMMA, "without prefixes", "PS")),
            -without(SMOL, "the last critical layer only")[0],
            *cost(without(GEMMA, "the last critical layer only")),
        ],
        "(20 facts of CounterFact, EA # % against MEMIT's #)": answered(SMOL, "PMET", "MEMIT"),
        "the new answer is still at #.# nats a token, with MEMIT's at #.##;": nats(
            SMOL, ("released", "PMET", "all"), ("released", "MEMIT", "all")
        ),
        "Of the #.# nats that are gained δ^m brings #.# alone and δ^a #.#.": gained(
            SMOL, ("released", "PMET")
        ),
        "has gone #.# times as far as asked when the last layer is written (#.# times for δ^m "
        "alone, #.# for MEMIT)": written(
            SMOL, "output", ("released", "PMET"), ("released", ALONE), ("released", "MEMIT")
        ),
        "it goes #.# times as far, and the targets still stand at #.# nats (MEMIT's at #.##): of "
        "the #.# that are left after the write they are the larger part, and EA stays at #.": [
            *written(SMOL, "output", ("tuned", "PMET")),
            *nats(SMOL, ("tuned", "PMET", "all"), ("tuned", "MEMIT", "all")),
            *written(SMOL, "nll", ("tuned", "PMET")),
            cell("real/arrival", "mean", model=SMOL, settings="tuned", method="PMET",
                 quantity="EA"),
        ],
        "as good as MEMIT's (#.## and #.## nats) and little overshoots (#.#)": [
            *nats(GEMMA, ("released", "PMET", "all"), ("released", "MEMIT", "all")),
            *written(GEMMA, "output", ("released", "PMET")),
        ],
        "δ^a alone leaves #.# nats, δ^m alone #.#, and what is written #.# (EA # against #); "
        "optimised without δ^a the targets stand at #.## and what is written at #.## (EA #).": [
            *nats(GEMMA, ("released", "PMET", "attn_out"), ("released", "PMET", "mlp_out")),
            *written(GEMMA, "nll", ("released", "PMET")),
            *answered(GEMMA, "PMET", "MEMIT"),
            *nats(GEMMA, ("released", ALONE, "all")),
            *written(GEMMA, "nll", ("released", ALONE)),
            *answered(GEMMA, ALONE),
        ],
        "bring Gemma's answers to #.## nats, with δ^m alone they stand at #.#, and after the "
        "write at #.#; fast steps: #.##, #.# and #.#.": [
            *nats(GEMMA, *(("tuned", "PMET" + PUBLISHED, what) for what in ("all", "mlp_out"))),
            *written(GEMMA, "nll", ("tuned", "PMET" + PUBLISHED)),
            *nats(GEMMA, ("tuned", "PMET", "all"), ("tuned", "PMET", "mlp_out")),
            *written(GEMMA, "nll", ("tuned", "PMET")),
        ],
        "MEMIT's answers stand at #.## and #.## after the write.": written(
            GEMMA, "nll", ("tuned", best), ("tuned", "MEMIT")
        ),
    }  # fmt: skip
    first = {
        "MEMIT edits SmolLM2 better than PMET (S # and #, the new answer word for word in # and "
        "# %); on Gemma both come to S #, PMET with fewer answers word for word (# and # %) and "
        "far less harm (# and # % of what nobody edited stays);": [
            *of_edit(SMOL, 100, "MEMIT", "S"),
            *of_edit(SMOL, 100, "PMET", "S"),
            *of_edit(SMOL, 100, "MEMIT", "EA"),
            *of_edit(SMOL, 100, "PMET", "EA"),
            *same(of_edit(GEMMA, 100, "PMET", "S"), of_edit(GEMMA, 100, best, "S")),
            *of_edit(GEMMA, 100, "PMET", "EA"),
            *of_edit(GEMMA, 100, best, "EA"),
            *of_edit(GEMMA, 100, "PMET", "collateral"),
            *of_edit(GEMMA, 100, best, "collateral"),
        ],
        "which is written nowhere anyway, S is # there:": of_edit(
            GEMMA, 100, ALONE + PUBLISHED, "S"
        ),
    }  # fmt: skip
    shipped = {
        "(# to # % of their norm for the three facts below, layer by layer), so that it is not "
        "stored as coarsely as they are: of it F16 lost #.# to #.# % (for #.# MB a weight more "
        "than Q4_1), BF16 # to # %, Q8_0 # to # %; Q4_1, which the weights had, would lose most "
        "or all of it (# to # %).": [
            *stored("F16", "change"),
            *stored("F16", "rounded"),
            most("stored", "bytes", stored="F16") / 1e6,
            *stored("BF16", "rounded"),
            *stored("Q8_0", "rounded"),
            *stored("Q4_1", "rounded"),
        ],
    }
    seen = {
        "MEMIT gives # % of the edited prompts word for word under teacher forcing and # % of the "
        "paraphrases; its free answers hold the new one in # % and # %, inside the model's chat "
        "frame in # % and # %, are nothing but it in # %, and what follows by a second hop is "
        "answered in # %. PMET: # and #; # and #; # and #; #; #.": [
            number
            for method in ("MEMIT", "PMET")
            for number in (
                *asked(SMOL, method, "EA", "PA", "EF", "PF"),
                *framed(SMOL, method, "EF", "PF"),
                *asked(SMOL, method, "EX", HOP),
            )
        ],
        "NS falls from # to # (PMET #), but of the neighbours that were answered rightly in free "
        "answers (# %) # % are left (PMET # %)": [
            asked(SMOL, method, metric)[0]
            for metric in ("NS", "NF")
            for method in ("unedited", "MEMIT", "PMET")
        ],
        "the gap is not in free answers (# and # % hold the new one, as many as under teacher "
        "forcing) but in the frame: a question that it was never trained on leaves # and # % of "
        "them, and of what it knew about the edited subjects MEMIT leaves # %, PMET # %.": [
            *same(bundled(asked, "EF"), bundled(asked, "EA")),
            *bundled(framed, "EF"),
            *bundled(asked, "locality"),
        ],
        "by MEMIT more of the edits hold in a chat (# %), NS stays at #, and yet of the neighbours "
        "that were answered rightly (# %) # % are left; second hops follow in # %. PMET carries "
        "further there, for more harm: # % in a chat, # against # % of the paraphrases asked so, "
        "# % of the second hops, NS #, neighbours # %, and of what else was known about the "
        "subjects # % are left (MEMIT #).": [
            *framed(GEMMA, "MEMIT", "EF"),
            *asked(GEMMA, "MEMIT", "NS"),
            *asked(GEMMA, "unedited", "NF"),
            *asked(GEMMA, "MEMIT", "NF", HOP),
            *framed(GEMMA, "PMET", "EF", "PF"),
            *framed(GEMMA, "MEMIT", "PF"),
            *asked(GEMMA, "PMET", HOP, "NS", "NF", "free locality"),
            *asked(GEMMA, "MEMIT", "free locality"),
        ],
    }
    refreshed, both = "targets refreshed", "δ^a + δ^m"
    variants = {
        "dominates at 100 facts (S #.# against MEMIT's #.# and PMET's #.#; the new answer word "
        "for word in #, # and # %; NS #, # and #; of what nobody edited #, # and # % stay).": [
            tried(SMOL, run, metric)[0]
            for metric in ("S", "EA", "NS", "collateral")
            for run in (refreshed, "MEMIT", "PMET")
        ],
        "(linear spread) gains #.# points [#.#, #.#] of S over PMET at 100 facts": [
            cell("variants/compared", column, model=SMOL, edits=100, metric="S", against="PMET",
                 run=both + ", linear spread")
            for column in DIFFERENCE
        ],
        "(100 facts: S #.# and #.#, MEMIT #.#, PMET #.#; of what nobody edited # and # % stay, "
        "with MEMIT #, with PMET #).": [
            tried(GEMMA, run, metric)[0]
            for metric in ("S", "collateral")
            for run in (both, both + ", linear spread", "MEMIT", "PMET")
        ],
        "at 100 has fewer neighbours right than MEMIT (NS # and #). A fading δ^a spares more "
        "neighbours than PMET at 100 facts (NS # and #), and gives the new answer less often word "
        "for word (# and # %).": [
            *tried(GEMMA, refreshed, "NS"),
            *tried(GEMMA, "MEMIT", "NS"),
            *tried(GEMMA, "δ^a fades", "NS"),
            *tried(GEMMA, "PMET", "NS"),
            *tried(GEMMA, "δ^a fades", "EA"),
            *tried(GEMMA, "PMET", "EA"),
        ],
        "less often word for word than MEMIT (PA # and # at 100 facts)": [
            *tried(SMOL, both, "PA"),
            *tried(SMOL, "MEMIT", "PA"),
        ],
        "loses # points on the invented model (paraphrases # instead of #).": [
            -cell("variants/compared", "difference", model="world-sequential", edits=100,
                  metric="S", against="PMET", run=refreshed),
            *tried("world-sequential", refreshed, "PS"),
            *tried("world-sequential", "PMET", "PS"),
        ],
        "# % of 100 real facts word for word instead of 78, MEMIT #). That is of facts which it "
        "knows; of CounterFact's, which it does not, # % of 100, MEMIT # ": [
            *fair("PMET", "EA"),
            *fair("MEMIT", "EA"),
            *of_edit(SMOL, 100, "PMET", "EA"),
            *of_edit(SMOL, 100, "MEMIT", "EA"),
        ],
    }  # fmt: skip
    results |= {
        "end at S # to # and cannot be told apart in it; FT-W is # points below. What differs is "
        "beside it: PMET leaves more of what nobody edited than MEMIT (collateral # and # %, # "
        "points [#, #]) and EMMET (# [#, #]);": [
            *ends(fair(run, "S")[0] for run in ("PMET", "MEMIT", "AlphaEdit", "EMMET")),
            -fairly("FT-W", "S")[0],
            *fair("PMET", "collateral"),
            *fair("MEMIT", "collateral"),
            *cost(fairly("MEMIT", "collateral")),
            *cost(fairly("EMMET", "collateral")),
        ],
        "EMMET carries furthest into paraphrases (PS #)": fair("EMMET", "PS"),
        "new answer comes word for word in # % (MEMIT #);": [
            *fair("PMET", "EA"),
            *fair("MEMIT", "EA"),
        ],
        "by the same fast steps, ends at S #.#, #.# points above the #.# that": [
            most("tune/grid_MEMIT", "mean"),
            most("tune/grid_MEMIT", "mean") - most("tune/tried", "score", **SEARCHED),
            most("tune/tried", "score", **SEARCHED),
        ],
        "on the 100 other facts it is #.# points [+#.#, #.#] above what was tuned, and it gives "
        "the new answer word for word # points [#, #] less often and leaves # points [#, #] less": [
            *judged("S"),
            *cost(judged("EA")),
            *cost(judged("collateral")),
        ],
    }
    pages = {
        "README.md": first,
        "docs/results.md": results,
        "docs/free_answers.md": seen,
        "docs/ablations.md": variants,
        "docs/ship.md": shipped,
    }
    return [
        Said(page, words, tuple(numbers))
        for page, sentences in pages.items()
        for words, numbers in sentences.items()
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


def fairly(run: str, metric: str) -> list[float]:
    """Its difference to PMET and the interval."""
    return [cell("tune/compared", c, model=SMOL, run=run, metric=metric) for c in DIFFERENCE]


def judged(metric: str) -> list[float]:
    """The best settings of a grid against those that were tuned."""
    where = {"run": "best of the grid", "metric": metric}
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
