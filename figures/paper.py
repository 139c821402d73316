"""`make paper`: every method, every ablation, both benchmarks, on both bundled models.

Loads and methods are a grid of runs (`pl.run`) in `figures/out/paper/runs/`, every other result is
a small file in `figures/out/paper/MODEL/`; what is there is not computed again, so that a run that
was cut goes on where it stopped. The models run side by side, one thread each; with `--engine ray`
workers of a cluster make the grid of both. At the end the tables of `figures/results/paper/` are
written (with `--record`) and the figures drawn. `--quick`: a few facts of everything, to see that
it runs; its figures say so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import manifest
import pandas as pd
import quotes
from common import EDITED, HERE, OUT, make, provenance, submit, workers
from paper_tables import FIGURES, ablation_table, main_table
from tqdm import tqdm

import pmet_lens as pl
from pmet_lens import data, experiments

GRID = (1, 10, 32, 100, 316, 750)
"""Every other of the paper's numbers of edits, up to all records of the bundled world."""
MAIN = (100, 750)
ZSRE = (100, 316)
ROME_MOST = 100
"""ROME edits one fact after the other, each with an optimisation of its own."""
SHARED = 50
"""Facts per shard of targets: runs with another number of facts share the shards they begin with.
"""
EVERY = 9
"""Of the facts an edit is not about one in so many is asked where many groups are."""
LAMBDAS = (1.0, 10.0, 30.0, 100.0, 1000.0, 10000.0)
CURVE = {
    "PMET": (pl.PMET, False),
    "PMET, protected": (pl.PMET, True),
    "MEMIT": (pl.MEMIT, False),
    "MEMIT, protected": (pl.MEMIT, True),
    "AlphaEdit, protected": (pl.ALPHAEDIT, True),
}
"""Sequential editing: run -> method, and whether the keys of earlier batches are protected."""
TABLES = ("scaling", "ablations", "lambda", "layers", "sequential")
COLUMNS = ["benchmark", "run", "edits", "load", "metric", "mean", "ci_low", "ci_high", "n"]
Jobs = Iterator[tuple[str, str, Callable[[], pd.DataFrame]]]
Cell = tuple[str, int, pl.Run]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    grid: tuple[int, ...] = GRID
    main: tuple[int, ...] = MAIN
    zsre: tuple[int, ...] = ZSRE
    facts_of_small: int = 20
    ablated: int = 200
    swept: int = 50
    curve: tuple[int, int] = (80, 20)
    moment_tokens: int = 100_000
    generate: int = 10
    others: int = 2250
    texts: int = 200
    lambdas: tuple[float, ...] = LAMBDAS
    last: tuple[int, ...] = ()
    curves: tuple[str, ...] = tuple(CURVE)


QUICK = Size(
    grid=(1, 3),
    main=(3,),
    zsre=(3,),
    facts_of_small=2,
    ablated=3,
    swept=3,
    curve=(4, 2),
    moment_tokens=5_000,
    generate=1,
    others=40,
    texts=5,
    lambdas=(10.0, 1000.0),
    last=(3,),
    curves=("PMET", "AlphaEdit, protected"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    parser.add_argument("--quick", action="store_true", help="few facts, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument("--engine", default="serial", help="of loads and methods: serial or ray")
    parser.add_argument("--workers", type=int, help="of ray; default: one per GPU")
    parser.add_argument("--address", help="of a Ray cluster; default: this machine")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out, size = args.out, Size()
    if args.quick:
        out, size = out or OUT / "quick", QUICK
    out = out or OUT / "paper"
    prepare(out, fresh=args.fresh or args.quick)
    if args.engine != "serial":
        grid = {run.digest: run for name in EDITED for *_, run in scaling(name, size)}
        how = {"workers": args.workers, "address": args.address, "strict": False}
        pl.run(list(grid.values()), out / "runs", args.engine, **how)
    with workers(len(EDITED)) as pool:
        begin(pool, out, size, args.record)()


def quickly(pool: Executor) -> Callable[[], None]:
    """`begin` as `--quick` does."""
    out = OUT / "quick"
    prepare(out, fresh=True)
    return begin(pool, out, QUICK, keep=False)


def begin(pool: Executor, out: Path, size: Size, keep: bool) -> Callable[[], None]:
    """Hands the work out; what is returned waits for it and writes tables and figures."""
    start, before = time.perf_counter(), spent(out)
    found = submit(pool, list(EDITED), partial(run_model, size, out))

    def finish() -> None:
        done = [one.result() for one in found]
        minutes = before + (time.perf_counter() - start) / 60
        (out / "minutes.txt").write_text(f"{minutes}\n", encoding="utf-8")
        for name in TABLES:
            whole = pd.concat([tables[name] for tables in done], ignore_index=True)
            whole.round(3).to_csv(out / f"{name}.csv", index=False)
        note = f"{provenance(minutes)}{' Quick: few facts.' if size == QUICK else ''}"
        (out / "provenance.txt").write_text(note + "\n", encoding="utf-8")
        used = {name: make(draw, name, out, out) for name, draw in FIGURES.items()}
        manifest.write("paper.py", out, used, computed=True)
        for name, table in (("main", main_table), ("ablations", ablation_table)):
            (out / f"{name}.md").write_text(table(out), encoding="utf-8")
        sys.stdout.write(f"\nTables and figures: {out}\n")
        if keep:
            record(out, used)

    return finish


def prepare(out: Path, fresh: bool) -> None:
    """A folder for the results of this code. Those of other code are refused, not mixed in."""
    if fresh and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mine = json.dumps({"code": code(), "torch": version("torch")})
    stamp = out / "made_by.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") != mine:
        sys.exit(
            f"{out} holds results of other code or another torch. Start again with --fresh, or "
            f"delete {stamp} to go on with them all the same."
        )
    stamp.write_text(mine, encoding="utf-8")


def spent(out: Path) -> float:
    """Minutes that earlier runs took for what is kept in `out`."""
    file = out / "minutes.txt"
    return float(file.read_text(encoding="utf-8")) if file.exists() else 0.0


def code() -> str:
    """Digest of what the results follow from: the package (without its pictures) and this file."""
    package = Path(pl.__file__).parent
    rooms = (
        p for p in package.rglob("*.py") if p.parent.name not in ("plotting", "explorer", "panel")
    )
    files = [*rooms, *package.rglob("*.safetensors"), package / "bundled/world.json"]
    digest = hashlib.sha256()
    for file in [*sorted(files), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def record(out: Path, used: Mapping[str, Sequence[str]]) -> None:
    """Replace the committed tables and figures, and the table on the page that quotes it."""
    kept = HERE / "results" / "paper"
    kept.mkdir(parents=True, exist_ok=True)
    for file in [*(f"{n}.csv" for n in TABLES), "provenance.txt", "main.md", "ablations.md"]:
        shutil.copy(out / file, kept / file)
    for figure in out.glob("fig_*.png"):
        shutil.copy(figure, kept / figure.name)
    placed = {f"paper/{name}": [f"paper/{table}" for table in own] for name, own in used.items()}
    manifest.write("paper.py", kept.parent, placed, computed=True, into=manifest.RECORDED)
    quotes.fill()


def run_model(size: Size, out: Path, name: str, place: int) -> dict[str, pd.DataFrame]:
    """All tables of one model, each result from its file where it is there."""
    folder, model = out / name, pl.load(name)
    cells = list(scaling(name, size))
    found: dict[str, list[pd.DataFrame]] = {table: [] for table in TABLES}
    with tqdm(total=len(cells), position=place, file=sys.stderr, dynamic_ncols=True) as bar:
        bar.set_description(f"{name}: scaling")
        found["scaling"] = [made(cells, out / "runs", model.d_in(pl.Site(0, "mlp")), bar)]
        bench = pl.Bench(model, folder, n_tokens=size.moment_tokens)
        plan = list(jobs(bench, size))
        bar.reset(total=len(plan))
        for table, key, make in plan:
            bar.set_description(f"{name}: {table} {key}")
            found[table].append(kept(folder / f"{table} {key}.csv", make))
            bar.update()
    whole = {table: pd.concat(parts, ignore_index=True) for table, parts in found.items()}
    return {table: rows.assign(model=name) for table, rows in whole.items()}


def scaling(name: str, size: Size) -> Iterator[Cell]:
    """Benchmark, number of edits and run of every cell, the most important first."""
    rest = sorted(set(size.grid) - set(size.main), reverse=True)
    loads = (("counterfact", size.main), ("zsre", size.zsre), ("counterfact", rest))
    known, world = {b: records(b) for b in ("counterfact", "zsre")}, pl.knowns()
    for benchmark, grid in loads:
        for n in grid:
            # Small numbers are measured on several groups, each on the clean model.
            facts = known[benchmark][: n * max(1, size.facts_of_small // n)]
            others = experiments.others_of(world, facts)
            for method in (None, *pl.METHODS):
                if method != "ROME" or n <= ROME_MOST:
                    yield benchmark, n, run_of(name, size, benchmark, n, method, facts, others)


def run_of(
    name: str,
    size: Size,
    benchmark: str,
    n: int,
    method: str | None,
    facts: Sequence[pl.Fact],
    others: Sequence[pl.Fact],
) -> pl.Run:
    """`n` edits at once, and all there is to measure; of groups their answers and a sample of the
    other facts."""
    own = {"n_tokens": size.moment_tokens, "cut": pl.Cut(targets=SHARED)}
    if len(facts) > n:
        some = {"others": others[: size.others : EVERY], "metrics": ("answers", "collateral")}
        return pl.Run(name, facts, method, group=n if method else None, **some, **own)
    metrics = ["answers", "collateral", "ability"]
    if n in size.main and benchmark == "counterfact":
        metrics.append("generation")
    own |= {"others": others[: size.others], "generate": size.generate, "n_texts": size.texts}
    return pl.Run(name, facts, method, metrics=metrics, **own)


def made(cells: Sequence[Cell], folder: Path, d_in: int, bar: tqdm) -> pd.DataFrame:
    """The table of loads and methods. Exact solvers cannot give one key two values, and some
    subjects have two records: their runs may fail."""
    runs = {run.digest: run for *_, run in cells}
    table = pl.run(
        list(runs.values()), folder, strict=False, progress=False, on_run=lambda *_: bar.update()
    )
    lost = {run.name for digest, run in runs.items() if digest not in set(table["digest"])}
    if lost - {"EMMET"}:
        sys.exit(f"Runs of {', '.join(sorted(lost - {'EMMET'}))} failed; see the warning above.")
    parts = [
        table[table["digest"] == run.digest].assign(
            benchmark=benchmark, edits=n, load=round(n / d_in, 4)
        )
        for benchmark, n, run in cells
    ]
    return pd.concat(parts)[COLUMNS]


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in `path`, made and written there first where it is not; whole or not at all."""
    if not path.exists():
        with data.whole(path) as part:
            make().to_csv(part, index=False)
    # "NA" is the name of a metric here.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def jobs(bench: pl.Bench, size: Size) -> Jobs:
    """What is no run of a grid as (table, key, how it is made), the most important first."""

    yield "ablations", "all", partial(ablated, bench, size)
    for run in ("PMET", "MEMIT"):
        yield "lambda", run, partial(over_lambda, bench, size, run)
    for last in size.last or range(1, bench.model.n_layers - 2):
        yield "layers", f"{last}", partial(over_layers, bench, size, last)
    for run in size.curves:
        yield "sequential", run, partial(curve, bench, size, run)


def records(benchmark: str, n: int | None = None) -> list[pl.Fact]:
    return pl.counterfact(n=n) if benchmark == "counterfact" else pl.zsre(n=n)


def ablated(bench: pl.Bench, size: Size) -> pd.DataFrame:
    """PMET without its parts, all on the same facts."""
    facts = records("counterfact", size.ablated)
    others = experiments.others_of(pl.knowns(), facts)[: size.others]
    table = pl.compare(bench, pl.ablations(bench.settings(pl.PMET)), facts, others)
    return table.assign(edits=len(facts))


def over_lambda(bench: pl.Bench, size: Size, run: str) -> pd.DataFrame:
    """The same targets written with other weights of the second moment."""
    changes = [{"second_moment_weight": weight} for weight in size.lambdas]
    return swept(bench, size, pl.METHODS[run], changes).assign(run=run)


def over_layers(bench: pl.Bench, size: Size, last: int) -> pd.DataFrame:
    """PMET with other critical layers that end at `last`: one to four of them."""
    first = range(last, max(-1, last - 4), -1)
    changes = [{"layers": tuple(range(n, last + 1))} for n in first]
    return swept(bench, size, pl.PMET, changes).assign(run="PMET", last=last)


def swept(bench: pl.Bench, size: Size, method: pl.Method, changes: Sequence[dict]) -> pd.DataFrame:
    facts = records("counterfact", size.swept)
    others = experiments.others_of(pl.knowns(), facts)[: size.others]
    tables = []
    for change in changes:
        trial = pl.Trial(method, change)
        try:
            edit = bench.edit(trial, facts)
        except pl.SolveError:
            # In parallel blocks the keys of layer 0 only know the token: their moment is singular.
            continue
        table = experiments.measure(bench.model, facts, edit, others).reset_index()
        (field, value), *_ = change.items()
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        tables.append(table.assign(**{field: text}, edits=len(facts)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["edits"])


def curve(bench: pl.Bench, size: Size, run: str) -> pd.DataFrame:
    """Batch after batch; the targets of each are those of the model as edited so far."""
    method, protect = CURVE[run]
    n, batch = size.curve
    facts = records("counterfact", n)
    others = experiments.others_of(pl.knowns(), facts)[::EVERY]
    table = experiments.sequential(
        bench.model,
        facts,
        bench.moments,
        method,
        bench.settings(method),
        bench.contexts,
        batch_size=batch,
        protect=protect,
        others=others,
    )
    return table.assign(run=run, batch=batch)


if __name__ == "__main__":
    main()
