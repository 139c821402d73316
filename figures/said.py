"""Numbers in sentences: each is a cell of a committed table, put there by `quotes.py`.

A sentence is told by its words, in which a mark stands for every number: # a whole number, #.# one
with a digit behind the point, +# and +#.# one with its sign. No page has the words twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from cells import (
    ALONE,
    DIFFERENCE,
    FAST,
    GEMMA,
    HOP,
    LOADS,
    NUMBER,
    ON_KNOWN,
    PARTS_ON_KNOWN,
    PER_UNIT,
    PUBLISHED,
    SEARCHED,
    SMOL,
    WHOLE,
    WIDTHS,
    ablated,
    all_facts,
    answered,
    asked,
    behind,
    best_by,
    better_than_guess,
    bundled,
    cell,
    claimed,
    cost,
    ends,
    fair,
    fairly,
    framed,
    gained,
    gap,
    held,
    interval,
    judged,
    more_memory,
    most,
    nats,
    of_edit,
    on_gpu,
    on_zsre,
    released,
    restored,
    rows,
    same,
    scaled,
    sizes,
    spent,
    stored,
    tried,
    waited,
    without,
    written,
)

Cells = dict[str, list[float]]
"""Words, and what stands for their marks."""
MARK = re.compile(r"\+?#(?:\.#+)?")


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


def first_page() -> Cells:
    """README.md."""
    best = "MEMIT" + PUBLISHED  # on Gemma
    return {
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
        "which is written nowhere anyway, S is # there.": of_edit(
            GEMMA, 100, ALONE + PUBLISHED, "S"
        ),
        "PMET is ahead on SmolLM2 (S # and #) and level on Gemma (# and #): what a search": [
            of_edit(model, 100, run, "S", table=ON_KNOWN)[0]
            for model in (SMOL, GEMMA)
            for run in ("PMET", "MEMIT")
        ],
        "two bundled models that know # facts of an invented world,": all_facts(),
        "in # seconds on two cores the first time, then in # (on a slow machine in a minute); "
        "`Hparams.fast()` takes #.# s for 20 facts instead of #.#, and #.# points of NS; 10,000 "
        "facts in SmolLM2 in #.# minutes of an H100:": [
            waited("session", "from load to an edited answer, the first time on this model"),
            waited("session", "from load to an edited answer, the second time on this model"),
            waited("session", "edit 20 facts at once, PMET, fast"),
            waited("session", "edit 20 facts at once, PMET"),
            -waited("fast_preset_pmet", "NS", "difference"),
            LOADS[-1] * sum(on_gpu("PMET", "targets", "write")) / 60_000,
        ],
    }  # fmt: skip


def real_models() -> Cells:
    """docs/results.md on real models."""
    best = "MEMIT" + PUBLISHED  # on Gemma
    return {
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


def invented_world() -> Cells:
    """docs/results.md on the bundled models."""
    return {
        "Both bundled models know an invented world of # facts;": all_facts(),
        "750 edits are #.## per MLP unit, as 10,000 on GPT-J are #.##, and a third of all these "
        "models know.": [most("paper/scaling", "load"), PER_UNIT],
        "At 100 edits PMET and MEMIT stand at S # to #, with ROME, EMMET and AlphaEdit close "
        "behind; at 316 at # to #.": [
            *ends(scaled(100, "PMET", "MEMIT")),
            *ends(scaled(316, "PMET", "MEMIT")),
        ],
        "at 750 every closed-form method has broken (S # to #).": ends(
            scaled(750, "PMET", "MEMIT", "AlphaEdit")
        ),
    }


def fair_fight() -> Cells:
    """The same on methods that were tuned alike."""
    return {
        "ROME, EMMET and AlphaEdit are # to # points below PMET, beyond the intervals.": ends(
            -fairly(run, "S", model)[0]
            for model in ("world", "world-sequential")
            for run in ("ROME", "EMMET", "AlphaEdit")
        ),
        "more often word for word (PA # and #, PMET #);": [
            fair(run, "PA")[0] for run in ("MEMIT", "AlphaEdit", "PMET")
        ],
        "with released strengths it was # % of 100 such facts": [released("EA")],
        "released strengths and tuned settings bring # and # % of 20, tuned ones # % of 100": [
            *answered(SMOL, "PMET"),
            *answered(SMOL, "PMET", settings="tuned"),
            *of_edit(SMOL, 100, "PMET", "EA"),
        ],
        "The first guess of these four is # to # points of S lower, which 40 facts cannot tell "
        "apart; that of FT-W is # points lower.": [
            *ends(behind(run) for run in ("PMET", "MEMIT", "AlphaEdit", "EMMET")),
            behind("FT-W"),
        ],
        "The first guess is #.# points from the tuned settings there.": [
            abs(judged("S", "first guess")[0])
        ],
        "the best of a last layer lies between #.# and #.#, the best of a clamp between #.# and "
        "#.#, the best of a λ between #.# and #.#.": [
            number
            for what in ("layers", "clamp", "second_moment_weight")
            for number in ends(best_by(what))
        ],
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
        "EMMET carries furthest into paraphrases (PS #) for # points of the neighbours.": [
            *fair("EMMET", "PS"),
            -fairly("EMMET", "NS")[0],
        ],
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


def speed() -> Cells:
    """docs/performance.md."""
    plan = {"grid": "1,000 edits at once of smollm2-135m, fast steps"}
    table = {
        f"| {load if load < 1_000 else f'{load:,}'} |{' #.# |' * 8}": [
            cell("mass_edit/scores", "mean", method=method, load=load, metric=metric)
            for method in ("MEMIT", "PMET")
            for metric in ("S", "EA", "free rewrite", "perplexity")
        ]
        for load in LOADS
    }
    return table | {
        "a step runs # rows, forward and back, through the # layers above the edited ones, and "
        "through the unembedding where a loss is read, #.# GFLOP. Products of # rows run at # "
        "GFLOP/s (of 1,024 rows at #), so that they alone take #.# s of an edit's #.# s;": [
            waited("one_fact", "rows of its products"),
            waited("one_fact", "layers above the edited ones"),
            waited("one_fact", "operations of a step (GFLOP)"),
            waited("one_fact", "rows of its products"),
            waited("one_fact", "rate of such products (GFLOP/s)"),
            waited("one_fact", "rate of 1,024 rows (GFLOP/s)"),
            waited("one_fact", "products of 30 steps at that rate (s)"),
            waited("one_fact", "an edit (s)"),
        ],
        "Settings come #.# times sooner, prefixes #.# times, the lens #.# times, an edit by the "
        "published steps #.# times.": [
            waited("waits", what, "ratio")
            for what in (
                "be told settings, from 1 fact",
                "sample context prefixes",
                "lens on 1 fact, all streams and layers",
                "edit one fact, PMET",
            )
        ],
        "said #.# minutes for 1,000 edits at once of SmolLM2-135M with fast steps and its "
        "answers, on one thread of a busy machine; it took #.#, #.## of that": [
            cell("plan", "estimate_s", **plan) / 60,
            cell("plan", "real_s", **plan) / 60,
            cell("plan", "real_over_estimate", **plan),
        ],
        "take #.# minutes by the measured rate (# times the procedure written plainly), second "
        "moments of # tokens #.#, evaluation #.#": [
            waited("gptj_shapes", "targets", "the paper's load", 1),
            waited("gptj_shapes", "targets", "ratio"),
            waited("gptj_shapes", "second moments", "the paper's load"),
            waited("gptj_shapes", "second moments", "the paper's load", 1),
            waited("gptj_shapes", "evaluation", "the paper's load", 1),
        ],
        "(one H100; # and # ms of it per fact)": [
            sum(on_gpu(method, "targets", "write")) for method in ("MEMIT", "PMET")
        ],
        "Unedited: S # to #, perplexity #.#.": [
            *ends(rows("mass_edit/scores", method="unedited", metric="S")["mean"]),
            most("mass_edit/scores", "mean", method="unedited", metric="perplexity"),
        ],
        "what is lost is in NS, #.# points of the neighbours": [
            -waited("fast_preset_pmet", "NS", "difference")
        ],
        "PMET gains #.# points of S by them on Gemma, and loses #.# on SmolLM2": [
            of_edit(GEMMA, 100, "PMET", "S")[0] - of_edit(GEMMA, 100, "PMET" + PUBLISHED, "S")[0],
            of_edit(SMOL, 100, "PMET", "S")[0] - of_edit(SMOL, 100, "PMET" + FAST, "S")[0],
        ],
        "it is no good bargain: #.# points of S and #.# of PA are lost.": [
            -waited("fast_preset_memit", metric, "difference") for metric in ("S", "PA")
        ],
        "(10,000 facts in SmolLM2: # MB instead of #.# GB of factors)": [
            6 * 8 * sum(WIDTHS) * min(WIDTHS) / 1e6,
            6 * 8 * sum(WIDTHS) * 10_000 / 1e9,
        ],
        "From 3,000 facts on each costs # kB. Counted, its key and residual of the layer at work "
        "are # in float64, and that layer's factors another #;": [
            more_memory(3_000, 10_000),
            8 * sum(WIDTHS) / 1_000,
            8 * sum(WIDTHS) / 1_000,
        ],
    }


def limits() -> Cells:
    """docs/limits.md."""
    panel = "panel_smollm2-135m"
    return {
        "The bundled models are small (#.# and #.# M parameters)": sizes(),
        "says the edited answer #.# s after the click": [waited(panel, "an edit", "first answer")],
        "The whole table of answers comes #.# s later.": [
            waited(panel, "an edit", "all of it") - waited(panel, "an edit", "first answer")
        ],
        "hold the event loop up for #.## s at most, except once a session for #.## s:": [
            max(waited(panel, what, "loop held") for what in ("undo it", "ask", "side by side")),
            waited(panel, "an edit", "loop held"),
        ],
        "(SmolLM2 #.## s, Gemma longer)": [waited(panel, "open it", "loop held")],
    }


def differences() -> Cells:
    """docs/paper_and_code.md."""
    return {
        "| #.# and #.# M parameters, one invented world": sizes(),
        "750 edits are #.## per MLP unit, as 10,000 on GPT-J are #.## |": [
            most("paper/scaling", "load"),
            PER_UNIT,
        ],
    }


def free_answers() -> Cells:
    """docs/free_answers.md."""
    return {
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


def variants() -> Cells:
    """docs/ablations.md."""
    refreshed, both = "targets refreshed", "δ^a + δ^m"
    return {
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
        "# % of 100 real facts word for word instead of #, MEMIT #). That is of facts which it "
        "knows; of CounterFact's, which it does not, # % of 100, MEMIT # ": [
            *fair("PMET", "EA"),
            released("EA"),
            *fair("MEMIT", "EA"),
            *of_edit(SMOL, 100, "PMET", "EA"),
            *of_edit(SMOL, 100, "MEMIT", "EA"),
        ],
    }  # fmt: skip


def shipped() -> Cells:
    """docs/ship.md."""
    return {
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


def whole_study() -> Cells:
    """figures/README.md."""
    early = ("recall", "trace", "claims", "gain")
    return {
        "# minutes on two cores that had nothing else to do, the settings found, texts and facts "
        "the package's own (`real/known/made.csv`, what that run said of itself):": [max(spent())],
        "Minutes of SmolLM2 and Gemma: recall, trace, statements and deltas # and #, settings and "
        "edits of 1 to 100 facts # and #, ablations # and #, edits of the most facts # and #.": [
            number
            for stages in (early, ("edits",), ("ablations",), ("many",))
            for number in spent(*stages)
        ],
    }


def known_facts() -> Cells:
    """docs/results.md on facts that the models know."""
    both = ("PMET", "MEMIT")

    def each(model: str, edits: int, metric: str) -> list[float]:
        return [of_edit(model, edits, run, metric, table=ON_KNOWN)[0] for run in both]

    return {
        "with 100 facts PMET is ahead (S # and #, +#.# [#.#, #.#]; of what nobody edited # and # % "
        "stay), with 20 MEMIT (S # and #, +#.# [+#.#, #.#]).": [
            *each(SMOL, 100, "S"),
            *gap(SMOL, "PMET", "S", table=ON_KNOWN),
            *each(SMOL, 100, "collateral"),
            *each(SMOL, 20, "S"),
            *gap(SMOL, "PMET", "S", 20, ON_KNOWN),
        ],
        "the two cannot be told apart with 100 facts (S # and #, +#.# [+#.#, #.#]; EA # and #), "
        "nor in what nobody edited (# and # % stay, +#.# [+#.#, #.#]).": [
            *each(GEMMA, 100, "S"),
            *gap(GEMMA, "PMET", "S", table=ON_KNOWN),
            *each(GEMMA, 100, "EA"),
            *each(GEMMA, 100, "collateral"),
            *gap(GEMMA, "PMET", "collateral", table=ON_KNOWN),
        ],
        "on the 20 facts of the search that was #.# points of S [#.#, #.#] better": (
            better_than_guess(SMOL, "MEMIT")
        ),
        "(perplexity #, unedited #, PMET #)": [
            *of_edit(SMOL, 100, "MEMIT", "perplexity", table=ON_KNOWN),
            *of_edit(SMOL, 0, "unedited", "perplexity", table=ON_KNOWN),
            *of_edit(SMOL, 100, "PMET", "perplexity", table=ON_KNOWN),
        ],
        "without δ^a SmolLM2 loses #.# points of S [#.#, #.#] (EA # instead of #), as the paper "
        "says, Gemma nothing (+#.# [+#.#, #.#]; EA # and #); writing W_O, too, costs answers on "
        "both (EA # and #).": [
            *cost(without(SMOL, ALONE, table=PARTS_ON_KNOWN)),
            *ablated(SMOL, ALONE, "EA", table=PARTS_ON_KNOWN),
            *ablated(SMOL, "PMET", "EA", table=PARTS_ON_KNOWN),
            *without(GEMMA, ALONE, table=PARTS_ON_KNOWN),
            *ablated(GEMMA, ALONE, "EA", table=PARTS_ON_KNOWN),
            *ablated(GEMMA, "PMET", "EA", table=PARTS_ON_KNOWN),
            *ablated(SMOL, "+ W_O", "EA", table=PARTS_ON_KNOWN),
            *ablated(GEMMA, "+ W_O", "EA", table=PARTS_ON_KNOWN),
        ],
        "there the two end at S # and # (": [
            *fair("MEMIT", "S"),
            *fair("PMET", "S"),
        ],
    }


def study_took() -> Cells:
    """docs/results.md."""
    return {
        "(`make real`: # minutes on two cores where settings are found on the way and the facts "
        "are the package's own;": [max(spent())],
    }


PAGES: dict[str, tuple[Callable[[], Cells], ...]] = {
    "README.md": (first_page,),
    "docs/results.md": (study_took, real_models, known_facts, invented_world, fair_fight),
    "docs/performance.md": (speed,),
    "docs/limits.md": (limits,),
    "docs/paper_and_code.md": (differences,),
    "docs/free_answers.md": (free_answers,),
    "docs/ablations.md": (variants,),
    "docs/ship.md": (shipped,),
    "figures/README.md": (whole_study,),
}


def said() -> list[Said]:
    """Every sentence, with what its numbers are now."""
    return [
        Said(page, words, tuple(numbers))
        for page, parts in PAGES.items()
        for part in parts
        for words, numbers in part().items()
    ]
