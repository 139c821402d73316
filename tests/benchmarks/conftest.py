"""What the benchmarks share: models, the comparison in turn, and the tables that are kept."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas as pd
import pytest
import torch

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
rows: list[dict[str, Any]] = []
"""What the run has measured so far; written after each."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="replace the committed tables")
    parser.addoption("--device", default="cpu", help="cpu (default), cuda, mps")
    parser.addoption("--tiny", action="store_true", help="small shapes, to see that it runs")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where everything runs."""
    torch.set_num_threads(min(os.cpu_count() or 1, 16))
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def small(request) -> bool:
    """Whether only the running of the benchmarks is tried."""
    return request.config.getoption("--tiny")


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def compare(benchmark, device, request):
    """`compare(name, plain, fast, …)`: both in turn, a row of the table. Each is called with the
    number of the round and returns the amount of work it did (1 where both do the same)."""

    def run(
        name: str,
        plain: Callable[[int], float],
        fast: Callable[[int], float],
        *,
        allows: str,
        wanted: float,
        unit: str = "s",
        scale: float = 1.0,
        rounds: int = ROUNDS,
    ) -> float:
        slow: list[float] = []
        own: list[float] = []

        def timed(work: Callable[[int], float], kept: list[float]) -> None:
            wait(device)
            start = time.perf_counter()
            done = work(len(kept))
            wait(device)
            kept.append((time.perf_counter() - start) / done * scale)

        # The plain side runs as the set-up of every round, so that both meet the same machine.
        benchmark.pedantic(
            lambda: timed(fast, own), setup=lambda: timed(plain, slow), rounds=rounds, iterations=1
        )
        ratios = [a / b for a, b in zip(slow, own, strict=True)]
        ratio = statistics.median(ratios)
        row = {
            "what": name,
            "plain": statistics.median(slow),
            "here": statistics.median(own),
            "unit": unit,
            "ratio": ratio,
            "least": min(ratios),
            "most": max(ratios),
            "rounds": rounds,
            "counted": allows,
            "wanted": wanted,
        }
        benchmark.extra_info.update(row)
        rows.append(row)
        write(request.config)  # a run that is cut keeps what it has
        return ratio

    return run


def where() -> str:
    """The machine and the versions, in one line."""
    names = ("torch", "transformers", "transformer-lens")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{date.today()}, {machine}, {versions}, Python {platform.python_version()}"


def keep(name: str, frame: pd.DataFrame, note: str, config: pytest.Config) -> None:
    """Write a table to `out/`, and with `--record` to `results/`."""
    folders = [RESULTS.parent / "out", *([RESULTS] if config.getoption("--record") else [])]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        frame.to_csv(folder / f"{name}.csv", index=False)
        text = markdown(frame) + f"\n{note} {where()}.\n"
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def markdown(frame: pd.DataFrame) -> str:
    """The table as text."""
    lines = [" | ".join(map(str, frame.columns)), " | ".join("---" for _ in frame.columns)]
    lines += [" | ".join(map(str, row)) for row in frame.itertuples(index=False)]
    return "".join(f"| {line} |\n" for line in lines)


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}"


def write(config: pytest.Config) -> str:
    """The rows so far as a table, kept as `keep` does; also what is printed."""
    frame = pd.DataFrame(rows)
    shown = pd.DataFrame(
        {
            "what": frame["what"],
            "plain": frame["plain"].map(number) + " " + frame["unit"],
            "here": frame["here"].map(number) + " " + frame["unit"],
            "ratio": [
                f"{r:.1f} [{a:.1f}, {b:.1f}]"
                for r, a, b in zip(frame["ratio"], frame["least"], frame["most"], strict=True)
            ],
            "counting allows": frame["counted"],
            "wanted": "≥ " + frame["wanted"].map(number),
        }
    )
    note = f"Medians of {frame['rounds'].min()} interleaved rounds or more; in brackets the range."
    device = config.getoption("--device")
    keep("tiny" if config.getoption("--tiny") else device, shown, note, config)
    return markdown(shown)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if rows:
        sys.stdout.write(f"\n{write(session.config)}")
