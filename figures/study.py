"""The paper's study on the bundled models: tables, figures and what they say of its statements.

`python figures/study.py` writes the tables (CSV) and figures of `figures/fig_*.py` to
`figures/out/`; with `--record` also to `figures/results/`. The third model, `world-unmasked`, is
the same as `world` without the read mask that imposes a recall site on the other two.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import fig_causal_trace
import fig_component_similarity
import fig_delta_geometry
import fig_lens
import fig_relation_vs_subject
import manifest
import pandas as pd
import quotes
from common import (
    EDITED,
    HERE,
    OUT,
    STUDIED,
    Progress,
    make,
    provenance,
    submit,
    workers,
)

import pmet_lens as pl
from pmet_lens import evaluation

FIGURES = {
    "fig_component_similarity": fig_component_similarity.draw,
    "fig_causal_trace": fig_causal_trace.draw,
    "fig_relation_vs_subject": fig_relation_vs_subject.draw,
    "fig_delta_geometry": fig_delta_geometry.draw,
    "fig_lens": fig_lens.draw,
}
TRACED = {"resid_post": 1, "attn_out": 3, "mlp_out": 3}  # stream -> layers restored together
RESULTS = HERE / "results"
Tables = dict[str, pd.DataFrame]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="keep tables and figures")
    parser.add_argument("--quick", action="store_true", help="few facts, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with workers(len(STUDIED)) as pool:
        begin(pool, args.out, args.record, args.quick)()


def begin(
    pool: Executor, out: Path = OUT, record: bool = False, quick: bool = False
) -> Callable[[], None]:
    """Hands the work out; what is returned waits for it and writes tables and figures."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = submit(pool, list(STUDIED), partial(study, (70, 5) if quick else (300, 40)))

    def finish() -> None:
        found = [one.result() for one in done]
        for key in dict.fromkeys(k for tables in found for k in tables):
            whole = pd.concat([t[key] for t in found if key in t], ignore_index=True)
            whole.round(4).to_csv(out / f"{key}.csv", index=False)
        used = {name: make(draw, name, out, out) for name, draw in FIGURES.items()}
        manifest.write("study.py", out, used, computed=True)
        text = report(out, (time.perf_counter() - start) / 60)
        (out / "claims.md").write_text(text, encoding="utf-8")
        sys.stdout.write(f"\n{text}\nFigures and tables: {out}\n")
        if record:
            kept = [f"{n}.png" for n in FIGURES] + [f"{k}.csv" for k in found[0]] + ["claims.md"]
            for file in kept:
                shutil.copy(out / file, RESULTS / file)
            manifest.write("study.py", RESULTS, used, computed=True, into=manifest.RECORDED)
            quotes.fill()

    return finish


def study(sizes: tuple[int, int], name: str, place: int) -> Tables:
    """All tables of one model: the components on so many facts, the deltas on so many."""
    progress = Progress(7 if name in EDITED else 6, place)
    model, world = pl.load(name), pl.knowns()
    chosen = set(list(dict.fromkeys(f.subject for f in world))[:: max(1, len(world) // sizes[0])])
    facts = [f for f in world if f.subject in chosen]
    tables: Tables = {}
    for key, make_table in components(model, facts, max(10, sizes[0] // 3)).items():
        progress.stage(f"{name}: {key}")
        tables[key] = make_table()
        progress.done()
    progress.stage(f"{name}: causal trace")
    some = pl.counterfact(n=max(3, sizes[0] // 10))
    tables["causal_trace"] = pd.concat(
        [pl.causal_trace(model, some, stream=s, window=w, samples=2) for s, w in TRACED.items()]  # type: ignore[arg-type]
    )
    progress.done()
    if name in EDITED:
        progress.stage(f"{name}: deltas and drift")
        facts = pl.counterfact(n=sizes[1])
        hparams, contexts = pl.hparams_for(model, pl.PMET), pl.sample_contexts(model)
        found = pl.optimise(model, facts, pl.PMET, hparams, contexts)
        moments = pl.second_moments(model, pl.texts(), projections=("mlp",), n_tokens=20_000)
        tables |= deltas(model, pl.edit(model, facts, moments, pl.PMET, hparams, contexts, found))
        progress.done()
    tables["claims"] = pl.claims(named(tables))
    progress.bar.close()
    return {key: t.assign(model=name) for key, t in summarised(tables).items()}


def components(
    model: pl.Model, facts: Sequence[pl.Fact], n_pairs: int
) -> dict[str, Callable[[], pd.DataFrame]]:
    """How each table is made of what the components of a model do while it recalls `facts`."""
    return {
        "component_similarity": lambda: pl.component_similarity(model, facts),
        "lens": lambda: pl.lens(model, facts),
        "variance": lambda: pl.variance_split(model, facts, n_permutations=100),
        "patterns": lambda: pl.pattern_similarity(pl.attention_patterns(model, facts), facts),
        "transfer": lambda: pl.transfer(model, facts, n_pairs=n_pairs),
    }


def deltas(model: pl.Model, edit: pl.Edit) -> Tables:
    """The two deltas of PMET, and what editing all facts at once moved."""
    facts, found = list(edit.facts), edit.targets
    assert found is not None
    gain, drift = pl.answer_gain(model, facts, found), pl.drift(model, facts, edit)
    return {"delta_paths": found.history, "delta_gain": gain, "drift": drift}


def named(tables: Tables) -> Tables:
    """The same under the names by which `pl.claims` knows them."""
    names = {"component_similarity": "similarity", "delta_gain": "gain"}
    return {names.get(key, key): table for key, table in tables.items()}


def summarised(tables: Tables) -> Tables:
    """Tables of single facts replaced by their means with intervals."""
    out = dict(tables)
    lens = tables["lens"]
    out["lens"] = evaluation.means(lens, ["stream", "position", "layer"], "probability")
    if "delta_paths" in tables:
        history = tables["delta_paths"]
        names = ["gradient_cosine", "cosine", "norm_attn_out", "norm_mlp_out"]
        parts = [evaluation.means(history, ["step"], q).assign(quantity=q) for q in names]
        out["delta_paths"] = pd.concat(parts, ignore_index=True)
        out["delta_gain"] = evaluation.means(tables["delta_gain"], ["stream"], "gain")
    return out


def report(out: Path, minutes: float) -> str:
    """What the study says of the paper's statements, as Markdown."""
    table = pd.read_csv(out / "claims.csv")
    lines = ["| statement | measured | " + " | ".join(STUDIED) + " |"]
    lines.append("|---|---|" + "---|" * len(STUDIED))
    for statement, own in table.groupby("statement", sort=False):
        cells = []
        for name in STUDIED:
            row = own[own["model"] == name]
            if row.empty:
                cells.append("")
                continue
            number, against, holds = row.iloc[0][["number", "against", "holds"]]
            verdict = "holds" if holds else "**does not hold**"
            cells.append(f"{verdict}: {number:.2f} against {against:.2f}")
        lines.append(f"| {statement} | {own['measured'].iloc[0]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", provenance(minutes), ""])


if __name__ == "__main__":
    main()
