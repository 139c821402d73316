"""The main table on a model that knows real CounterFact facts:
`python figures/real_facts.py MODEL_DIRECTORY DATA_DIRECTORY`.

DATA_DIRECTORY holds `counterfact/counterfact_500.json`, `zsre/zsre_known_locality_150.json` and
`knowns/known_1000.json` in their published formats, `counterfact/training_text_sample.txt` for the
second moments and `wiki/enwiki_sample.txt` for the perplexity. Writes
`figures/out/real/`, with `--record` also the table in `figures/results/real/`; never the data.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import HERE, OUT, Progress, provenance

import pmet_lens as pl
from pmet_lens import experiments

SIZES = {"counterfact": (1, 10, 100), "zsre": (1, 10, 100)}
"""The settings below were chosen for 100 on CounterFact records 400 to 449, a few tries each."""
SINGLES = 20
"""Records edited one at a time, each on the clean model."""
COLUMNS = {
    "counterfact": ["S", "ES", "PS", "NS", "EA", "PA", "NA", "perplexity", "KL"],
    "zsre": ["score", "efficacy", "paraphrase", "specificity", "perplexity", "KL"],
}
_MEMIT = pl.Hparams(
    layers=(1, 2, 3),
    n_steps=25,
    lr=0.5,
    clamp=1.5,
    kl_weight=0.0625,
    second_moment_weight=30.0,
    easing=1.0,
    null_space_l2=0.1,
)
_PMET = replace(
    _MEMIT, n_steps=30, clamp=0.75, weight_decay=0.02, easing=0.1, reference_norm="resid_post"
)
_ROME = replace(_PMET, layers=(3,), clamp=1.5, easing=1.0)


def settings(method: Any) -> Any:
    """Strengths for the small model that the table is of; see `SIZES`."""
    if isinstance(method, pl.FineTune):
        bound = 0.3 if method.constrained else None
        return pl.FineTuneHparams(layer=3, lr=1e-2, n_steps=40, norm_constraint=bound)
    if isinstance(method.solver, Exact):
        return _ROME
    return _MEMIT if method.delta_at == ("resid_post",) else _PMET


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--record", action="store_true", help="keep the table")
    parser.add_argument("--quick", action="store_true", help="few facts, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    out = OUT / "real"
    bench = bench_of(args.model, args.data, out)
    methods = {n: m for n, m in pl.METHODS.items() if not isinstance(m, pl.Mend)}
    progress = Progress((1 + len(methods)) * sum(map(len, SIZES.values())))
    tables = []
    for benchmark, sizes in SIZES.items():
        facts = records(args.data, benchmark)
        for n in sizes[:2] if args.quick else sizes:
            for run, method in {"unedited": None, **methods}.items():
                progress.stage(f"{benchmark} {n} {run}")
                try:
                    if n == 1:
                        table = one_at_a_time(bench, facts[: 2 if args.quick else SINGLES], method)
                    else:
                        table = measured(bench, args.data, facts[:n], method)
                except pl.SolveError:
                    progress.done()
                    continue
                load = round(n / bench.model.d_in(pl.Site(0, "mlp")), 3)
                found = table.reset_index().assign(benchmark=benchmark, run=run, edits=n, load=load)
                tables.append(found)
                progress.done()
    progress.bar.close()
    whole = pd.concat(tables, ignore_index=True)
    note = provenance((time.perf_counter() - start) / 60)
    text = report(whole, args.model.name, note)
    whole.round(3).to_csv(out / "main.csv", index=False)
    (out / "main.md").write_text(text, encoding="utf-8")
    sys.stdout.write(f"\n{text}")
    if args.record:
        kept = HERE / "results" / "real"
        kept.mkdir(parents=True, exist_ok=True)
        for name in ("main.csv", "main.md"):
            shutil.copy(out / name, kept / name)


def bench_of(model: Path, data: Path, folder: Path) -> pl.Bench:
    """The model with second moments of text like that it was trained on."""
    texts = list(pl.texts(data / "counterfact" / "training_text_sample.txt"))
    return pl.Bench(pl.load(str(model)), folder, texts, hparams=settings)


def records(data: Path, benchmark: str) -> list[pl.Fact]:
    """The benchmark's records; of zsRE those whose locality answer the model knows."""
    if benchmark == "zsre":
        return pl.zsre(data / "zsre" / "zsre_known_locality_150.json")
    return pl.counterfact(data / "counterfact" / "counterfact_500.json")


def measured(
    bench: pl.Bench, data: Path, facts: list[pl.Fact], method: pl.Method | pl.Editor | None
) -> pd.DataFrame:
    edit = None
    if method is not None:
        edit = bench.edit(pl.Trial(method), facts)
    table = experiments.measure(bench.model, facts, edit)
    prompts = [f.text for f in pl.knowns(data / "knowns" / "known_1000.json", n=200)]
    texts = islice(pl.texts(data / "wiki" / "enwiki_sample.txt"), 200)
    rest = pl.general_ability(bench.model, edit, texts=texts, prompts=prompts, others=())
    return pd.concat([table, rest])


def one_at_a_time(
    bench: pl.Bench, facts: list[pl.Fact], method: pl.Method | pl.Editor | None
) -> pd.DataFrame:
    """Every record edited alone; what is asked about texts is left out."""
    if method is None:
        return experiments.measure(bench.model, facts)
    trial, rows = pl.Trial(method), []
    for i, fact in enumerate(facts):
        with bench.edit(trial, [fact]).applied(bench.model):
            rows.append(pl.evaluate(bench.model, [fact]).assign(fact=i))
    return pl.summarise(pd.concat(rows, ignore_index=True)).astype({"n": int})


def report(table: pd.DataFrame, model: str, note: str) -> str:
    """The table as Markdown."""
    lines = [
        f"Model `{model}`, real records. MEND has no editor for it. EMMET is missing where two "
        "records give the same key (one subject, both prompts beginning with it): an exact solver "
        f"cannot give one key two values. One edit: the first {SINGLES} records, each alone on the "
        "clean model."
    ]
    for benchmark, columns in COLUMNS.items():
        lines += ["", f"**{benchmark}**", ""]
        lines.append("| " + " | ".join(["edits (per MLP unit)", "method", *columns]) + " |")
        lines.append("|" + "---|" * (2 + len(columns)))
        lines += list(_rows(table[table["benchmark"] == benchmark], columns))
    return "\n".join([*lines, "", f"95 % bootstrap intervals over facts. {note}", ""])


def _rows(table: pd.DataFrame, columns: list[str]) -> Iterator[str]:
    for (n, load, run), own in table.groupby(["edits", "load", "run"], sort=False):
        own = own.set_index("metric")
        digits = {m: 2 if m in ("perplexity", "KL") else 1 for m in columns}
        cells = [
            f"{own.loc[m, 'mean']:.{d}f} [{own.loc[m, 'ci_low']:.{d}f}, "
            f"{own.loc[m, 'ci_high']:.{d}f}]"
            if m in own.index
            else ""
            for m, d in digits.items()
        ]
        yield "| " + " | ".join([f"{n} ({load:.2f})", str(run), *cells]) + " |"


if __name__ == "__main__":
    main()
