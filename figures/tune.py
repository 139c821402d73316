"""Settings by measurement, and a fair fight: `python figures/tune.py --model world-sequential`.

Every method gets the same budget of tuning on the same held-out facts of a model; then all edit the
same other facts at once, and are compared: paired differences, and which of them no other beats in
efficacy, locality and collateral together. Real models take `pl.recalled` of `pl.real_facts()`,
bundled ones CounterFact's records of their world. Everything is kept in `figures/out/tune/MODEL` as
soon as it is there: a run that was cut goes on. `--grid METHOD` tries every combination of settings
on the held-out facts instead, by the steps that are searched with, to judge what `pl.tune` found.
`--record` replaces the committed tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import manifest
import pandas as pd
import real
from common import HERE, OUT, known_records, legend, make, panels, provenance, read
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import data, experiments, plotting

METHODS = tuple(pl.METHODS)
HELD_OUT = 400
"""Records of the bundled world from here on are tuned on, the first ones are edited."""
SHARD = 10
"""Facts of which a run that is cut may have to optimise the targets again."""
RESULTS = HERE / "results" / "tune"
GRID = (0.1, 0.3, 1.0, 3.0, 10.0)
"""λ of a grid, relative to the first guess."""
SIZES = (1, 20, 100, 300)
"""Numbers of facts at once that the settings found are written down for."""
SHOWN = ("S", "ES", "PS", "NS", "EA", "PA", "NA", "collateral")
EVERY = 9
"""Of the facts an edit is not about one in so many is asked."""


class Study:
    """One model, its facts, and the bench that keeps what is found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.out / Path(args.model).name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = pl.load(args.model, device=args.device)
        self.bundled = args.model.startswith("world")
        self.layers = None if self.bundled else tuple(args.layers or ())
        self.facts, self.held_out, self.others = self.chosen()

    def chosen(self) -> tuple[list[pl.Fact], list[pl.Fact], list[pl.Fact]]:
        """The facts that are edited, those tuned on, and those an edit is not about."""
        edited, tuned_on = self.args.facts, self.args.tuned_on
        if self.bundled:
            every = known_records(self.model)
            facts, held_out = every[:edited], every[HELD_OUT : HELD_OUT + tuned_on]
            others = experiments.others_of(pl.knowns(), [*facts, *held_out])[::EVERY]
            return facts, held_out, others
        # In the list relations stand together: every list gets some of each.
        every = pl.recalled(self.model)
        step = max(1, len(every) // (edited + tuned_on))
        order = [f for n in range(step) for f in every[n::step]]
        return order[:edited], order[edited : edited + tuned_on], order[edited + tuned_on :]

    @cached_property
    def bench(self) -> pl.Bench:
        """Second moments of every layer that may be written, prefixes and targets."""
        if self.bundled:
            return pl.Bench(self.model, self.folder, None, self.args.tokens, shard=SHARD)
        layers = range(min(self.model.n_layers - 1, self.args.deepest + 1))
        given = self._texts(), self.args.tokens, self._guess, layers, SHARD
        return pl.Bench(self.model, self.folder, *given)

    def _texts(self) -> list[str]:
        """The user's, or what the model writes itself, once."""
        if self.args.texts:
            return list(pl.texts(self.args.texts))
        path = self.folder / "own_texts.txt"
        if not path.exists():
            texts = pl.sampled_texts(self.model, n_tokens=self.args.tokens)
            with data.whole(path) as part:
                part.write_text("\n".join(" ".join(t.split()) for t in texts), encoding="utf-8")
        return list(pl.texts(path))

    def _guess(self, method: Any) -> Any:
        """The first guess: what is released, by the steps that are asked for."""
        found = self.unhurried(method)
        return self.hasty(found) if isinstance(found, pl.Hparams) else found

    def unhurried(self, method: Any) -> Any:
        """The layers given, all else as released; without layers nothing, so that `pl.tune` asks
        the causal trace."""
        if not self.layers:
            raise pl.SettingsError("no layers given")
        one = isinstance(getattr(method, "solver", None), pl.Exact)
        if isinstance(method, pl.FineTune):
            bound = 5e-4 if method.constrained else None
            return pl.FineTuneHparams(layer=self.layers[-1], norm_constraint=bound)
        return pl.Hparams(self.layers[-1:] if one else self.layers)

    def hasty(self, hparams: pl.Hparams) -> pl.Hparams:
        """The settings, with the steps of `Hparams.fast` where they are asked for."""
        return hparams.fast() if self.args.fast else hparams

    def methods(self) -> dict[str, pl.Trial]:
        """Those that can be: no MEND editor is bundled for a real model."""
        names = [n for n in self.args.methods if n != "MEND" or self.args.model.startswith("world")]
        return {name: pl.Trial(name) for name in names}

    def table(self) -> pd.DataFrame:
        """The fair comparison, and beside it everything that was tried."""
        tried: list[pd.DataFrame] = []
        settings: dict[str, Any] = {}
        start = time.monotonic()

        def tell(name: str, tuned: pl.Tuned) -> None:
            tried.append(tuned.table.assign(run=name))
            settings[name] = of_sizes(tuned, SIZES)
            self.write("settings.json", json.dumps(settings, ensure_ascii=False, indent=1))
            seconds = time.monotonic() - start
            sys.stderr.write(f"{name}, {seconds:.0f} s so far: {tuned!r}\n")

        trials = self.methods()
        baseline = "PMET" if "PMET" in trials else next(iter(trials))
        table = pl.compare(
            self.bench, trials, self.facts, self.others, baseline, tune_on=self.held_out,
            budget=self.args.budget, goal=self.args.goal, front=True, on_tuned=tell,
        )  # fmt: skip
        self.keep("tried", pd.concat(tried, ignore_index=True))
        found = table.assign(model=Path(self.args.model).name, edits=len(self.facts))
        return found.assign(tuned_on=len(self.held_out), fast=self.args.fast)

    def grid(self, method: str) -> pd.DataFrame:
        """Every combination of last layer, clamp and λ on the held-out facts, by the steps that
        `pl.tune` searches with: what its budget spares, and what it may have missed. The best of so
        many is best by chance, too: so it is compared with what was tuned, on the other facts."""
        name, row = f"grid_{method}", {"method": method, "facts": len(self.held_out)}
        trial = pl.Trial(method)
        tuned = pl.tune(self.bench, self.held_out, trial, self.args.budget, goal=self.args.goal)
        path, space = self.folder / f"{name}.csv", tuned.space
        rows = read(self.folder, name).to_dict("records") if path.exists() else []
        done = {row["settings"] for row in rows}
        strength, stages = space.weight or "clamp", list(tuned.table["stage"].unique())
        fast = stages[-1] == "published"  # the winner alone, which is confirmed
        stages = stages[:-1] if fast else stages
        tried: dict[str, pl.Hparams] = {}
        for group in space.groups():
            for factor in GRID:
                hp = space.scaled(group, factor)
                hp = hp.fast() if fast else hp
                said = f"layers {' '.join(map(str, hp.layers))}, clamp {hp.clamp:.3g}, of "
                said += f"{hp.reference_norm}, {strength} {getattr(hp, strength):.3g}"
                tried[said] = hp
                if said in done:
                    continue
                one = pl.Trial(method, hparams=hp)
                with self.bench.edit(one, self.held_out).applied(self.model):
                    score = pl.summarise(pl.evaluate(self.model, self.held_out)).loc["S"]
                rows.append({**row, "settings": said, **score})
            self.keep(name, pd.DataFrame(rows))
        best = max(rows, key=lambda row: row["mean"])
        mine = tuned.table.loc[tuned.table["stage"] == stages[-1], "score"].max()
        told = f"{method}: tuned {mine:.1f}, best of {len(rows)} {best['mean']:.1f}\n"
        sys.stderr.write(told)
        judged = self.judged(trial, tuned, tried[best["settings"]], fast)
        self.keep(f"judged_{method}", judged.assign(method=method, edits=len(self.facts)))
        return read(self.folder, path.stem)

    def judged(
        self, trial: pl.Trial, tuned: pl.Tuned, best: pl.Hparams, fast: bool
    ) -> pd.DataFrame:
        """The best settings of a grid beside the first guess and what was tuned, on the facts that
        nobody tuned on."""
        space, share = tuned.space, len(self.facts) / len(self.held_out)
        chosen = {
            "first guess": space.scaled(space.centre, share),
            "tuned": tuned.for_edits(len(self.facts)),
            "best of the grid": space.scaled(best, share),
        }
        trials = {
            name: replace(trial, hparams=hp.fast() if fast else hp) for name, hp in chosen.items()
        }
        return pl.compare(self.bench, trials, self.facts, self.others, "tuned")

    def write(self, name: str, text: str) -> None:
        with data.whole(self.folder / name) as part:
            part.write_text(text, encoding="utf-8")

    def keep(self, name: str, table: pd.DataFrame) -> None:
        with data.whole(self.folder / f"{name}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6g")


def of_sizes(found: pl.Tuned, sizes: Iterable[int]) -> dict[str, Any]:
    """What was found as JSON holds it: why, targets spent, and per number of facts at once the
    fields of the settings."""
    at = {str(n): asdict(found.for_edits(n)) for n in sorted(sizes)}
    return {"why": found.why, "spent": found.spent, **at}


def steps(row: pd.Series) -> str:
    """How the targets were optimised, where not by the method's own steps."""
    return ", targets by `Hparams.fast`" if str(row.get("fast")) == "True" else ""


def page(table: pd.DataFrame, made: str) -> str:
    """The comparison as Markdown: one line per method, and its difference to the baseline in S."""
    first = table.iloc[0]
    metrics = [m for m in SHOWN if m in set(table["metric"])]
    lines = [["method", *metrics, "S against PMET", "front", "targets spent"]]
    for run, own in table.groupby("run", sort=False):
        rows = own.set_index("metric")
        cells = [f"{rows.at[m, 'mean']:.1f}" for m in metrics]
        row = rows.loc["S"]
        gap = "" if pd.isna(row["difference"]) else (
            f"{row['difference']:+.1f} [{row['difference_low']:.1f}, {row['difference_high']:.1f}]"
        )  # fmt: skip
        on = "yes" if row["front"] in (True, "True") else "no"
        lines.append([str(run), *cells, gap, on, f"{int(row['spent'])} of {int(row['budget'])}"])
    lines.insert(1, ["---"] * len(lines[0]))
    head = (
        f"{first['model']}: {first['edits']} facts edited at once, every method tuned on the same "
        f"{first['tuned_on']} others{steps(first)}. Per cent; differences paired over facts, 95 % "
        "intervals. "
        "*front*: no other method is at least as good in ES, NS and collateral, and better in one."
    )
    return "\n".join([head, "", *(f"| {' | '.join(line)} |" for line in lines), "", made, ""])


def draw(folder: Path) -> Figure:
    """Efficacy against locality and against collateral, every method, one row per model."""
    table = read(folder, "compared").assign(front=lambda t: t["front"].astype(str) == "True")
    models = list(dict.fromkeys(table["model"]))
    fig, axes = panels(7.5, 2.9 * len(models), len(models), 2)
    for row, model in zip(axes, models, strict=True):
        own = table[table["model"] == model]
        for ax, kept in zip(row, ("NS", "collateral"), strict=True):
            plotting.front(own, ax, "PS", kept, names=False)
        edits = int(own["edits"].iloc[0])
        row[0].set_title(f"{model}, {edits} facts at once; full: beaten by none", loc="left")
    legend(fig, axes[0, 0], 8)
    return fig


FIGURES: dict[str, Callable[[Path], Figure]] = {"fig_tune": draw}


def options(parser: argparse.ArgumentParser) -> None:
    """What a `Study` needs beside the facts that are edited."""
    parser.add_argument("--model", default="world-sequential", help="name, directory or hub id")
    parser.add_argument("--tuned-on", type=int, default=40, help="facts held out")
    parser.add_argument("--budget", type=int, help="targets per method; default 4 per fact")
    parser.add_argument("--goal", default="S", help="a metric of pl.summarise")
    parser.add_argument("--layers", nargs="+", type=int, help="of the first guess of a real model")
    parser.add_argument("--deepest", type=int, default=15, help="layer with a second moment")
    parser.add_argument("--texts", help="text file for the second moments, one text a line")
    parser.add_argument("--tokens", type=int, help="of that text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fast", action="store_true", help="targets of Hparams.fast throughout")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options(parser)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--facts", type=int, default=100, help="edited at once")
    parser.add_argument(
        "--grid", nargs="*", default=[], help="methods to judge by a full grid instead"
    )
    parser.add_argument("--out", type=Path, default=OUT / "tune")
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    args = parser.parse_args()
    bundled = args.model.startswith("world")
    args.tokens = args.tokens or (100_000 if bundled else real.N_TOKENS)
    start = time.monotonic()
    try:
        study = Study(args)
        if args.grid:
            judge(study)
            return
        table = study.table()
    except (pl.ModelError, pl.DataError, pl.FactError, pl.SettingsError) as error:
        parser.exit(2, f"{error}\n")
    study.keep("compared", table)
    made = provenance((time.monotonic() - start) / 60, study.model.device)
    (study.folder / "tune.md").write_text(page(table, made), encoding="utf-8")
    make(draw, "fig_tune", study.folder, study.folder)
    if args.record:
        record(study.folder)


def judge(study: Study) -> None:
    """The grid of every method asked for, among the committed tables where they are wanted."""
    for method in study.args.grid:
        study.grid(method)
        if study.args.record:
            merge(study.folder, RESULTS, (f"grid_{method}", f"judged_{method}"))


def record(folder: Path) -> None:
    """Put the tables of this model among the committed ones, and the figure of all of them."""
    merge(folder, RESULTS, ("compared", "tried"), "tune.md")
    settings = (folder / "settings.json").read_text(encoding="utf-8")
    (RESULTS / f"{folder.name}.json").write_text(settings, encoding="utf-8")
    used = make(draw, "fig_tune", RESULTS, folder)
    (RESULTS / "fig_tune.png").write_bytes((folder / "fig_tune.png").read_bytes())
    told = {"tune/fig_tune": [f"tune/{name}" for name in used]}
    manifest.write("tune.py", HERE / "results", told, computed=True, into=manifest.RECORDED)


def merge(folder: Path, results: Path, names: tuple[str, ...], page: str | None = None) -> None:
    """The tables and the page of one model among those of all."""
    results.mkdir(exist_ok=True)
    for name in names:
        new = read(folder, name)
        new = new if "model" in new else new.assign(model=folder.name)
        path = results / f"{name}.csv"
        old = [read(results, name)] if path.exists() else []
        old = [table[table["model"] != folder.name] for table in old]
        with data.whole(path) as part:
            whole = pd.concat([*old, new], ignore_index=True)
            whole.to_csv(part, index=False, float_format="%.6g")
    if page is not None:
        text = (folder / page).read_text(encoding="utf-8")
        (results / f"{folder.name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
