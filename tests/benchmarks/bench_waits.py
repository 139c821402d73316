"""What a user waits for on SmolLM2-135M, against the package at the commit `waits.BEFORE`.

Two processes, one per version, do each row in turn. Needs the model (`pmet-lens models --fetch
smollm2-135m`) and a clone that has the commit; else it is skipped, with the reason.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import waits
from conftest import keep, number

import pmet_lens as pl

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-135m"
ROWS = {
    # what a user does: (its function in `Waits`, rounds)
    "load the model": ("load", 2),
    "sample context prefixes": ("prefixes", 1),
    "second moments of 2,500 tokens, six layers": ("moments", 1),
    "edit one fact, PMET": ("edit", 1),
    "the same, now with Hparams.fast()": ("fast", 1),
    "be told settings, from 1 fact": ("suggest", 1),
    "causal trace of 1 fact, every place and layer": ("trace", 1),
    "lens on 1 fact, all streams and layers": ("lens", 1),
    "component similarity, 3 facts": ("similarity", 1),
    "variance split, all facts": ("variance", 1),
    "patch components between a pair": ("patching", 1),
    "general ability, 5 texts and 10 facts": ("ability", 1),
    "evaluate 10 facts": ("evaluate", 1),
    "ask 20 facts": ("recall", 3),
    "write 54 tokens": ("generate", 1),
}
FACTS = 50
measured: list[dict[str, str]] = []


class Version:
    """One version of the package in a process of its own, its model read."""

    def __init__(self, package: Path, *args: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(package)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(Path(waits.__file__)), *map(str, args)]
        self.process = subprocess.Popen(command, env=env, **pipes)  # type: ignore[call-overload]

    def __call__(self, row: str, round_: int) -> tuple[float, float]:
        """Seconds, and MB resident at most."""
        self.process.stdin.write(f"{row} {round_}\n")
        self.process.stdin.flush()
        seconds, size = self.process.stdout.readline().split()
        return float(seconds), float(size)


@pytest.fixture(scope="module")
def versions(tmp_path_factory, device) -> Iterator[tuple[Version, Version]]:
    """The package before and as it is, on the same model, facts and texts."""
    if device.type != "cpu":
        pytest.skip("the version before is measured on a CPU only")
    if not pl.available_models().set_index("name").loc[NAME, "here"]:
        pytest.skip(f"{NAME} is not here: pmet-lens models --fetch {NAME}")
    git = ["git", "-C", str(ROOT), "archive", waits.BEFORE, "pmet_lens"]
    archive = subprocess.run(git, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this clone does not have commit {waits.BEFORE} to compare with")
    folder = tmp_path_factory.mktemp("waits")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder / "before", filter="data")
    model = pl.load(NAME)
    # Neither version reads the GGUF file: both read the same float32 weights.
    for part in (model.hf, model.tokenizer):
        part.save_pretrained(folder / "model")
    facts = [_plain(fact) for fact in _chosen(pl.recalled(model))]
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    # The bundled world's text: what it says makes no difference to the time that it takes.
    world = pl.texts()
    lines = [" ".join(islice(world, 8)) for _ in range(200)]
    (folder / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    shared = [folder / "model", folder / "facts.json", folder / "texts.txt"]
    both = Version(folder / "before", *shared), Version(ROOT, *shared)
    yield both
    for version in both:
        version.process.kill()
        version.process.wait()


def _chosen(known: list[pl.Fact]) -> list[pl.Fact]:
    """Up to `FACTS`: patching needs two facts of a subject, variance two of a relation."""
    subjects = Counter(fact.subject for fact in known)
    facts = sorted(known, key=lambda fact: subjects[fact.subject] == 1)[:FACTS]
    relations = Counter(fact.relation for fact in facts)
    return [fact for fact in facts if relations[fact.relation] > 1]


def _plain(fact: pl.Fact) -> dict[str, object]:
    """The fields of a fact that the version before knows."""
    row = dataclasses.asdict(fact)
    return {field: row[field] for field in waits.FIELDS}


@pytest.mark.parametrize("what", ROWS)
def test_wait(what, versions, small, request):
    """Both versions in turn; medians of the rounds."""
    row, rounds = ROWS[what]
    before, here = [], []
    for round_ in range(1 if small else rounds):
        for version, kept in zip(versions, (before, here), strict=True):
            kept.append(version(row, round_))
    ratios = [b / h for (b, _), (h, _) in zip(before, here, strict=True)]
    spread = f" [{min(ratios):.1f}, {max(ratios):.1f}]" if len(ratios) > 1 else ""
    seconds = [f"{number(statistics.median(s for s, _ in side))} s" for side in (before, here)]
    sizes = [f"{number(max(size for _, size in side) / 1024)} GB" for side in (before, here)]
    measured.append(
        {
            "what": what,
            "before": seconds[0],
            "here": seconds[1],
            "ratio": f"{statistics.median(ratios):.1f}{spread}",
            "memory before": sizes[0],
            "memory here": sizes[1],
        }
    )
    note = (
        f"SmolLM2-135M, real facts it recalls; before: commit {waits.BEFORE}. Medians of "
        "1 to 3 interleaved rounds, in brackets the range; memory: largest resident size."
    )
    keep("waits", pd.DataFrame(measured), note, request.config)
