"""The folder of a grid: results and shards as files, each whole or not there.

results/DIGEST.parquet   the rows of one run: every prompt that was asked
results/DIGEST.json      its manifest: the run, the summary, versions, hardware, time
answers/, edits/         shards of a run, removed once its result is there
contexts/, moments/, targets/   shards that runs share
locks/                   who works on what; no content, can be removed while nothing runs
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from pmet_lens.data import file_format
from pmet_lens.data.file_format import hash_of
from pmet_lens.editing import edit_files
from pmet_lens.evaluation import metrics
from pmet_lens.experiments.grid import GridError, Run

FORMAT = "pmet_lens result 1"
PACKAGES = ("pmet-lens", "torch", "transformers", "transformer-lens", "numpy", "pandas")
"""The packages that a result follows from; the workers of one grid have the same of each."""


COLUMNS = ["run", "model", "edits", "metric", "mean", "ci_low", "ci_high", "n", "digest"]
"""Of the table of a grid."""


class FolderError(GridError):
    """A file of the folder could not be written: no run can go on until there is room."""


@dataclass(frozen=True)
class Folder:
    """The files of one grid, below `root`."""

    root: Path

    def path(self, file: str) -> Path:
        """Where a file of this folder lies."""
        return self.root / file

    def begin(self) -> None:
        """Make the folder, and see that it can be written.

        Raises:
            FolderError: where it cannot.
        """
        with self.writing(self.root):
            for name in ("results", "locks"):
                self.path(name).mkdir(parents=True, exist_ok=True)
            with file_format.whole(self.path("locks") / "probe") as part:
                part.write_text("", encoding="utf-8")

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """A block that writes `path`; raises `FolderError` where the disk does not take it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, (OSError, SafetensorError)):
                raise
            raise FolderError(
                f"{path} could not be written: {cause}. Free some space or raise the quota (or "
                "name a folder you may write to) and start again: what was finished is kept."
            ) from error

    @contextmanager
    def claimed(self, file: str) -> Iterator[bool]:
        """A block that one process at a time is in for this file, whichever machine it runs on;
        False where another one is."""
        from filelock import FileLock, Timeout

        path = self.path("locks") / f"{hash_of(file)}.lock"
        lock, mine = FileLock(path), True
        with self.writing(path):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                mine = False
        if not mine:
            yield False
            return
        try:
            for left in self.path(file).parent.glob(f"{Path(file).name}.*.part"):
                left.unlink(missing_ok=True)  # of a process that was killed: its lock was free
            yield True
        finally:
            lock.release()

    def write_table(self, file: str, table: pd.DataFrame, record: Mapping[str, Any]) -> None:
        """A table as `file` (parquet), and `record` with its hash beside it (JSON). That comes
        last: with it the table is there, without it not."""
        path = self.path(file)
        with self.writing(path):
            with file_format.whole(path) as part:
                _uniform(table).to_parquet(part, index=False)
            record = {**record, "rows": len(table), "sha256": file_format.file_digest(path)}
            with file_format.whole(path.with_suffix(".json")) as part:
                part.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")

    def read_table(self, file: str) -> pd.DataFrame:
        """A table that is `intact`."""
        return pd.read_parquet(self.path(file))

    def present(self, file: str) -> bool:
        """Whether the file was finished, judged by its name alone."""
        path = self.path(file)
        return path.exists() and (path.suffix != ".parquet" or path.with_suffix(".json").exists())

    def intact(self, file: str) -> bool:
        """Whether the file was finished and holds what was written. Reads all of it."""
        path = self.path(file)
        if not self.present(file):
            return False
        try:
            if path.suffix == ".parquet":
                record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                return record["sha256"] == file_format.file_digest(path)
            if path.suffix == ".json":
                text = json.loads(path.read_text(encoding="utf-8"))
                return text["sha256"] == hash_of(text["contexts"])
            file_format.read(path, None, "a shard", GridError)
        except (OSError, ValueError, LookupError, TypeError):
            return False
        return True

    def remove(self, file: str) -> None:
        """Remove a file and what belongs to it."""
        path = self.path(file)
        path.with_suffix(".json").unlink(missing_ok=True)  # first: without it there is no table
        path.unlink(missing_ok=True)

    def finished(self, run: Run) -> bool:
        """Whether the result of this run is there, judged by its name."""
        return self.present(result_file(run.digest))


def result_file(digest: str) -> str:
    """The file of the result with this digest."""
    return f"results/{digest}.parquet"


def read_manifest(folder: Folder, run: Run) -> dict[str, Any]:
    """The manifest of a result that is there."""
    path = folder.path(result_file(run.digest)).with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8"))


def summary_of(manifest: Mapping[str, Any], run: Run) -> pd.DataFrame:
    """The rows a result has in the table of a grid: `COLUMNS`."""
    table = pd.DataFrame(manifest["summary"]).astype({"mean": float, "n": int})
    table = table.astype({"ci_low": float, "ci_high": float})
    head = {"run": run.name, "model": run.model, "edits": run.edits, "digest": run.digest}
    return table.assign(**head)[COLUMNS]


def rows_of(run: Run, folder: str | Path) -> pd.DataFrame:
    """What was asked in one run, prompt by prompt: the columns of `evaluate`, with the facts of
    `others` as rows of kind "other". `summarise` and paired comparisons begin here.

    Raises:
        GridError: where the result is not there, or is damaged.
    """
    results = Folder(Path(folder))
    file = result_file(run.digest)
    if not results.intact(file):
        state = "damaged" if results.present(file) else "not there"
        raise GridError(
            f"{results.path(file)} is {state}: run the grid with pl.run, which makes what is "
            "missing."
        )
    return results.read_table(file)


def summarise_parts(parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The summary of one run from its measurements ("answers", "generation", "others", "ability",
    whichever there are): index metric, columns mean, ci_low, ci_high, n."""
    asked = [parts[kind] for kind in ("answers", "generation") if kind in parts]
    tables = [metrics.summarise(pd.concat(asked, ignore_index=True))] if asked else []
    if "others" in parts:
        # In groups every fact is asked after each of the edits.
        right = (
            100 * parts["others"].pivot_table(index="fact", values="correct")["correct"].to_numpy()
        )
        row = list(metrics.interval(right))
        index = pd.Index(["collateral"], name="metric")
        tables.append(pd.DataFrame([row], index, pd.Index(["mean", "ci_low", "ci_high", "n"])))
    if "ability" in parts:
        tables.append(parts["ability"].set_index("metric"))
    return pd.concat(tables).astype({"n": int})


def write_result(
    folder: Folder, run: Run, parts: Mapping[str, pd.DataFrame], made: Mapping[str, Any]
) -> None:
    """Rows and manifest of one run. `made`: what the manifest says beside run and summary."""
    summary = summarise_parts(parts).reset_index()
    summary = summary.astype(object).where(summary.notna(), None)
    rows = [parts[k] for k in ("answers", "generation") if k in parts]
    rows += [parts["others"].assign(kind="other")] if "others" in parts else []
    table = pd.concat(rows, ignore_index=True) if rows else parts["ability"]
    manifest = {"format": FORMAT, "name": run.name, "run": run.record(), **made}
    manifest["summary"] = summary.to_dict(orient="list")
    folder.write_table(result_file(run.digest), table, manifest)


def versions() -> dict[str, str]:
    """Python, and the packages that a result follows from."""
    return {"python": platform.python_version()} | {p: edit_files.installed(p) for p in PACKAGES}


def hardware(device: Any) -> dict[str, Any]:
    """What the numbers were computed on."""
    import torch

    backend: Any = getattr(torch, device.type, None)
    named = hasattr(backend, "get_device_name")
    name = backend.get_device_name(device) if named else platform.machine()
    cores = os.cpu_count() or 1
    return {"device": name, "cores": cores, "threads": torch.get_num_threads()}


def _uniform(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of one type each, as parquet wants them: records may be numbered and named."""
    texts = {}
    for name, column in table.items():
        kinds = {type(v) for v in column if not (v is None or _is_nan(v))}
        if column.dtype == object and len(kinds) > 1:
            texts[name] = [v if v is None else str(v) for v in column]
    return table.assign(**texts)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
