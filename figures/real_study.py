"""The study on real models, stage by stage: `make real`, or `python figures/real_study.py`.

SmolLM2-135M and Gemma-3-270M, each where it is fetched, side by side. Stages: what the model
recalls; the causal trace per component; the paper's statements, layer by layer; what each delta
gains and what of it arrives; edits of 1 to 300 facts by every method with settings tuned on other
facts; ablations; and, asked for with `--stages strength`, edits held back less and more than was
found best. Every piece is kept in `figures/out/real_study/MODEL` as soon as it is there, so that a
run that was cut, or stopped by itself after `--minutes`, goes on; the tables of all pieces so far
stand beside them, and with `--record` in `figures/results/real`. A model that is done leaves its
core to the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import model_tables
import pandas as pd
import real
import real_pages
import real_rows
import study
import tune
from common import (
    HERE,
    OUT,
    known_records,
    left_alone,
    provenance,
    read,
    share_cores,
    submit,
    workers,
)
from paper import kept

import pmet_lens as pl
from pmet_lens import data

FOLLOWED = (
    "fast", "counterfact", "zsre", "knowns", "texts", "tokens", "layers", "deepest", "tuned_on",
    "budget", "tuned", "traced", "probed",
)  # fmt: skip
"""Options that pieces follow from and are not named by."""
STAGES = ("recall", "trace", "claims", "gain", "edits", "ablations", "many")
BEYOND = ("strength",)
"""Stages that are made where they are asked for."""
METHODS = ("MEMIT", "PMET", "AlphaEdit", "EMMET", "FT-W", "FT+L", "ROME")
"""In the order in which they are edited: those that share targets stand beside each other."""
GAINS = ("PMET", "MEMIT", "w/o δ^a")
ABLATIONS = (
    "PMET", "w/o δ^a", "+ W_O", "linear spread", "TL hidden state, sqrt spread",
    "at the first subject token", "at the last token", "without prefixes",
)  # fmt: skip
"""Those of `pl.ablations` that are made, beside those of fewer layers."""
STRENGTHS = dict.fromkeys(("MEMIT", "PMET"), "second_moment_weight")
STRENGTHS |= {"AlphaEdit": "null_space_l2"}
"""What holds back each method's change: λ, and the ridge of AlphaEdit."""
FAST, PUBLISHED = real_rows.FAST, real_rows.PUBLISHED
STEPS = ("n_steps", "step_rule", "lr", "prefixes_per_step")
"""Settings that `Hparams.fast` changes."""
FACTORS = (0.1, 0.3, 3.0, 10.0, 30.0)
"""Times the tuned strength."""
ALONE = real_rows.ALONE
RETRIED = ("PMET", ALONE, "TL hidden state, sqrt spread")
"""Ablations of what is optimised, which one kind of steps may favour: made by the other, too."""
SIZES, MANY = (1, 20, 100), 300
"""Facts at once; the most of them come last.
"""
SINGLES = 20
"""Facts that are edited one at a time, each on the clean model."""
ABLATED, GAINED, TRACED, PROBED = 100, 20, 100, 150
TRACE_PLACES = ("last subject token", "last")
BLOCK = 6
"""Layers of one piece of the trace."""
FREE = 60
"""Facts whose free answers are read, each with one paraphrase and one neighbour."""
ASKING = pl.Asking(limit=16)
OTHERS, ASKED = 40, 150
"""Facts that nobody edits, for the collateral: of the real ones where those are edited, too, and
where CounterFact's are."""
HELD_OUT_TEXTS, WORDS = 100, 60


class Study(tune.Study):
    """One model: its pieces, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.end = time.monotonic() + 60 * args.minutes
        self.edit_made: tuple[str, pl.Edit | None] = "", None
        self.stamp(args, args.out / Path(args.model).name / "options.json")
        super().__init__(args)
        asked = [fact.record() for fact in (*self.facts, *self.others)]
        identity = data.hash_of([asked, args.fast])
        (self.folder / real_pages.IDENTITY).write_text(identity, encoding="utf-8")
        kept = real_rows.stored(args.results, self.folder.name, identity) if args.go_on else {}
        self.elsewhere = frozenset(kept) | self.gains_elsewhere()

    def gains_elsewhere(self) -> frozenset[str]:
        """Pieces of the stage `gain` of which the recorded tables have the rows."""
        found: set[str] = set()
        for name, kinds in (("losses", ("losses",)), ("arrival", ("arrival", "answers"))):
            if self.args.go_on and (self.args.results / f"{name}.csv").exists():
                table = read(self.args.results, name)
                own = table[table["model"] == self.folder.name]
                made = [*zip(own["settings"], own["method"], strict=True)]
                found |= {f"{kind} {how} {method}" for how, method in made for kind in kinds}
        return frozenset(found)

    @staticmethod
    def stamp(args: argparse.Namespace, path: Path) -> None:
        """Pieces of other options are refused, not mixed in."""
        mine = json.dumps({name: str(getattr(args, name)) for name in FOLLOWED})
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != mine:
            raise pl.DataError(
                f"{path.parent} holds pieces made with other options ({path.name}); give another "
                "--out, or remove that folder."
            )
        path.write_text(mine, encoding="utf-8")

    def run(self, on_stage: Callable[[], object] = lambda: None) -> str:
        """Every piece of the stages asked for; in words how it ended."""
        for stage in self.args.stages:
            for name, make in getattr(self, stage)():
                if left_alone() or time.monotonic() > self.end:
                    return f"{self.folder.name}: the time is over at {stage}; a later run goes on."
                if name not in self.elsewhere:
                    share_cores()
                    self.piece(name, make)
            on_stage()
        return f"{self.folder.name}: done."

    def piece(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The table kept under this name, made where it is not there. What cannot be is kept as the
        sentence that says why."""
        path, start = real_pages.path_of(self.folder, name), time.monotonic()
        if path.exists():
            return kept(path, make)

        def made() -> pd.DataFrame:
            try:
                return make()
            except (pl.EditError, pl.FactError, pl.SettingsError, pl.SolveError) as error:
                return pd.DataFrame({"refused": [str(error)]})

        table, seconds = kept(path, made), time.monotonic() - start
        sys.stderr.write(f"{self.folder.name}: {name}: {seconds:.0f} s\n")
        with (self.folder / real_pages.SECONDS).open("a", encoding="utf-8") as lines:
            lines.write(f"{name}\t{seconds:.1f}\n")
        minutes = sum(real_pages.seconds(self.folder).values()) / 60
        (self.folder / "made.txt").write_text(provenance(minutes), encoding="utf-8")
        return table

    # -- facts ------------------------------------------------------------------------------------

    @cached_property
    def lists(self) -> dict[str, list[pl.Fact]]:
        """Name → facts of which the model may know some."""
        if self.bundled:
            return {"world": pl.knowns()}
        found = {"real_facts": pl.real_facts()}
        if self.args.knowns:
            found["known_1000"] = pl.knowns(self.args.knowns)
        if self.args.counterfact:
            found["CounterFact"] = pl.counterfact(self.args.counterfact)
        return found

    def known(self, name: str) -> list[pl.Fact]:
        """Those of a list that the model recalls."""
        table = self.piece(f"recall {name}", partial(pl.recall, self.model, self.lists[name]))
        return [self.lists[name][i] for i in table.loc[table["correct"] == 1, "fact"]]

    def chosen(self) -> tuple[list[pl.Fact], list[pl.Fact], list[pl.Fact]]:
        """As in `tune.py`; CounterFact's records, where they are given, are edited whether the
        model recalls them or not, and what it recalls of the real facts is to stay."""
        tuned_on = self.args.tuned_on
        if self.bundled:
            every = known_records(self.model)
            return every[:MANY], every[tune.HELD_OUT :][:tuned_on], pl.knowns()[:: tune.EVERY]
        every = self.known("real_facts")
        if self.args.counterfact:
            records = pl.editable(self.model, self.lists["CounterFact"])
            n = len(records) - tuned_on
            return records[:n][:MANY], records[n:], every[:ASKED]
        n = len(every) - tuned_on
        return pl.with_related(every[: n - OTHERS][:MANY]), every[n:], every[n - OTHERS : n]

    @cached_property
    def recalled(self) -> list[pl.Fact]:
        """Everything that is recalled, but for CounterFact, whose prompts often say the answer."""
        return [f for name in self.lists if name != "CounterFact" for f in self.known(name)]

    # -- the stages: each gives names of pieces and how they are made ------------------------------

    def recall(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        for name, facts in self.lists.items():
            yield f"recall {name}", partial(pl.recall, self.model, facts)

    def trace(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        facts = spread(self.recalled, self.args.traced)
        n = self.model.n_layers
        for stream in model_tables.STREAMS:
            window = 1 if stream == "resid_post" else max(3, n // 5)
            for first in range(0, n, BLOCK):
                layers = range(first, min(n, first + BLOCK))
                how: dict[str, Any] = {"stream": stream, "window": window, "samples": 1}
                how |= {"layers": layers, "places": TRACE_PLACES}
                yield f"trace {stream} {first}", partial(pl.causal_trace, self.model, facts, **how)

    def claims(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        facts = phrased(self.model, of_several(self.recalled, self.args.probed))
        made = study.components(self.model, facts, n_pairs=self.args.probed)
        for key in ("variance", "patterns", "transfer", "component_similarity"):
            yield f"claims {key}", made[key]
        for key in ("delta_gain", "drift"):
            yield f"claims {key}", lambda key=key: self.deltas[key]

    @cached_property
    def deltas(self) -> study.Tables:
        hp = self.released("PMET")
        return study.deltas(self.model, self.edit("PMET", self.facts[:GAINED], hp))

    def gain(self, steps: str = "") -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        """As released, whatever steps the edits take, and with tuned settings where they are known
        by then; by other steps (`steps`): these alone."""
        facts = self.facts[:GAINED]
        for method in GAINS:
            kinds = {} if steps else {f"released {method}": self.released(method)}
            if real_pages.path_of(self.folder, f"tuned {method}", "json").exists():
                name = method + steps
                kinds[f"tuned {name}"] = self.settings(name, len(facts))
            for kind, hp in kinds.items():
                given = (
                    partial(self.targets, method, facts, hp),
                    partial(self.edit, method, facts, hp),
                )
                for quantity, look in (
                    ("losses", lambda targets, _: pl.delta_losses(self.model, facts, targets())),
                    ("arrival", lambda _, edit: pl.arrival(self.model, edit())),
                    ("answers", lambda _, edit: self.rows(edit(), facts)),
                ):
                    yield f"{quantity} {kind}", partial(look, *given)

    def edits(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        """Every method, then what the deltas of the tuned ones do."""
        yield from self.looks(self.most, "unedited")
        for n in self.sizes:
            for name in self.args.methods:
                yield from self.looks(n, name)
        if self.args.zsre:
            facts = pl.editable(self.model, pl.zsre(self.args.zsre))[: min(100, self.args.facts)]
            for name in ("unedited", *self.args.methods):
                yield f"zsre {len(facts)} {name}", partial(self.asked, self.rows, name, facts)
        yield from self.gain()

    def many(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        """As many facts at once as there are."""
        if self.most > max(self.sizes):
            for name in ("unedited", *self.args.methods):
                yield from self.looks(self.most, name)

    def looks(self, n: int, name: str) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        """What is measured of an edit of `n` facts at once; of one: of several, each alone."""
        facts = self.facts[: SINGLES if n == 1 else n]
        looks = {"rows": (self.rows, facts), "free": (self.free, facts[:FREE])}
        if n > 1 or name == "unedited":
            looks |= {"ability": (self.ability, facts), "others": (self.collateral, facts)}
        for kind, (look, some) in looks.items():
            if n == 1 and name != "unedited":
                yield f"{kind} {n} {name}", partial(self.each, look, name, some)
            else:
                yield f"{kind} {n} {name}", partial(self.asked, look, name, facts, some)

    def ablations(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        yield from self.ablated("")

    def ablated(self, steps: str) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        facts = self.facts[: self.args.ablated]
        pmet = self.settings(f"PMET{steps}", len(facts))
        for name, trial in pl.ablations(pmet).items():
            if name in RETRIED if steps else name in ABLATIONS or "critical" in name:
                hp = self.settings(f"MEMIT{steps}", len(facts)) if "TL" in name else pmet
                trial = replace(trial, hparams=hp)
                yield (
                    f"ablation {len(facts)} {name}{steps}",
                    lambda trial=trial: self.rows(self.bench.edit(trial, facts), facts),
                )

    def strength(self) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        """The edits of most facts but for `many` by the other steps, too (fast ones, or published),
        since these serve some methods better than others; PMET without δ^a beside them, and the
        ablations of what is optimised and what each delta gains. Then, by both, the edits held back
        less and more than was found best: what is won against what is lost."""
        facts = self.facts[: max(self.sizes)]
        methods = [name for name in self.args.methods if name in STRENGTHS]
        for steps in ("", self.other_steps):
            for method in (*methods, *[ALONE] * ("PMET" in methods)):
                yield from self.looks(len(facts), method + steps)
        yield from self.ablated(self.other_steps)
        yield from self.gain(self.other_steps)
        for steps in ("", self.other_steps):
            for method in methods:
                yield from self.held_back(method, steps, facts)

    def held_back(
        self, method: str, steps: str, facts: list[pl.Fact]
    ) -> Iterator[tuple[str, Callable[[], pd.DataFrame]]]:
        name, field = method + steps, STRENGTHS[method]
        tuned = self.settings(name, len(facts))
        for factor in FACTORS:
            hp = replace(tuned, **{field: factor * getattr(tuned, field)})
            for kind, look in (("held", self.rows), ("spared", self.collateral)):
                run = partial(self.asked, look, name, facts, hp=hp)
                yield f"{kind} {len(facts)} {name} × {factor:g}", run

    # -- edits ------------------------------------------------------------------------------------

    @property
    def most(self) -> int:
        """Facts at once at most."""
        return min(self.args.facts, len(self.facts))

    @property
    def sizes(self) -> list[int]:
        """Facts at once: those of `SIZES`, or all where there are fewer."""
        return sorted({min(n, self.most) for n in SIZES})

    @property
    def other_steps(self) -> str:
        """What stands behind the name of a run by other steps than the edits take."""
        return PUBLISHED if self.args.fast else FAST

    @staticmethod
    def named(name: str) -> Any:
        """The method of a name, which may say by what steps."""
        return pl.named(real_rows.method_of(name))

    def released(self, name: str) -> Any:
        """What is released for the method, with the layers of this model, by its own steps."""
        method = self.named(name)
        return self.bench.settings(method) if self.bundled else self.unhurried(method)

    def guess(self, name: str) -> Any:
        """The same, by the steps that the edits take."""
        found = self.released(name)
        return self.hasty(found) if isinstance(found, pl.Hparams) else found

    def settings(self, name: str, n: int) -> Any:
        """The tuned settings of a method for `n` facts at once, found first where nobody has; where
        there are too few facts to tune on, the first guess. Steps behind the name replace those
        of the settings."""
        if name.endswith(FAST):
            return self.settings(real_rows.method_of(name), n).fast()
        if name.endswith(PUBLISHED):
            found = self.settings(real_rows.method_of(name), n)
            released = self.released(name).settled(self.named(name), n)
            return replace(found, **{field: getattr(released, field) for field in STEPS})
        if name == ALONE:
            return self.settings("PMET", n)
        path, method = real_pages.path_of(self.folder, f"tuned {name}", "json"), self.named(name)
        if not path.exists():
            found = self.found_before(name)
            if found is None and self.args.tuned_on < 8:
                return self.guess(name)
            found = found or self.tuned(name)
            self.write(path.name, json.dumps(found, ensure_ascii=False))
        whole = json.loads(path.read_text(encoding="utf-8"))
        if "1" not in whole:
            raise pl.SettingsError(whole["why"])
        nearest = min((k for k in whole if k.isdecimal()), key=lambda k: abs(int(k) - n))
        kind = pl.FineTuneHparams if isinstance(method, pl.FineTune) else pl.Hparams
        hp = kind(**whole[nearest])
        return self.hasty(hp) if isinstance(hp, pl.Hparams) else hp

    def found_before(self, name: str) -> dict[str, Any] | None:
        """What `tune.py` found for this model and method, where `--tuned` names its tables."""
        if self.args.tuned is None:
            return None
        path = self.args.tuned / f"{self.folder.name}.json"
        return json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None

    def tuned(self, name: str) -> dict[str, Any]:
        """What `pl.tune` finds: the settings per number of facts at once, and why."""
        start = time.monotonic()
        trial = pl.Trial(name, hparams=self.guess(name))
        how: dict[str, Any] = {"edited": self.facts, "fast": True if self.args.fast else None}
        try:
            found = pl.tune(self.bench, self.held_out, trial, self.args.budget, **how)
        except pl.SettingsError as error:
            return {"why": str(error)}
        seconds = time.monotonic() - start
        sys.stderr.write(f"{self.folder.name}: {name}: {seconds:.0f} s: {found!r}\n")
        sizes = {*SIZES, MANY, *self.sizes, self.most, self.args.ablated, GAINED}
        return {"seconds": seconds, **tune.of_sizes(found, sizes)}

    def targets(self, name: str, facts: Sequence[pl.Fact], hp: Any) -> Any:
        """Those of all facts; None for a method without, and one that edits fact after fact."""
        method = self.named(name)
        alone = getattr(method, "at_once", None) is None or len(facts) == 1
        return self.bench.targets(pl.Trial(method, hparams=hp), facts) if alone else None

    def edit(self, name: str, facts: Sequence[pl.Fact], hp: Any) -> pl.Edit:
        return self.bench.edit(pl.Trial(self.named(name), hparams=hp), facts)

    def asked(
        self, look: Any, name: str, facts: list[pl.Fact], some: Any = None, hp: Any = None
    ) -> pd.DataFrame:
        """What `look` finds at `some` of the facts (None: all) when all are edited at once, with
        these settings (None: those found for so many); the last edit stays for the pieces that
        measure it, too."""
        if name == "unedited":
            return look(None, some or facts)
        key = f"{name} {facts[0].text} {len(facts)} {hp}"
        if self.edit_made[0] != key:
            hp = self.settings(name, len(facts)) if hp is None else hp
            self.edit_made = key, self.edit(name, facts, hp)
        return look(self.edit_made[1], some or facts)

    def each(self, look: Any, name: str, facts: list[pl.Fact]) -> pd.DataFrame:
        """The same of each fact edited alone, on the clean model."""
        trial = pl.Trial(name, hparams=self.settings(name, 1))
        targets, rows = self.bench.targets(trial, facts), []
        for i, fact in enumerate(facts):
            made = self.bench.edit(trial, [fact], None if targets is None else targets[i : i + 1])
            rows.append(look(made, [fact]).assign(fact=i))
        return pd.concat(rows, ignore_index=True)

    def rows(self, edit: pl.Edit | None, facts: list[pl.Fact], **how: Any) -> pd.DataFrame:
        with nullcontext() if edit is None else edit.applied(self.model):
            return pl.evaluate(self.model, facts, **how)

    def free(self, edit: pl.Edit | None, facts: list[pl.Fact]) -> pd.DataFrame:
        few = [
            replace(f, paraphrases=f.paraphrases[:1], neighbours=f.neighbours[:1]) for f in facts
        ]
        return self.rows(edit, few, free=ASKING)

    def ability(self, edit: pl.Edit | None, facts: list[pl.Fact]) -> pd.DataFrame:
        """Perplexity and KL of what the edit is not about."""
        texts = None
        if self.args.texts and not self.bundled:
            words = [" ".join(t.split()[:WORDS]) for t in pl.texts(self.args.texts)]
            texts = words[-HELD_OUT_TEXTS:]
        prompts = [fact.text for fact in self.others[:OTHERS]]
        how: dict[str, Any] = {"texts": texts, "prompts": prompts, "others": ()}
        found = pl.general_ability(self.model, edit, n_texts=HELD_OUT_TEXTS, **how)
        return found.reset_index()

    def collateral(self, edit: pl.Edit | None, facts: list[pl.Fact]) -> pd.DataFrame:
        with nullcontext() if edit is None else edit.applied(self.model):
            return pl.recall(self.model, self.others)


def spread(facts: Sequence[pl.Fact], n: int) -> list[pl.Fact]:
    """`n` of them, evenly."""
    return list(facts[:: max(1, len(facts) // n)][:n])


def of_several(facts: Sequence[pl.Fact], n: int) -> list[pl.Fact]:
    """`n` of them: first those about a subject of which another is known, too, without which
    nothing can be said of what depends on the subject; then of the others evenly."""
    counts = Counter(fact.subject for fact in facts)
    shared = [fact for fact in facts if counts[fact.subject] > 1][:n]
    rest = [fact for fact in facts if counts[fact.subject] == 1]
    return [*shared, *spread(rest, n - len(shared))] if n > len(shared) else shared


def phrased(model: pl.Model, facts: Sequence[pl.Fact]) -> list[pl.Fact]:
    """The facts, every second and third of a relation in the words of a paraphrase where the model
    recalls it so: what is asked must not be taken for how it is asked."""
    found = []
    for i, fact in enumerate(facts):
        ways = [p.replace(fact.subject, "{}") for p in fact.paraphrases if fact.subject in p]
        ways = [way for way in ways if way.count("{}") == 1]
        way = ([fact.prompt, *ways])[i % (1 + len(ways))]
        found.append(replace(fact, prompt=way))
    known = pl.recall(model, found)["correct"]
    return [new if right else old for new, old, right in zip(found, facts, known, strict=True)]


def run_model(args: argparse.Namespace, name: str, place: int = 0) -> str:
    """The study of one model; `place` is not used. In words how it ended."""
    warnings.simplefilter("ignore")
    layers = args.layers or model_tables.LAYERS.get(name) or ()
    tokens = args.tokens or (100_000 if name.startswith("world") else real.N_TOKENS)
    own = argparse.Namespace(**{**vars(args), "model": name, "layers": layers, "tokens": tokens})
    try:
        return Study(own).run(partial(real_pages.collect, args.out, args.results))
    except (pl.ModelError, pl.DataError, pl.FactError) as error:
        return f"{name}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", nargs="+", default=["smollm2-135m", "gemma-3-270m"], help="names, directories")
    add("--stages", nargs="+", default=STAGES, choices=(*STAGES, *BEYOND))
    add("--facts", type=int, default=MANY, help=f"edited at once at most, up to {MANY}")
    add("--ablated", type=int, default=ABLATED, help="facts of the ablations")
    add("--traced", type=int, default=TRACED, help="facts of the causal trace")
    add("--probed", type=int, default=PROBED, help="facts of the statements")
    add("--methods", nargs="+", default=METHODS)
    add("--fast", action="store_true", help="targets of `Hparams.fast` instead of published steps")
    add("--minutes", type=float, default=175.0, help="stop by itself after these, between pieces")
    add("--counterfact", type=Path, help="CounterFact, to be edited instead of the real facts")
    add("--zsre", type=Path, help="zsRE in MEND's form")
    add("--knowns", type=Path, help="known_1000.json of ROME")
    add("--texts", type=Path, help="text for second moments and perplexity, one text a line")
    add("--tokens", type=int, help="of that text")
    add("--layers", nargs="+", type=int, help="of the first guess")
    add("--deepest", type=int, default=12, help="layer with a second moment")
    add("--tuned-on", type=int, default=20, help="facts held out; fewer than 8: no tuning")
    add("--budget", type=int, help="targets per method; default 4 per fact")
    add("--tuned", type=Path, help="tables of tune.py (with --counterfact): its settings are taken")
    add("--out", type=Path, default=OUT / "real_study")
    add("--record", action="store_true", help="the tables also to figures/results/real")
    add("--go-on", action="store_true", help="make no piece again whose rows are recorded there")
    args = parser.parse_args()
    if args.tuned and not args.counterfact:
        parser.error("--tuned needs --counterfact: the real facts are those tune.py tuned on.")
    args.device, args.goal = "auto", "S"
    if args.go_on and not args.record:
        parser.error("--go-on needs --record: it goes on with what is recorded.")
    args.results = HERE / "results" / "real" if args.record else None
    here = set(pl.available_models().query("here")["name"])
    names = [name for name in args.model if name in here or Path(name).is_dir()]
    for name in args.model:
        if name not in names:
            sys.stderr.write(f"{name} is left out; pmet-lens models --fetch {name} brings it.\n")
    if len(names) < 2:
        ended = [run_model(args, name) for name in names]
    else:
        with workers(len(names)) as pool:
            begun = submit(pool, names, partial(run_model, args))
            wait(begun)
            ended = [one.result() for one in begun]
    real_pages.collect(args.out, args.results)
    sys.stdout.write("".join(f"{text}\n" for text in ended) + f"Tables so far: {args.out}\n")


if __name__ == "__main__":
    main()
