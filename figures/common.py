"""What the figure scripts share: models, where tables and figures lie, how a figure is saved."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import pmet_lens as pl
from pmet_lens import plotting

HERE = Path(__file__).parent
OUT = HERE / "out"
EDITED = {"world": "parallel blocks (GPT-J style)", "world-sequential": "sequential (GPT-2 style)"}
STUDIED = {
    "world": "world (parallel)",
    "world-sequential": "world-sequential",
    "world-unmasked": "world-unmasked (parallel)",
}
"""The bundled models: the first two with an imposed recall site, the third without."""


Found = TypeVar("Found")


@contextmanager
def workers(most: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `most` tasks of `submit`, at most one per core, which share the cores: two of
    one thread beat one of two here."""
    count = min(most, os.cpu_count() or 1)
    # Spawned, so that every process sets its own threads.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(count, spawn, _begin, (spawn.Value("i", most),)) as pool:
        yield pool


_left: Any = None  # of a process of a pool: how many of the pool's tasks are not over


def _begin(left: Any) -> None:
    """What a process of a pool does first."""
    global _left
    _left = left
    share_cores()


def share_cores() -> None:
    """Take the cores that tasks which are over have left: for a long task, now and then. Outside a
    pool nothing changes."""
    if _left is not None:
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // max(1, min(_left.value, cores))))


def left_alone() -> bool:
    """Whether this is a process of a pool whose program is gone: what it makes nobody waits for,
    and the next run makes it, too."""
    program = parent_process()
    return program is not None and not program.is_alive()


def _ended(run: Callable[[str, int], Found], name: str, place: int) -> Found:
    """`run`, after which the others have its cores; where nobody waits for it, the process ends,
    which would keep its memory."""
    try:
        return run(name, place)
    finally:
        if left_alone():
            os._exit(1)
        if _left is not None:
            with _left.get_lock():
                _left.value -= 1


def submit(
    pool: Executor, names: Sequence[str], run: Callable[[str, int], Found]
) -> list[Future[Found]]:
    """`run(name, place)` of every model. `run` has to be a function of a module, or a `partial` of
    one. `place` is the line of its progress bar."""
    return [pool.submit(_ended, run, name, place) for place, name in enumerate(names)]


class Progress:
    """One bar for the job of one process; a stage is a tick."""

    def __init__(self, stages: int, place: int = 0) -> None:
        self.bar = tqdm(
            total=stages, unit="stage", position=place, file=sys.stderr, dynamic_ncols=True
        )

    def stage(self, text: str) -> None:
        """Name what runs now."""
        self.bar.set_description(text)
        self.bar.refresh()

    def done(self) -> None:
        """One stage is over."""
        self.bar.update()


def save(fig: Figure, stem: Path) -> None:
    """The figure as PDF, SVG and PNG; the same figure gives the same bytes."""
    for suffix, dated in (("pdf", {"CreationDate": None}), ("svg", {"Date": None}), ("png", {})):
        fig.savefig(stem.with_suffix(f".{suffix}"), metadata=dated)


def panels(width: float, height: float, rows: int, columns: int, **more: Any) -> tuple[Figure, Any]:
    """A figure (inches) and its axes, as an array of rows and columns."""
    fig = Figure(figsize=(width, height))
    return fig, fig.subplots(rows, columns, squeeze=False, **more)


def legend(fig: Any, ax: Any, columns: int) -> None:
    """One legend below all panels."""
    handles, labels = ax.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=columns)


def script(draw: Callable[[Path], Figure], name: str, doc: str | None, paper: bool = False) -> None:
    """The command line of a figure script: read the tables, draw, save."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    tables = HERE / "results" / "paper" if paper else OUT
    maker = "paper.py" if paper else "study.py"
    parser.add_argument("--tables", type=Path, default=tables, help=f"those of {maker}")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    try:
        make(draw, name, args.tables, args.out)
    except FileNotFoundError as error:
        parser.exit(2, f"{error.filename} is missing: run `python figures/{maker}` first.\n")


def make(draw: Callable[[Path], Figure], name: str, tables: Path, out: Path) -> list[str]:
    """Draw the figure `name` from the tables in `tables`; returns the files it was drawn from."""
    _read.clear()
    with mpl.rc_context({**plotting.STYLE, "svg.hashsalt": name}):
        save(draw(tables), out / name)
    return sorted(set(_read))


_read: list[str] = []  # the tables that the figure being drawn has read


def read(tables: Path, name: str) -> pd.DataFrame:
    """One table of the study, of `make figures` or of `make paper`."""
    _read.append(f"{name}.csv")
    # "NA" is the name of a metric here.
    return pd.read_csv(tables / f"{name}.csv", keep_default_na=False, na_values=[""])


def paper_note(tables: Path, text: str) -> str:
    """The title of a figure of `make paper`; it says so where the tables are of a quick run."""
    made = (tables / "provenance.txt").read_text(encoding="utf-8")
    return f"Quick run, few facts: {text}" if "Quick" in made else text


def of(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def known_records(model: pl.Model) -> list[pl.Fact]:
    """The bundled CounterFact records whose facts this bundled model recalls."""
    known = {(fact.subject, fact.relation) for fact in pl.recalled(model)}
    return [fact for fact in pl.counterfact() if (fact.subject, fact.relation) in known]


def samples(table: pd.DataFrame, column: str = "n") -> str:
    """The number of cases as a caption says it."""
    low, high = int(table[column].min()), int(table[column].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def provenance(minutes: float, device: torch.device | None = None) -> str:
    """Date, versions, hardware and time, as every results table carries them."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "transformer-lens"))
    where = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
    if device is not None and device.type != "cpu":
        where = getattr(torch, device.type).get_device_name(device)
    return (
        f"{date.today()}, {versions}, Python {platform.python_version()}, {where}, "
        f"{minutes:.1f} minutes."
    )
