"""Many facts at once on a real model: `python figures/mass_edit.py --facts FILE --texts FILE`.

The first facts of a file in any form that `pl.read_facts` knows (CounterFact's first 10,000 in
EasyEdit's form, say) are edited into SmolLM2-135M by MEMIT and PMET, 100 and more at once, on the
processor or on an accelerator (`--device auto`). Per method and load: the scores, how many free
answers hold the new one, and the model's general ability. Targets are those of `Hparams.fast`
(`--published`: of all published steps); a fact's do not depend on the load, so that one
optimisation serves every load. Everything is kept in `figures/out/mass_edit` as soon as it is
there, and a run that was cut, or stopped by itself after `--minutes`, goes on.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import manifest
import pandas as pd
import real
import torch
from common import HERE, OUT, legend, make, panels, provenance, read
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import data, evaluation, models, plotting

METHODS = ("MEMIT", "PMET")
LOADS = (100, 300, 1_000, 3_000, 10_000)
SHOWN = ("S", "ES", "PS", "NS", "EA", "PA", "NA", "free rewrite", "free paraphrase")
SHOWN += ("perplexity", "KL", "recall")
DRAWN = {name: name for name in ("S", "ES", "PS", "NS", "EA")}
DRAWN |= {"free rewrite": "free answers, %", "recall": "other facts, %", "perplexity": "perplexity"}
SHARD = 250
"""Facts of which a run that is cut may have to optimise the targets again."""
ASKED = 500
"""Facts whose free answers are read, evenly spread over those edited."""
HELD_OUT, WORDS = 100, 100
"""Texts from the end of the file, and words of each, for perplexity."""


PUBLISHED = """10,000 at once on GPT-J (MEMIT paper, arXiv 2210.07229), S / ES / PS / NS: unedited
22.4 / 15.2 / 17.7 / 83.5, MEMIT 85.8 / 98.9 / 88.6 / 73.7. λ is in proportion to the facts, as
released (0.6 per fact for PMET, 1.5 for MEMIT), so that many edits are written more weakly."""


class Stopped(Exception):
    """The minutes are used up; what is there is kept."""


class Study:
    """One model and one list of facts. The rows of `scores` are method, load, metric, mean, ci_low,
    ci_high (95 % bootstrap over facts), n; of `times` what, method, facts, seconds, device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end = time.monotonic() + 60 * args.minutes
        self.folder, self.strength = args.out, args.strength
        self.folder.mkdir(parents=True, exist_ok=True)
        self.published, self.methods = args.published, args.methods
        self.tables = {name: self._kept(name) for name in ("scores", "times")}
        texts = list(pl.texts(args.texts))
        self.held_out = [" ".join(text.split()[:WORDS]) for text in texts[-HELD_OUT:]]
        self.model = self.timed("load", 1, lambda: pl.load(args.model, device=args.device))
        self.facts = pl.editable(self.model, pl.read_facts(args.facts))[: max(args.loads)]
        self.loads = sorted({min(load, len(self.facts)) for load in args.loads})

        def bench() -> pl.Bench:
            given = texts[:-HELD_OUT], real.N_TOKENS, self.settings, real.LAYERS, SHARD
            return pl.Bench(self.model, self.folder, *given)

        self.bench = self.timed("second moments and prefixes", real.N_TOKENS, bench)

    def settings(self, method: Any) -> pl.Hparams:
        """The strengths that are released for the method, with the layers of this model."""
        hparams = pl.Hparams(real.LAYERS).settled(method, 1)
        return hparams if self.published else hparams.fast()

    def run(self) -> None:
        """Every load of every method, small loads first."""
        here = {(row["method"], row["load"]) for row in self.tables["scores"]}
        if ("unedited", self.loads[-1]) not in here:
            self.unedited()
        for load in self.loads:
            for method in self.methods:
                if (method, load) not in here:
                    self.edited(method, load)

    def unedited(self) -> None:
        n, model = len(self.facts), self.model
        rows = self.timed("evaluation", n, lambda: pl.evaluate(model, self.facts))
        ability = self.ability()
        for load in self.loads:
            free = self.free(self.facts[:load])
            self.add("unedited", load, rows.loc[rows["fact"] < load], free, ability)
        self.keep()

    def edited(self, name: str, load: int) -> None:
        """The first `load` facts by the method of this name, at once."""
        facts, model = self.facts[:load], self.model
        # λ as released: per fact edited at once.
        weight = self.settings(pl.named(name)).second_moment_weight * load * self.strength
        trial = pl.Trial(name, {"second_moment_weight": weight})
        targets = self.targets(trial, facts)
        edit = self.timed("write", load, lambda: self.bench.edit(trial, facts, targets), name)
        with edit.applied(model):
            rows = self.timed("evaluation", load, lambda: pl.evaluate(model, facts), name)
            free = self.timed("free answers", load, lambda: self.free(facts), name)
        ability = self.timed("general ability", load, lambda: self.ability(edit), name)
        self.add(name, load, rows, free, ability)
        self.keep()

    def targets(self, trial: pl.Trial, facts: Sequence[pl.Fact]) -> pl.Targets:
        """Shard by shard, each kept, for as long as there is time."""
        last, done = time.monotonic(), 0
        name = next(name for name in self.methods if pl.named(name) == trial.method)
        known = [r for r in self.tables["times"] if (r["what"], r["method"]) == ("targets", name)]
        begun = sum(row["facts"] for row in known)

        def tell(so_far: int, _: int) -> None:
            nonlocal last, done
            now = time.monotonic()
            if so_far > begun:
                self.time("targets", so_far - max(done, begun), now - last, name)
            last, done = now, so_far
            if now > self.end and so_far < len(facts):
                raise Stopped

        found = self.bench.targets(trial, facts, tell)
        assert found is not None
        return found

    def free(self, facts: Sequence[pl.Fact]) -> dict[str, evaluation.Interval]:
        """How many free answers, greedy and to the end of the sentence, hold the new one: of the
        edited prompts and of their first paraphrases, per cent."""
        some = facts[:: max(1, len(facts) // ASKED)][:ASKED]
        asked = {"free rewrite": [f.text for f in some]}
        asked["free paraphrase"] = [(f.paraphrases or (f.text,))[0] for f in some]
        found = {}
        for name, prompts in asked.items():
            said = models.answers(self.model, prompts, n_tokens=16)
            held = [
                100.0 * (str(f.target_new).casefold() in text.casefold())
                for f, text in zip(some, said, strict=True)
            ]
            found[name] = evaluation.interval(pd.Series(held).to_numpy())
        return found

    def ability(self, edit: pl.Edit | None = None) -> pd.DataFrame:
        """Perplexity of held-out text, what changes on other prompts, other facts recalled."""
        return pl.general_ability(self.model, edit, texts=self.held_out)

    def timed(self, what: str, facts: int, work: Callable[[], Any], method: str = "") -> Any:
        """What `work` gives; its seconds are a row of the times."""
        if time.monotonic() > self.end:
            raise Stopped
        start = time.monotonic()
        found = work()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.time(what, facts, time.monotonic() - start, method)
        return found

    def time(self, what: str, facts: int, seconds: float, method: str) -> None:
        device = str(self.model.device) if hasattr(self, "model") else ""
        row = {"what": what, "method": method, "facts": facts, "seconds": seconds, "device": device}
        self.tables["times"].append(row)
        self.keep()
        sys.stderr.write(f"{method:9} {what}, {facts}: {seconds:.1f} s\n")

    def add(
        self,
        method: str,
        load: int,
        rows: pd.DataFrame,
        free: dict[str, evaluation.Interval],
        ability: pd.DataFrame,
    ) -> None:
        scores = pl.summarise(rows)
        scores = scores.drop([name for name in ("EM", "PM", "NM") if name in scores.index])
        more = pd.DataFrame.from_dict(free, orient="index", columns=scores.columns)
        table = pd.concat([scores, more, ability]).rename_axis("metric").reset_index()
        self.tables["scores"] += [
            {"method": method, "load": load, **row} for row in table.to_dict("records")
        ]

    def keep(self) -> None:
        for name, rows in self.tables.items():
            with data.whole(self.folder / f"{name}.csv") as part:
                pd.DataFrame(rows).to_csv(part, index=False, float_format="%.6g")

    def _kept(self, name: str) -> list[dict[str, Any]]:
        if not (self.folder / f"{name}.csv").exists():
            return []
        rows = read(self.folder, name).fillna({"method": ""})
        return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def page(scores: pd.DataFrame, times: pd.DataFrame, made: str) -> str:
    """Scores and times, as Markdown; `made`: how and when."""
    numbers = scores[["mean", "ci_low", "ci_high"]].itertuples(index=False)
    cells = [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in numbers]
    index = ["load", "method"]
    wide = scores.assign(text=cells).pivot(index=index, columns="metric", values="text")
    wide = wide[[name for name in SHOWN if name in wide]]
    took = times.loc[times["what"] != "load"].groupby(["what", "method"], sort=False)
    each = 1000 * took["seconds"].sum() / took["facts"].sum()
    rows = [["edits at once", "method", *wide.columns], ["---"] * (2 + len(wide.columns))]
    rows += [[*key, *row] for key, row in zip(wide.index, wide.to_numpy(), strict=True)]
    speed = [["what", "method", "ms per fact"], ["---"] * 3]
    speed += [[what, way, f"{ms:.3g}"] for (what, way), ms in each.items()]
    lines = [
        "SmolLM2-135M, the first facts of CounterFact at once: per cent, perplexity and KL (nats),",
        "with 95 % bootstrap intervals over facts, texts or prompts. For comparison, as published:",
        f"{PUBLISHED}",
        "",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    more = [f"| {' | '.join(map(str, row))} |" for row in speed]
    return "\n".join([*lines, "", *more, "", made, ""])


def draw(tables: Path) -> Figure:
    """One panel per measure, one line per method, the model before as a dotted line."""
    scores = read(tables, "scores")
    fig, axes = panels(8.0, 4.4, 2, 4, sharex=True)
    for ax, (metric, title) in zip(axes.flat, DRAWN.items(), strict=True):
        own = scores[scores["metric"] == metric]
        for name, rows in own.groupby("method", sort=False):
            colour = "0.5" if name == "unedited" else plotting.colour_of(str(name))
            ax.plot(rows["load"], rows["mean"], "o-", ms=3, color=colour, label=name)
            ax.fill_between(rows["load"], rows["ci_low"], rows["ci_high"], color=colour, alpha=0.2)
        ax.set_xscale("log")
        ax.set_title(title)
        if metric == "perplexity":
            ax.set_ylim(0)
        else:
            ax.set_ylim(-3, 103)
    for ax in axes[-1]:
        ax.set_xlabel("edits at once")
    legend(fig, axes[0, 0], 3)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--facts", required=True, help="records, in any form pl.read_facts knows")
    parser.add_argument("--texts", required=True, help="text file, one text a line")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--loads", nargs="+", type=int, default=LOADS, metavar="N")
    parser.add_argument("--strength", type=float, default=1.0, help="times the released λ per fact")
    parser.add_argument("--published", action="store_true", help="targets of all published steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then it stops")
    parser.add_argument("--model", default=real.MODEL)
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    parser.add_argument("--out", type=Path, default=OUT / "mass_edit")
    args = parser.parse_args()
    start, study = time.monotonic(), None
    try:
        study = Study(args)
        study.run()
    except Stopped:
        sys.stderr.write("The minutes are used up; the same command goes on.\n")
    except (pl.ModelError, pl.DataError, pl.FactError) as error:
        parser.exit(2, f"{error}\n")
    if study is None or not study.tables["scores"]:
        return
    scores, times = read(args.out, "scores"), read(args.out, "times").fillna({"method": ""})
    made = provenance((time.monotonic() - start) / 60, study.model.device)
    (args.out / "mass_edit.md").write_text(page(scores, times, made), encoding="utf-8")
    make(draw, "fig_mass_edit", args.out, args.out)
    if args.record:
        recorded = HERE / "results" / "mass_edit"
        recorded.mkdir(parents=True, exist_ok=True)
        for name in ("scores.csv", "times.csv", "mass_edit.md", "fig_mass_edit.png"):
            shutil.copy(args.out / name, recorded)
        drawn = {"mass_edit/fig_mass_edit": ["mass_edit/scores.csv"]}
        results, into = recorded.parent, manifest.RECORDED
        manifest.write("mass_edit.py", results, drawn, computed=True, into=into)


if __name__ == "__main__":
    main()
