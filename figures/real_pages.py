"""Tables and pages of the study on real models, from its pieces: `python figures/real_pages.py`.

`collect` puts the pieces of every model in `figures/out/real_study` into one table per stage,
beside them and in `figures/results/real`, where rows of what has no pieces there stay: the stages
of a model may be made one after the other, in several folders, and its methods, too: what every
fact came to is kept (`real_rows.py`). The page is `study.md`. With `--known` a whole run on facts
that the models know is kept beside it, in `figures/results/real/known`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import real_rows
import real_verdicts
import study
from common import HERE, OUT, read
from filelock import FileLock

import pmet_lens as pl
from pmet_lens import data, evaluation

RESULTS = HERE / "results" / "real"
KNOWN = ("edits", "ablations", "settings", "refused", "made")
"""What is kept of a run on known facts: the rest has nothing to do with which facts are edited."""
INTERVAL = ["mean", "ci_low", "ci_high", "n"]
DIFFERENCE = ["difference", "difference_low", "difference_high"]
FREE = ("EF", "PF", "NF", "free portability", "free locality")
SHOWN = ("S", "ES", "PS", "NS", "EA", "PA", "NA", "EF", "PF", "portability", "locality")
SHOWN += ("collateral", "perplexity", "KL")
ZSRE = ("score", "efficacy", "paraphrase", "specificity")
TABLES: dict[str, tuple[str, ...]] = {
    "recall": ("list",), "trace": ("stream",), "claims": ("statement",), "layers": ("statement",),
    "losses": ("method", "settings"), "arrival": ("method", "settings"),
    "edits": ("benchmark", "edits", "run"), "ablations": ("edits", "run"),
    "strength": ("edits", "run", "factor"),
    "settings": ("method",), "refused": ("piece",), "made": ("stage",),
}  # fmt: skip
"""Table -> what, beside the model, rows are made again by."""
STAGE_OF = {
    "recall": "recall", "trace": "trace", "claims": "claims", "losses": "gain", "arrival": "gain",
    "answers": "gain", "rows": "edits", "free": "edits", "ability": "edits", "others": "edits",
    "zsre": "edits", "ablation": "ablations", "held": "strength", "spared": "strength",
}  # fmt: skip
"""Kind of a piece -> what it is called where it says when it was made."""
IDENTITY = "identity.txt"
"""What the pieces of a folder are of: facts, others and the steps of targets, as a hash."""
SECONDS = "seconds.txt"
"""How long each piece of a folder took: a line each, with a tab between."""
FEW = 100
"""Facts at once of the stage `edits`; more are the stage `many`."""
SLASH = "÷"
"""What stands for a slash in the name of a file."""
Pieces = dict[str, pd.DataFrame]


def collect(out: Path = OUT / "real_study", results: Path | None = None) -> None:
    """The tables and the page of all pieces there are; `results`: where the committed ones lie."""
    out.mkdir(parents=True, exist_ok=True)
    folders = sorted(path.parent for path in out.glob("*/made.txt"))
    with FileLock(out / "tables.lock"):
        parts = [tables(folder, results) for folder in folders]
        if results is not None:
            no_longer_refused(pd.concat([pd.DataFrame(), *(p["pieces"] for p in parts)]), results)
        for name in TABLES:
            new = pd.concat([pd.DataFrame(), *(p[name] for p in parts if name in p)])
            if not new.empty:
                write(out / f"{name}.csv", new)
                if results is not None:
                    results.mkdir(parents=True, exist_ok=True)
                    write(results / f"{name}.csv", with_others(new, results, name))
        for folder in filter(None, (out, results)):
            pages = {"study": page, "verdicts": real_verdicts.page, "methods": methods}
            for name, text in ((name, made(folder)) for name, made in pages.items()):
                with data.whole(folder / f"{name}.md") as part:
                    part.write_text(text, encoding="utf-8")


def keep_known(out: Path = OUT / "real_study", results: Path = RESULTS / "known") -> None:
    """The tables and the page of the edits of one run, in place of those of another."""
    if not (out / "edits.csv").exists():
        raise SystemExit(f"{out} holds no edits of a run: call `make real` first.")
    if results.exists():
        shutil.rmtree(results)
    results.mkdir(parents=True)
    for name in KNOWN:
        if (table := out / f"{name}.csv").exists():
            shutil.copy(table, results)
    (results / "methods.md").write_text(methods(out), encoding="utf-8")


def path_of(folder: Path, name: str, kind: str = "csv") -> Path:
    """The file of a piece; "w/o" is no folder."""
    return folder / f"{name.replace('/', SLASH)}.{kind}"


def write(path: Path, table: pd.DataFrame) -> None:
    with data.whole(path) as part:
        table.to_csv(part, index=False, float_format="%.5g")


def with_others(new: pd.DataFrame, folder: Path, name: str) -> pd.DataFrame:
    """`new` in place of what it makes again, with all other rows; columns stay where they are."""
    if not (folder / f"{name}.csv").exists():
        return new
    old, keys = read(folder, name), ["model", *TABLES[name]]
    again = pd.MultiIndex.from_frame(new[keys].astype(str))
    stays = ~pd.MultiIndex.from_frame(old[keys].astype(str)).isin(again)
    by = [key for key in ("model", "benchmark", "edits") if key in keys]
    whole = pd.concat([new, old[stays]]).sort_values(by, kind="stable", ignore_index=True)
    return whole[[*old.columns, *(column for column in new if column not in old)]]


def no_longer_refused(made: pd.DataFrame, folder: Path) -> None:
    """Take the pieces that are made now out of the table of those that could not be."""
    path, keys = folder / "refused.csv", ["model", "piece"]
    if path.exists() and not made.empty:
        old, here = read(folder, path.stem), pd.MultiIndex.from_frame(made[keys])
        write(path, old[~pd.MultiIndex.from_frame(old[keys]).isin(here)])


def tables(folder: Path, results: Path | None = None) -> Pieces:
    """The tables of one model, as far as there are pieces in its folder; those of edits and
    ablations also from the rows that `results` keeps, to which the folder's are added."""
    stems = sorted(path.stem for path in folder.glob("*.csv"))
    pieces = {stem.replace(SLASH, "/"): read(folder, stem) for stem in stems}
    refused = {name: t["refused"].iloc[0] for name, t in pieces.items() if "refused" in t}
    pieces = {name: table for name, table in pieces.items() if name not in refused}
    every = pieces
    if results is not None and (folder / IDENTITY).exists():  # older folders do not say
        identity = (folder / IDENTITY).read_text(encoding="utf-8")
        every = dict(sorted((real_rows.stored(results, folder.name, identity) | pieces).items()))
        real_rows.store(results, folder.name, identity, every)
    found = {
        "recall": recall(pieces),
        "trace": joined(of(pieces, "trace")),
        **claims(pieces),
        **gain(pieces),
        "edits": edits(every),
        "ablations": ablations(every),
        "strength": strength(every),
        "settings": settings(folder),
        "refused": pd.DataFrame(refused.items(), columns=["piece", "why"]),
        "made": made(folder, pieces),
    }
    there = {n: t.assign(model=folder.name) for n, t in found.items() if not t.empty}
    return {**there, "pieces": pd.DataFrame({"piece": [*pieces]}).assign(model=folder.name)}


def made(folder: Path, pieces: Pieces) -> pd.DataFrame:
    """When and with what each stage was made, and what its pieces took, where that is known."""
    took = pd.Series(seconds(folder), dtype=float)
    minutes = took.groupby(took.index.map(stage_of)).sum() / 60
    told = pd.DataFrame({"stage": stages(pieces)})
    text = (folder / "made.txt").read_text(encoding="utf-8")
    return told.assign(made=text, minutes=told["stage"].map(minutes))


def seconds(folder: Path) -> dict[str, float]:
    """Piece -> seconds that making it took; what was made twice counts twice."""
    path, found = folder / SECONDS, Counter[str]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name, _, took = line.rpartition("\t")
        found[name] += float(took)
    return dict(found)


def stage_of(piece: str) -> str:
    """The stage that makes a piece."""
    kind, _, rest = piece.partition(" ")
    size, _, run = rest.partition(" ")
    stage = STAGE_OF.get(kind, "") if run == real_rows.method_of(run) else "strength"
    return "many" if stage == "edits" and run != "unedited" and int(size) > FEW else stage


def stages(pieces: Pieces) -> list[str]:
    """Those of which there are pieces; the unedited model is asked in two of them, and says
    nothing."""
    found = {stage_of(name) for name in pieces if not name.endswith(" unedited")}
    return [stage for stage in (*dict.fromkeys(STAGE_OF.values()), "many") if stage in found]


def of(pieces: Pieces, kind: str) -> Pieces:
    """The pieces of a kind: what stands behind its name → table."""
    mine = {name: table for name, table in pieces.items() if name.split(" ")[0] == kind}
    return {name.partition(" ")[2]: table for name, table in mine.items()}


def joined(pieces: Pieces) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(), *pieces.values()], ignore_index=True)


def recall(pieces: Pieces) -> pd.DataFrame:
    """Per list and relation, and of the whole list, the share that is recalled, per cent."""
    rows = []
    for name, table in of(pieces, "recall").items():
        groups = [("all", table)]
        if table["relation"].notna().any():
            groups += sorted(table.groupby("relation"), key=lambda pair: -len(pair[1]))
        for relation, own in groups:
            right = evaluation.interval(100 * own["correct"].to_numpy(dtype=float))
            rows.append((name, relation, *right))
    return pd.DataFrame(rows, columns=["list", "relation", *INTERVAL])


def claims(pieces: Pieces) -> Pieces:
    own = study.named(of(pieces, "claims"))
    return {"claims": pl.claims(own), "layers": pl.claims_by_layer(own)} if own else {}


def gain(pieces: Pieces) -> Pieces:
    """What each delta does alone, and what arrives layer after layer."""
    losses, arrival = [], []
    for name, table in of(pieces, "losses").items():
        kind, _, method = name.partition(" ")
        told = evaluation.means(table, ["added"], "nll")
        losses.append(told.assign(settings=kind, method=method))
    for name, table in of(pieces, "arrival").items():
        kind, _, method = name.partition(" ")
        by = ["written", "layer", "stream"]
        for quantity in ("delta", "output", "nll"):
            told = evaluation.means(table, by, quantity).assign(quantity=quantity)
            arrival.append(told.assign(settings=kind, method=method))
    for name, table in of(pieces, "answers").items():
        kind, _, method = name.partition(" ")
        told = pl.summarise(table).loc[["ES", "PS", "NS", "EA"]].reset_index(names="quantity")
        arrival.append(pd.DataFrame(told).assign(settings=kind, method=method))
    frames = {"losses": losses, "arrival": arrival}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items() if parts}


def edits(pieces: Pieces) -> pd.DataFrame:
    """One row per benchmark, number of facts, method and metric; differences to MEMIT, paired, by
    the steps that serve it best."""
    rows, free, others = (of(pieces, kind) for kind in ("rows", "free", "others"))
    ability, zsre = of(pieces, "ability"), of(pieces, "zsre")
    sizes = [int(key.split(" ")[0]) for key in rows if key.endswith(" unedited")]
    unedited, frames = f"{max(sizes, default=0)} unedited", []
    for key in rows:
        size, _, run = key.partition(" ")
        if run == "unedited" and key != unedited:
            continue
        memit, n = at_best(rows, f"{size} MEMIT"), rows[key]["fact"].nunique()
        before = rows[unedited][rows[unedited]["fact"] < n] if sizes else None
        parts = [against(rows, key, memit, before), against(free, key, memit, None)]
        parts[1] = parts[1].reindex(columns=parts[0].columns)
        parts[1] = parts[1][parts[1]["metric"].isin(FREE)]
        if key in others:
            right = 100 * others[key]["correct"].to_numpy(dtype=float)
            row = {"metric": "collateral", **dict(zip(INTERVAL, evaluation.interval(right)))}  # noqa: B905
            if memit in others and memit != key:
                gap = evaluation.interval(right - 100 * others[memit]["correct"].to_numpy(float))
                row |= dict(zip(DIFFERENCE, gap))  # noqa: B905
            parts.append(pd.DataFrame([row]))
        if key in ability:
            parts.append(ability[key])
        whole = pd.concat(parts, ignore_index=True)
        told = {"edits": 0 if run == "unedited" else int(size), "run": run}
        frames.append(whole.assign(benchmark="facts", **told))
    for key in zsre:
        size, _, run = key.partition(" ")
        told = against(zsre, key, f"{size} MEMIT", None)
        frames.append(told.assign(benchmark="zsre", edits=int(size), run=run))
    frames.sort(key=lambda frame: (frame["benchmark"].iloc[0], frame["edits"].iloc[0]))
    return pd.concat([pd.DataFrame(), *frames], ignore_index=True)


def at_best(rows: Pieces, key: str) -> str:
    """The key by the steps with the highest S, of those that are there."""
    there = [one for one in real_rows.by_steps(key) if one in rows]
    scores = {one: pl.summarise(rows[one]).loc["S", "mean"] for one in there}
    return max(there, key=scores.__getitem__, default=key)


def against(rows: Pieces, key: str, other: str, before: pd.DataFrame | None) -> pd.DataFrame:
    """The summary of a table of rows, and the paired differences to another."""
    if key not in rows:
        return pd.DataFrame(columns=["metric", *INTERVAL, *DIFFERENCE])
    table = pl.summarise(rows[key], before)
    if other in rows and other != key:
        gap = evaluation.paired(rows[key], rows[other], before).drop(columns="n")
        table = table.join(gap.set_axis(DIFFERENCE, axis=1))
    return pd.DataFrame(table).reset_index()


def ablations(pieces: Pieces) -> pd.DataFrame:
    """Differences are paired, to PMET by the same steps."""
    rows, frames = of(pieces, "ablation"), []
    for key in rows:
        size, _, run = key.partition(" ")
        told = against(rows, key, f"{size} PMET{run[len(real_rows.method_of(run)) :]}", None)
        frames.append(told.assign(edits=int(size), run=run))
    return pd.concat([pd.DataFrame(), *frames], ignore_index=True)


def strength(pieces: Pieces) -> pd.DataFrame:
    """Edits held back by several times the strength that was found best; once: the edits."""
    held, spared = of(pieces, "held"), of(pieces, "spared")
    for key in {key.partition(" × ")[0] for key in held}:
        if f"rows {key}" in pieces and f"others {key}" in pieces:
            held[f"{key} × 1"] = pieces[f"rows {key}"]
            spared[f"{key} × 1"] = pieces[f"others {key}"]
    frames = []
    for key, rows in held.items():
        (size, _, run), factor = (part := key.partition(" × "))[0].partition(" "), part[2]
        told = pl.summarise(rows).reset_index()
        if key in spared:
            right = 100 * spared[key]["correct"].to_numpy(dtype=float)
            kept = {"metric": "collateral", **dict(zip(INTERVAL, evaluation.interval(right)))}  # noqa: B905
            told = pd.concat([told, pd.DataFrame([kept])], ignore_index=True)
        frames.append(told.assign(edits=int(size), run=run, factor=float(factor)))
    if not frames:
        return pd.DataFrame()
    by = ["edits", "run", "factor"]
    return pd.concat(frames).sort_values(by, kind="stable", ignore_index=True)


def settings(folder: Path) -> pd.DataFrame:
    rows = []
    for path in sorted(folder.glob("tuned *.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        name = path.stem.partition(" ")[2].replace(SLASH, "/")
        for n, hp in whole.items():
            if n.isdecimal():
                told = ", ".join(f"{k} {v}" for k, v in hp.items() if v is not None)
                rows.append(
                    (name, int(n), told, whole["spent"], whole.get("seconds"), whole["why"])
                )
    return pd.DataFrame(rows, columns=["method", "edits", "settings", "spent", "seconds", "why"])


# -- the page -------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """Everything there is, as Markdown: the first table is what is recalled."""
    have = {n: read(folder, n) for n in TABLES if (folder / f"{n}.csv").exists()}
    made = have.get("made", pd.DataFrame({"model": [], "made": []}))
    if made.empty:
        return "No real model has been through the study yet (`make real`).\n"
    lines = ["Per cent where nothing else is said, with 95 % bootstrap intervals over facts."]
    for title, draw, name in SECTIONS:
        if name in have:
            lines += ["", f"**{title}**", "", *draw(have[name])]
    lines += when(made)
    return "\n".join([*lines, ""])


def when(made: pd.DataFrame) -> list[str]:
    """Per model and time, which stages were made then and with what, a paragraph each."""
    lines = []
    for (model, text), own in made.groupby(["model", "made"], sort=False):
        took = own["minutes"] if "minutes" in own else pd.Series(index=own.index, dtype=float)
        told = [
            name if pd.isna(m) else f"{name} ({m:.1f} minutes)"
            for name, m in zip(own["stage"], took, strict=True)
        ]
        lines += ["", f"{model}, {', '.join(told)}: {text}"]
    return lines


def methods(folder: Path) -> str:
    """Every method at `FEW` facts at once, each by the steps that serve it best, as Markdown."""
    table = read(folder, "edits") if (folder / "edits.csv").exists() else pd.DataFrame()
    if table.empty:
        return "No real model has been edited yet (`make real`).\n"
    table = table[(table["benchmark"] == "facts") & table["edits"].isin([0, FEW])]
    head = ["S", "EA", "PA", "EF", "PS", "NS", "collateral", "perplexity"]
    rows: list[list[object]] = [["model", "method", *head, "S against MEMIT"]]
    for model, own in table.groupby("model", sort=False):
        scores = own[own["metric"] == "S"].set_index("run")["mean"]
        for _, runs in scores.groupby(scores.index.map(real_rows.method_of), sort=False):
            best = str(runs.idxmax())
            by = own[own["run"] == best].set_index("metric")
            cells = [cell(by.loc[m], int(m == "S")) if m in by.index else "" for m in head]
            gap = "" if best == "unedited" else cell(by.loc["S"], 1, *["difference"] * 2)
            rows.append([model, best, *cells, gap])
    note = (
        f"{FEW} facts at once; per cent but for perplexity, 95 % bootstrap intervals over facts. "
        "Each method by fast or published steps, whichever gave the higher S where both were tried."
    )
    made = read(folder, "made") if (folder / "made.csv").exists() else pd.DataFrame()
    told = when(made[made["stage"].isin(["edits", "strength"])]) if len(made) else []
    return "\n".join([*grid(rows), "", note, *told, ""])


def grid(rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows as Markdown; the first is the head."""
    lines = [list(map(str, row)) for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(row: pd.Series, digits: int = 1, value: str = "mean", ends: str = "ci") -> str:
    """A number with its interval."""
    if pd.isna(row[value]):
        return ""
    low, high = row[f"{ends}_low"], row[f"{ends}_high"]
    return f"{row[value]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _recall(table: pd.DataFrame) -> list[str]:
    models = list(dict.fromkeys(table["model"]))
    rows: list[list[object]] = [["list", "relation", "facts", *models]]
    for (name, relation), own in table.groupby(["list", "relation"], sort=False):
        if relation != "all" and re.fullmatch(r"P\d+", str(relation)):
            continue
        mine = own.set_index("model")
        cells = [cell(mine.loc[m]) if m in mine.index else "" for m in models]
        rows.append([name, relation, int(own["n"].iloc[0]), *cells])
    return grid(rows)


def _trace(table: pd.DataFrame) -> list[str]:
    """The highest layer of each component and place."""
    rows: list[list[object]] = [
        ["model", "component", "layers restored", "place", "most comes back"]
    ]
    for (model, stream, window, place), own in table.groupby(
        ["model", "stream", "window", "place"], sort=False
    ):
        best = own.loc[own["recovered"].idxmax()]
        most = cell(best, 2, "recovered")
        rows.append([model, stream, window, place, f"{most}, layer {int(best['layer'])}"])
    return [*grid(rows), "", f"{int(table['n'].max())} facts that the model recalls."]


def _claims(table: pd.DataFrame) -> list[str]:
    rows: list[list[object]] = [["statement", "model", "measured", "number", "against", "verdict"]]
    for row in table.to_dict("records"):
        number, against = (
            f"{row[v]:.2f}" + ("" if pd.isna(row[lo]) else f" [{row[lo]:.2f}, {row[hi]:.2f}]")
            for v, lo, hi in (
                ("number", "ci_low", "ci_high"),
                ("against", "against_low", "against_high"),
            )
        )
        told = [row[k] for k in ("statement", "model", "measured")]
        rows.append([*told, number, against, row["verdict"]])
    return grid(rows)


def _layers(table: pd.DataFrame) -> list[str]:
    rows: list[list[object]] = [["statement", "model", "holds in layers", "does not in", "open in"]]
    for (statement, model), own in table.groupby(["statement", "model"], sort=False):
        told = [own.loc[own["verdict"] == v, "layer"] for v in ("holds", "does not hold", "open")]
        rows.append([statement, model, *(spans(list(map(int, layers))) for layers in told)])
    return grid(rows)


def spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 as "1–3, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)


def _losses(table: pd.DataFrame) -> list[str]:
    rows: list[list[object]] = [["model", "method", "settings", "added", "NLL of the new answer"]]
    for _, row in table.iterrows():
        rows.append([*(row[k] for k in ("model", "method", "settings", "added")), cell(row, 2)])
    return [*grid(rows), "", "Nats per token, on the plain prompt, deltas added to the streams."]


def _arrival(table: pd.DataFrame) -> list[str]:
    names = {"delta": "along its δ", "output": "layer output along all δ", "nll": "NLL"}
    rows: list[list[object]] = [["model", "method", "settings", "layers written", *names.values()]]
    own = table[table["quantity"].isin(names)]
    keys = ["model", "method", "settings", "written"]
    for key, part in own.groupby(keys, sort=False):
        by = part.set_index("quantity")
        rows.append([*key[:3], int(key[3]), *(cell(by.loc[name], 2) for name in names)])
    answers = table[table["quantity"] == "EA"]
    said = [
        f"{r['model']}, {r['method']} ({r['settings']}): EA {cell(r)}"
        for _, r in answers.iterrows()
    ]
    return [*grid(rows), "", "; ".join(said)]


def _scores(table: pd.DataFrame, other: str, keys: Sequence[str]) -> Iterator[str]:
    for model, own in table.groupby("model", sort=False):
        metrics = [m for m in (*SHOWN, *ZSRE) if m in set(own["metric"])]
        head = [*keys, *metrics, f"S against {other}"]
        rows: list[list[object]] = [head]
        for key, part in own.groupby(list(keys), sort=False):
            by = part.set_index("metric")
            digits = {m: 2 if m in ("perplexity", "KL") else 1 for m in metrics}
            cells = [cell(by.loc[m], d) if m in by.index else "" for m, d in digits.items()]
            score = "score" if "score" in by.index else "S"
            gap = cell(by.loc[score], 1, "difference", "difference") if DIFFERENCE[0] in by else ""
            rows.append([*key, *cells, gap])
        yield from (f"**{model}**", "", *grid(rows), "")


def _edits(table: pd.DataFrame) -> list[str]:
    return list(_scores(table, "MEMIT", ("benchmark", "edits", "run")))


def _ablations(table: pd.DataFrame) -> list[str]:
    return list(_scores(table, "PMET", ("edits", "run")))


def _strength(table: pd.DataFrame) -> list[str]:
    metrics = [m for m in SHOWN if m in set(table["metric"])]
    keys = ["model", "edits", "run", "factor"]
    rows: list[list[object]] = [["model", "edits", "method", "times the strength", *metrics]]
    for key, part in table.groupby(keys, sort=False):
        by = part.set_index("metric")
        cells = [cell(by.loc[m]) if m in by.index else "" for m in metrics]
        rows.append([*key[:3], f"{key[3]:g}", *cells])
    note = "Strength: λ, of AlphaEdit its ridge; 1 is what was found best by S on other facts."
    return [*grid(rows), "", note]


def _refused(table: pd.DataFrame) -> list[str]:
    """What is measured of one edit is refused for one reason: a line for all of it."""
    told = table["piece"].str.extract(r"^\w+ (?P<edits>\d+) (?P<run>.+)$").join(table)
    told["run"] = told["run"].fillna(told["piece"])
    rows: list[list[object]] = [["model", "what", "facts", "why not"]]
    for (model, run, why), own in told.groupby(["model", "run", "why"], sort=False):
        edits = sorted(set(own["edits"].dropna().astype(int)))
        rows.append([model, run, ", ".join(map(str, edits)), why])
    return grid(rows)


SECTIONS = (
    ("What the models recall", _recall, "recall"),
    ("Where they recall", _trace, "trace"),
    ("The statements", _claims, "claims"),
    ("The statements, layer by layer", _layers, "layers"),
    ("What each delta does alone", _losses, "losses"),
    ("What arrives, layer after layer", _arrival, "arrival"),
    ("Edits", _edits, "edits"),
    ("Ablations", _ablations, "ablations"),
    ("Held back less and more", _strength, "strength"),
    ("What could not be", _refused, "refused"),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--known", action="store_true", help="keep the edits of a run on its own")
    known = parser.parse_args().known
    if known:
        keep_known()
    else:
        collect(results=RESULTS)
    sys.stdout.write(f"Tables and pages: {RESULTS / 'known' if known else RESULTS}\n")
