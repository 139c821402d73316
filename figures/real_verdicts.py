"""The paper's statements on four models in one table: `python figures/real_verdicts.py`.

"The paper says", then what was measured on `world`, `world-sequential`, SmolLM2 and Gemma, and what
it comes to, made from the tables in `figures/results`. Where a table is not there (yet), the cell
says "not measured".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import real_rows
from common import HERE, read

from pmet_lens import data

RESULTS = HERE / "results"
MODELS = {
    "world": "world",
    "world-sequential": "world-sequential",
    "smollm2-135m": "SmolLM2-135M",
    "gemma-3-270m": "Gemma-3-270M",
}
NOTHING = "not measured"
ENOUGH = 0.9
"""Share of the gain that δ^m has to carry alone to be called enough."""
Cell = tuple[str, str]
"""What was measured, in words, and "holds", "does not hold", "open" or `NOTHING`."""
NONE: Cell = (NOTHING, NOTHING)
Table = pd.DataFrame


class Files:
    """The tables of the bundled models, and those of the study in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, name: str, model: str, bundled: str | None = None) -> Table:
        """A model's rows of the study's table `name`; where there are none, of the bundled one."""
        found = self._read(self.folder, name, model)
        return found if bundled is None or len(found) else self._read(RESULTS, bundled, model)

    @staticmethod
    def _read(folder: Path, name: str, model: str) -> Table:
        if not (folder / f"{name}.csv").exists():
            return pd.DataFrame(columns=["model"])
        table = read(folder, name)
        return table[table["model"] == model]


def page(folder: Path = RESULTS / "real") -> str:
    """The table as Markdown."""
    files, lines = Files(folder), []
    for statement, measured, look in STATEMENTS:
        cells = [look(files, model) for model in MODELS]
        said = [text if told == NOTHING else f"{told}: {text}" for text, told in cells]
        lines.append([f"{statement} ({measured})", *said, verdict([told for _, told in cells])])
    head = ["the paper says (measured)", *MODELS.values(), "verdict"]
    rows = [head, ["---"] * len(head), *lines]
    note = (
        "*Holds*, *does not hold*: the 95 % intervals leave out the opposite; *open*: they do not. "
        "The verdict is that of all models that say something; *differs*: they do not agree. "
        "Differences are points, paired over facts, each method with the settings of its model and "
        "by the steps, fast or published, that give it the higher S; ablations by those of PMET."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note, ""])


def verdict(told: list[str]) -> str:
    """What the models say together; those that say nothing do not count."""
    said = {one for one in told if one not in (NOTHING, "open")}
    if len(said) > 1:
        return "**differs**"
    return f"**{said.pop()}**" if said else "**open**" if "open" in told else NOTHING


def statement(words: str) -> Callable[[Files, str], Cell]:
    """One of `pl.claims`."""

    def look(files: Files, model: str) -> Cell:
        table = files.of("claims", model, "claims")
        rows = table[table["statement"] == words] if len(table) else table
        if rows.empty:
            return NONE
        row = rows.iloc[0]
        told = row["verdict"] if isinstance(row.get("verdict"), str) else None
        told = told or ("holds" if row["holds"] else "does not hold")
        return (NONE if told == NOTHING else
                (f"{row['number']:.2f} against {row['against']:.2f}", told))  # fmt: skip

    return look


def site(files: Files, model: str) -> Cell:
    """MLP against attention at the last subject token, each at its best layer."""
    table = files.of("trace", model, "causal_trace")
    if table.empty:
        return NONE
    table = table[table["place"] == "last subject token"]
    best = {s: own.loc[own["recovered"].idxmax()] for s, own in table.groupby("stream")}
    if not {"mlp_out", "attn_out"} <= best.keys():
        return NONE
    mlp, attn = best["mlp_out"], best["attn_out"]
    text = f"{mlp['recovered']:.2f} at layer {int(mlp['layer'])} against {attn['recovered']:.2f}"
    return text, apart(mlp["ci_low"] - attn["ci_high"], mlp["ci_high"] - attn["ci_low"])


def apart(low: float, high: float) -> str:
    """Whether a difference is above 0, below it, or neither by its interval."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "open"


def better(metric: str, most: bool = True) -> Callable[[Files, str], Cell]:
    """PMET over MEMIT in one metric (not `most`: below it): of the study the most facts up to 100,
    each by the steps that serve it best; of the bundled models those of the ablations, which
    compare MEMIT with PMET."""

    def look(files: Files, model: str) -> Cell:
        table = files.of("edits", model)
        if len(table):
            table = table[(table["benchmark"] == "facts") & table["edits"].between(1, 100)]
            table = table[table["edits"] == table["edits"].max()]
            row = _best_steps(table, "PMET", metric)
        else:
            row = _row(files.of("ablations", model, "paper/ablations"), "MEMIT", metric)
            row = None if row is None else -row
        if row is None:
            return NONE
        return difference(row)[0], difference(row if most else -row)[1]

    return look


def worse(run: str) -> Callable[[Files, str], Cell]:
    """An ablation is worse than PMET in S."""

    def look(files: Files, model: str) -> Cell:
        row = _best_steps(files.of("ablations", model, "paper/ablations"), run, "S")
        if row is None:
            return NONE
        return difference(row)[0], difference(-row)[1]

    return look


def _best_steps(table: Table, run: str, metric: str) -> pd.Series | None:
    """Of a run, by those steps that serve PMET best in S, where it was made by both."""
    scores = {
        steps: of_pmet["mean"].iloc[0]
        for steps in real_rows.by_steps("")
        if len(of_pmet := table[(table["run"] == f"PMET{steps}") & (table["metric"] == "S")])
    }
    rows = [_row(table, run + s, metric) for s in sorted(scores, key=lambda s: -scores[s])]
    rows = [row for row in rows if row is not None]
    return rows[0] if rows else _row(table, run, metric)


def _row(table: Table, run: str, metric: str) -> pd.Series | None:
    """difference, low and high of a run, or None where there are none."""
    if table.empty or "difference" not in table:
        return None
    own = table[(table["run"] == run) & (table["metric"] == metric)].dropna(subset=["difference"])
    names = ["difference", "difference_low", "difference_high"]
    return None if own.empty else own.iloc[0][names].astype(float)


def difference(row: pd.Series) -> Cell:
    """A difference that should be above 0; one that was turned has its ends turned, too."""
    low, high = sorted((row["difference_low"], row["difference_high"]))
    text = f"{row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
    return text, apart(low, high)


def alone(files: Files, model: str) -> Cell:
    """Whether δ^m alone carries the gain of both, with the tuned settings where there are some."""
    table = files.of("losses", model)
    table = table[table["method"] == "PMET"] if len(table) else table
    if table.empty:
        return NONE
    kinds = set(table["settings"])
    nll = table[table["settings"] == ("tuned" if "tuned" in kinds else "released")]
    nll = nll.set_index("added")["mean"]
    share = (nll["nothing"] - nll["mlp_out"]) / (nll["nothing"] - nll["all"])
    told = "holds" if share >= ENOUGH else "does not hold"
    return f"{share:.2f} (NLL {nll['mlp_out']:.2f} against {nll['all']:.2f})", told


CLAIMED = (
    ("MHSA and FFN change their input in different ways", "layers apart"),
    ("MHSA holds general patterns: its output tells what is asked, not about whom",
     "variance of attn_out by relation, by subject"),
    ("FFN holds the facts: its output depends on the subject more than MHSA's does",
     "variance by subject, mlp_out, attn_out"),
    ("MHSA output at the answer position can be swapped between subjects of one relation",
     "own answers, the donor's"),
    ("Where the heads look depends on the relation", "overlap within, across"),
    ("δ^a takes a part of the change that FFN then need not store", "share of the gain"),
    ("MHSA weights need no update: unchanged, they extract the new answer where it is asked",
     "change at edited facts, at neighbours"),
)  # fmt: skip
STATEMENTS: tuple[tuple[str, str, Callable[[Files, str], Cell]], ...] = (
    ("Facts are recalled at the subject's last token by FFN", "trace, FFN, MHSA", site),
    *((words, measured, statement(words)) for words, measured in CLAIMED),
    ("FFN's share is enough: δ^a need not be written", "δ^m's share of the gain", alone),
    ("PMET beats MEMIT over all", "S", better("S")),
    ("PMET beats MEMIT in efficacy", "ES", better("ES")),
    ("PMET's answers come word for word more often than MEMIT's", "EA", better("EA")),
    ("PMET beats MEMIT in generalisation", "PS", better("PS")),
    ("PMET loses to MEMIT in specificity alone", "NS", better("NS", most=False)),
    ("Without δ^a the edit is worse", "S", worse("w/o δ^a")),
    ("Writing MHSA's weights, too, makes it worse", "S", worse("+ W_O")),
    ("With the linear spread it is worse", "S", worse("linear spread")),
    ("With the TL hidden state it is worse", "S", worse("TL hidden state, sqrt spread")),
)


def main() -> None:
    folder = RESULTS / "real"
    with data.whole(folder / "verdicts.md") as part:
        part.write_text(page(folder), encoding="utf-8")
    sys.stdout.write(page(folder))


if __name__ == "__main__":
    main()
