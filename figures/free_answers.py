"""What a user sees of an edit, beside what benchmarks say: `python figures/free_answers.py`.

Facts that a model knows are edited at once by PMET and MEMIT. Per method: the classical scores and
the free answers to the same prompts, as edited and inside a chat (or a question), portability and
locality per kind, and what each help of benchmarks is worth. Then the facts are edited a few at a
time, and the first, the last and all so far are asked at checkpoints. Real models take
`pl.recalled` of `pl.real_facts()`, bundled ones CounterFact's records of their world. Everything is
kept in `figures/out/free_answers/MODEL` as soon as it is there: a run that was cut goes on, also
inside the targets. `--record` replaces the committed tables of this model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import manifest
import pandas as pd
import real
from common import HERE, OUT, known_records, legend, make, panels, provenance, read
from matplotlib.figure import Figure
from paper import spent

import pmet_lens as pl
from pmet_lens import data, plotting

METHODS = ("MEMIT", "PMET")
ASKED = ("as edited", "framed")
FREE = tuple(kind + measure for measure in "FXT" for kind in "EPN")
SHOWN = ("ES", "PS", "NS", "EA", "PA", "NA", *FREE)
KINDS = ("portability", "free portability", "locality", "free locality")
PARTS = ("gap", "retention")
RESULTS = HERE / "results" / "free_answers"
SHARD = 10
"""Facts of which a run that is cut may have to optimise the targets again."""


class Study:
    """One model, its facts, and the tables in its folder, each made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.out / Path(args.model).name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = pl.load(args.model, device=args.device)
        bundled = args.model.startswith("world")
        facts = known_records(self.model) if bundled else pl.recalled(self.model, n=args.facts)
        self.facts = pl.with_related(facts[: args.facts])
        chat = getattr(self.model.tokenizer, "chat_template", None) is not None
        self.frame = args.frame or ("chat" if chat else "Question: {}\nAnswer:")
        layers = None if bundled else tuple(args.layers)
        texts = None if bundled else self._texts()
        usual = pl.Hparams(layers or (0,))
        usual = usual.fast() if args.fast else usual
        settings = None if bundled else lambda method: usual
        self.bench = pl.Bench(self.model, self.folder, texts, args.tokens, settings, layers, SHARD)

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

    def run(self) -> None:
        for method in ("unedited", *self.args.methods):
            names = [f"{what} {method}" for what in ("gap", *ASKED)]
            if all((self.folder / f"{name}.csv").exists() for name in names):
                continue
            edit = None if method == "unedited" else self.edit(method)
            with nullcontext() if edit is None else edit.applied(self.model):
                for name, frame in zip(ASKED, (None, self.frame), strict=True):
                    how = pl.Asking(frame=frame, until=self.args.until, limit=self.args.limit)
                    self.kept(f"{name} {method}", lambda how=how: self.rows(how))
                self.kept(f"gap {method}", lambda how=how: pl.evaluation_gap(
                    self.model, self.facts, how))  # fmt: skip
        for method in self.args.methods if self.args.every else ():
            self.kept(f"retention {method}", lambda method=method: self.in_a_row(method))

    def kept(self, name: str, work: Callable[[], pd.DataFrame]) -> None:
        """The table in the file of this name, made where it is not there."""
        path = self.folder / f"{name}.csv"
        if path.exists():
            return
        start = time.monotonic()
        table = work()
        with data.whole(path) as part:
            table.to_csv(part, index=False, float_format="%.6g")
        sys.stderr.write(f"{name}: {time.monotonic() - start:.1f} s\n")

    def rows(self, how: pl.Asking) -> pd.DataFrame:
        return pl.evaluate(self.model, self.facts, free=how)

    def edit(self, method: str) -> pl.Edit:
        return self.bench.edit(pl.Trial(method), self.facts)

    def in_a_row(self, method: str) -> pd.DataFrame:
        """The checkpoints of the facts edited a batch at a time."""
        watch = pl.Checkpoints(every=self.args.every, n=self.args.every, free=True)
        hp = self.bench.settings(pl.named(method))
        pl.edit_sequentially(
            self.model, self.facts, self.bench.moments, method, hp, self.bench.contexts,
            self.args.batch, checkpoints=watch,
        )  # fmt: skip
        return watch.table


def scores(folder: Path, methods: tuple[str, ...]) -> pd.DataFrame:
    """Columns method, asked, metric, mean, ci_low, ci_high, n; locality is of what the unedited
    model answers."""
    found = []
    for asked in ASKED:
        before = read(folder, f"{asked} unedited")
        for method in methods:
            table = pl.summarise(read(folder, f"{asked} {method}"), before)
            table = pd.DataFrame(table).reset_index().assign(method=method, asked=asked)
            if asked != ASKED[0]:  # teacher forcing is not asked in a frame
                table = table[table["metric"].isin(FREE) | table["metric"].str.startswith("free")]
            found.append(table)
    columns = ["method", "asked", "metric", "mean", "ci_low", "ci_high", "n"]
    return pd.concat(found, ignore_index=True)[columns]


def page(table: pd.DataFrame, model: str, n: int, made: str) -> str:
    """The scores as Markdown: one line per metric, one column per method and way of asking."""
    numbers = table[["mean", "ci_low", "ci_high"]].itertuples(index=False)
    cells = [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in numbers]
    table = table.assign(text=cells, column=table["method"] + ", " + table["asked"])
    wide = table.pivot(index="metric", columns="column", values="text").fillna("")
    kinds = [name for name in wide.index if str(name).partition(" (")[0] in KINDS]
    names = [name for name in SHOWN if name in wide.index] + sorted(kinds)
    wide = wide.loc[names, list(dict.fromkeys(table["column"]))]
    rows = [["metric", *wide.columns], ["---"] * (1 + len(wide.columns)), *wide.itertuples()]
    mean = table.set_index(["method", "asked", "metric"])["mean"]
    said = [
        f"{name}: {mean[name, 'as edited', 'EA']:.0f} % of the edited prompts are answered word "
        "for word under teacher forcing; of the free answers "
        f"{mean[name, 'as edited', 'EF']:.0f} % hold the new one, "
        f"{mean[name, 'framed', 'EF']:.0f} % of those inside a frame."
        for name in dict.fromkeys(table["method"])
        if name != "unedited"
    ]
    head = f"{model}, {n} facts at once, per cent with 95 % bootstrap intervals over facts."
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "", *said, "", *lines, "", made, ""])


def seen(table: pd.DataFrame, model: str, n: int, made: str) -> str:
    """The few of the scores that the README shows: what benchmarks say, and what a user sees."""
    columns = {name: ("as edited", name) for name in ("ES", "PS", "NS", "EA")}
    columns |= {"free": ("as edited", "EF"), "free, in a frame": ("framed", "EF")}
    columns |= {"what follows": ("as edited", "free portability")}
    columns |= {"neighbours, free": ("as edited", "NF")}
    cells = table.set_index(["method", "asked", "metric"])
    lines = ["| method | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    for method in dict.fromkeys(table["method"]):
        found = [cells.reindex([(method, *place)]).iloc[0] for place in columns.values()]
        row = [f"{c['mean']:.0f} [{c['ci_low']:.0f}, {c['ci_high']:.0f}]" for c in found]
        row = ["" if cell.startswith("nan") else cell for cell in row]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    said = f"{model}, {n} facts that it knows, at once; per cent, 95 % intervals over facts."
    return "\n".join([*lines, "", f"{said} {made}", ""])


def together(folder: Path, what: str) -> None:
    """`WHAT.csv` of this folder: the tables of its methods under each other, column run."""
    paths = {path.stem.partition(" ")[2]: path for path in sorted(folder.glob(f"{what} *.csv"))}
    tables = [read(folder, path.stem).assign(run=run) for run, path in paths.items()]
    if tables:
        table = pd.concat(tables, ignore_index=True)
        table.to_csv(folder / f"{what}.csv", index=False, float_format="%.6g")


def draw(folder: Path) -> Figure:
    """What each help is worth, on edited prompts and on paraphrases; what is left in a row."""
    gap = read(folder, "gap").query("run != 'unedited'")
    in_a_row = (folder / "retention.csv").exists()
    fig, axes = panels(8.0, 5.0 if in_a_row else 2.7, 2 if in_a_row else 1, 2)
    for ax, kind in zip(axes[0], ("rewrite", "paraphrase"), strict=True):
        plotting.gap_bars(gap, ax, kind)
    axes[0, 1].set_yticklabels([])
    if not in_a_row:
        legend(fig, axes[0, 0], 3)
        return fig
    row = read(folder, "retention")
    for ax, metric in zip(axes[1], ("EF", "perplexity"), strict=True):
        plotting.retention_lines(row, ax, metric)
    axes[1, 0].set(ylim=(-3, 103), ylabel="free answers right, %")
    legend(fig, axes[1, 0], 3)
    return fig


def record(folder: Path) -> None:
    """Put the tables of this model and their figure among the committed ones."""
    target = RESULTS / folder.name
    target.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.csv" for name in ("scores", *PARTS) if (folder / f"{name}.csv").exists()]
    for name in (*names, "free_answers.md", "seen.md"):
        (target / name).write_bytes((folder / name).read_bytes())
    told = {}
    for place in (path for path in sorted(RESULTS.iterdir()) if (path / "gap.csv").exists()):
        name = f"free_answers/{place.name}"
        used = make(draw, "fig_free_answers", place, place)
        for suffix in (".pdf", ".svg"):
            (place / f"fig_free_answers{suffix}").unlink(missing_ok=True)
        told[f"{name}/fig_free_answers"] = [f"{name}/{table}" for table in used]
    manifest.write("free_answers.py", HERE / "results", told, computed=True, into=manifest.RECORDED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=real.MODEL, help="name, directory or hub id")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layers", nargs="+", type=int, default=real.LAYERS, help="critical ones")
    parser.add_argument("--fast", action="store_true", help="targets of `Hparams.fast`")
    parser.add_argument("--texts", help="text file for the second moments, one text a line")
    parser.add_argument("--tokens", type=int, default=real.N_TOKENS, help="of that text")
    parser.add_argument("--frame", help='"chat", or a text with {}; None: chat where there is one')
    parser.add_argument("--until", default="sentence", choices=("sentence", "line", "token"))
    parser.add_argument("--limit", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=1, help="facts of a batch in a row")
    parser.add_argument(
        "--every", type=int, default=20, help="facts between checkpoints; 0: none in a row"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT / "free_answers")
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        study = Study(args)
        study.run()
    except (pl.ModelError, pl.DataError, pl.FactError) as error:
        parser.exit(2, f"{error}\n")
    table = scores(study.folder, ("unedited", *args.methods))
    table.to_csv(study.folder / "scores.csv", index=False, float_format="%.6g")
    minutes = spent(study.folder) + (time.monotonic() - start) / 60
    (study.folder / "minutes.txt").write_text(str(minutes), encoding="utf-8")
    made = provenance(minutes, study.model.device)
    steps = ", fast targets" * args.fast
    text = page(table, args.model + steps, len(study.facts), made)
    (study.folder / "free_answers.md").write_text(text, encoding="utf-8")
    few = seen(table, args.model + steps, len(study.facts), made)
    (study.folder / "seen.md").write_text(few, encoding="utf-8")
    for part in PARTS:
        together(study.folder, part)
    make(draw, "fig_free_answers", study.folder, study.folder)
    if args.record:
        record(study.folder)


if __name__ == "__main__":
    main()
