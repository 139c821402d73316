"""What to run on a GPU, in ten minutes: `python figures/gpu.py --facts FILE --texts FILE`.

In this order: the tests of a device against the processor; thousands of facts at once into
SmolLM2-135M (`mass_edit.py`); the shapes of GPT-J-6B with random weights
(`tests/benchmarks/gptj_shapes.py`), from which follows what the paper's row of 10,000 edits takes;
the benchmarks of `make bench-gpu`. Each part runs by itself with a limit of time, so that one that
hangs does not take the others'; its words are in `figures/out/gpu/PART.log`, its tables beside
them. `--device cpu --tiny` tries everything without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from common import HERE, OUT, provenance

ROOT = HERE.parent
BENCHES = ("edit", "evaluation", "moments", "targets")


def parts(args: argparse.Namespace) -> dict[str, tuple[list[str], float]]:
    """Name -> what follows `python`, and the minutes it may take."""
    tests, tiny = ROOT / "tests", ["--tiny"] if args.tiny else []
    keep = ["--record"] if args.record else []
    loads = ["--loads", "4", "8"] if args.tiny else []
    many = ["figures/mass_edit.py", "--device", args.device, "--out", str(args.out / "mass_edit")]
    many += ["--facts", args.facts, "--texts", args.texts, *loads]
    files = [str(tests / "benchmarks" / f"bench_{name}.py") for name in BENCHES]
    bench = ["-m", "pytest", "-q", f"--confcutdir={tests / 'benchmarks'}", *files]
    bench += ["-o", "python_files=bench_*.py", f"--device={args.device}", *tiny, *keep]
    shapes = [str(tests / "benchmarks" / "gptj_shapes.py"), "--device", args.device, *tiny]
    device = ["-m", "pytest", "-q", "-m", "device", str(tests / "repo" / "test_device.py")]
    found = {
        "tests": (device, 1.5),
        "mass_edit": ([*many, "--minutes", "4.9", *keep], 5.3),
        "gptj_shapes": ([*shapes, "--facts", "200", *keep], 2.5),
        "bench": (bench, 2.5),
    }
    return {name: found[name] for name in args.parts}


def run(name: str, command: Sequence[str], minutes: float, out: Path, device: str) -> str:
    """How the part ended; what it said is in `NAME.log`."""
    env = {**os.environ, "PMET_LENS_DEVICE": device, "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=60 * minutes,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {minutes:.1f} minutes"
    return "done" if ended.returncode == 0 else f"failed ({ended.returncode})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--facts", required=True, help="records, in any form pl.read_facts knows")
    parser.add_argument("--texts", required=True, help="text file, one text a line")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--record", action="store_true", help="replace the committed tables")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together")
    names = ["tests", "mass_edit", "gptj_shapes", "bench"]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--out", type=Path, default=OUT / "gpu")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "There is no GPU here; `--device cpu --tiny` tries the script.\n")
    args.out.mkdir(parents=True, exist_ok=True)
    start, rows = time.monotonic(), []
    for name, (command, most) in parts(args).items():
        begun = time.monotonic()
        left = args.minutes - (begun - start) / 60
        ended = (
            run(name, command, min(most, left), args.out, args.device) if left > 0 else "no time"
        )
        minutes = (time.monotonic() - begun) / 60
        rows.append({"part": name, "ended": ended, "minutes": round(minutes, 2)})
        sys.stdout.write(f"{name}: {ended}, {minutes:.1f} minutes\n")
        sys.stdout.flush()
    for table in (ROOT / "tests" / "benchmarks" / "out").glob("*.*"):
        shutil.copy(table, args.out)
    pd.DataFrame(rows).to_csv(args.out / "parts.csv", index=False)
    made = provenance((time.monotonic() - start) / 60, torch.device(args.device))
    (args.out / "made.txt").write_text(made + "\n", encoding="utf-8")
    if any(row["ended"] != "done" for row in rows):
        parser.exit(1, f"Not everything is there: {args.out} has the logs.\n")


if __name__ == "__main__":
    main()
