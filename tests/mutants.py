"""How many small faults in the code the tests see: `python tests/mutants.py draw | run | report`.

A mutant is the package with one operator, constant or condition changed. `draw` takes a sample with
a fixed seed (it needs `pip install cosmic-ray`, which is no dependency). `run` tries each mutant on
the tests that reach its line, the quickest first, up to `--most` seconds of tests, in a process
forked for it; a run that was cut goes on. First the fast tests; with `--slow` the mutants that
survived them meet the slow tests as well, so that both suites are known. Before `run`, the tests
that reach each line are recorded, once for each suite (`fast`: -m "not slow", `slow`: -m slow):

    COVERAGE_FILE=build/mutants/fast.cov python -m pytest -m "not slow" --cov=pmet_lens \\
      --cov-context=test --cov-report= --junitxml=build/mutants/fast.xml

The package is changed in place while `run` works: use a clone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import resource
import signal
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutants"
WHERE = ("editing/*.py", "evaluation/*.py", "models/tokens.py")
SEED = 20261127
OPERATORS = (
    "ReplaceBinaryOperator", "ReplaceComparison", "ReplaceUnary", "AddNot", "ReplaceTrue",
    "ReplaceFalse", "ReplaceAnd", "ReplaceOr", "ReplaceBreak", "ReplaceContinue", "NumberReplacer",
    "ZeroIteration", "ExceptionReplacer",
)  # fmt: skip
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Pow", "Mod"}
"""Replaced among themselves: a sum that becomes a shift is no fault that people make."""


def draw(most: int) -> None:
    """Sites uniformly, then one change at each; changes of annotations are left out."""
    from cosmic_ray import plugins  # pyright: ignore[reportMissingImports]
    from cosmic_ray.ast import ast_nodes, get_ast  # pyright: ignore[reportMissingImports]
    from cosmic_ray.mutating import mutate_code  # pyright: ignore[reportMissingImports]

    sites: dict[tuple[str, int, int], list[tuple[str, int]]] = defaultdict(list)
    for path in sorted(p for pattern in WHERE for p in (ROOT / "pmet_lens").glob(pattern)):
        code = path.read_text(encoding="utf-8")
        skipped, nodes = list(_annotations(ast.parse(code))), list(ast_nodes(get_ast(code)))
        for name in filter(_taken, plugins.operator_names()):
            places = (p for n in nodes for p in plugins.get_operator(name)().mutation_positions(n))
            for i, (start, _) in enumerate(places):
                if not any(first <= start < last for first, last in skipped):
                    sites[(str(path.relative_to(ROOT)), *start)].append((name, i))
    rng, drawn = random.Random(SEED), []
    keys = sorted(sites)
    rng.shuffle(keys)
    for file, line, column in keys:
        name, i = rng.choice(sites[file, line, column])
        code = (ROOT / file).read_text(encoding="utf-8")
        changed = mutate_code(code, plugins.get_operator(name)(), i)
        if changed and _differs(code, changed):
            drawn.append({"file": file, "line": line, "operator": name, "code": changed})
        if len(drawn) == most:
            break
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "drawn.json").write_text(json.dumps(drawn), encoding="utf-8")
    sys.stdout.write(f"{len(drawn)} of {len(sites)} sites\n")


def _taken(operator: str) -> bool:
    name, *kinds = operator.split("/")[1].split("_")
    if name == "ReplaceBinaryOperator" and kinds[0] in ARITHMETIC:
        return kinds[1] in ARITHMETIC
    return name.startswith(OPERATORS)


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if isinstance(part := getattr(node, field, None), ast.expr):
                end = (part.end_lineno or part.lineno, part.end_col_offset or 0)
                yield (part.lineno, part.col_offset), end


def _differs(code: str, changed: str) -> bool:
    try:
        return ast.dump(ast.parse(code)) != ast.dump(ast.parse(changed))
    except SyntaxError:
        return False


def run(suite: str, most: float, first: int, part: str) -> None:
    """Forks a process for each mutant; `FOLDER/fast.jsonl` and `slow.jsonl` keep what came."""
    drawn = json.loads((FOLDER / "drawn.json").read_text(encoding="utf-8"))[:first]
    k, n = map(int, part.split("/"))
    kept, wanted = FOLDER / f"{suite}.jsonl", set(range(k - 1, len(drawn), n))
    if suite == "slow":
        wanted &= {i for i, row in _rows("fast").items() if not row["killed"]}
    reached = _reached(suite)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    for heavy in ("pandas", "pytest", "torch", "transformer_lens", "transformers"):
        __import__(heavy)  # once for all
    for i in sorted(wanted - set(_rows(suite))):
        tests = reached(drawn[i]["file"], drawn[i]["line"])
        chosen, total = [], 0.0
        for test, seconds in tests:
            if not chosen or total + seconds <= most:
                chosen.append(test)
                total += seconds
        killer = _killed(drawn[i], chosen, suite, total) if chosen else None
        row = {"i": i, "killed": killer is not None, "by": killer}
        row |= {"tests": len(chosen), "of": len(tests)}
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _rows(suite: str) -> dict[int, dict[str, Any]]:
    file = FOLDER / f"{suite}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["i"]: row for row in map(json.loads, lines)}


def _reached(suite: str) -> Any:
    """(file, line) → the tests that reach it, each with its seconds, the quickest first."""
    from coverage import CoverageData

    data = CoverageData(str(FOLDER / f"{suite}.cov"))
    data.read()
    took = {
        (case.get("classname"), case.get("name")): float(case.get("time", 0))
        for case in ET.parse(FOLDER / f"{suite}.xml").iter("testcase")
    }
    # Recorded in this clone or in another.
    files = {f"pmet_lens/{f.rpartition('/pmet_lens/')[2]}": f for f in data.measured_files()}

    def reached(file: str, line: int) -> list[tuple[str, float]]:
        table = data.contexts_by_lineno(files[file]) if file in files else {}
        # A statement over several lines has its tests at the first; what runs while the package is
        # imported has those of its file.
        lines = (n for n in (line, *range(line - 1, line - 8, -1)) if any(table.get(n, ())))
        names = table.get(next(lines, -1)) or [name for of in table.values() for name in of]
        tests = {c.split("|")[0] for c in names if c}
        return sorted(((t, took.get(_case(t), 1.0)) for t in tests), key=lambda pair: pair[1])

    return reached


def _case(test: str) -> tuple[str, str]:
    path, _, name = test.partition("::")
    return path.removesuffix(".py").replace("/", "."), name


def _killed(mutant: dict[str, Any], tests: list[str], suite: str, seconds: float) -> str | None:
    """The test that fails, "" where they take three times their time and a minute more or end with
    an error, None where all pass."""
    target, told = ROOT / mutant["file"], FOLDER / f"failed-{os.getpid()}"
    before = target.read_text(encoding="utf-8")
    target.write_text(mutant["code"], encoding="utf-8")
    told.write_text("", encoding="utf-8")
    try:
        if child := os.fork():
            passed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 5)
            return None if passed else told.read_text(encoding="utf-8")
        _child(tests, "not slow" if suite == "fast" else "slow", int(3 * seconds + 60), told)
    finally:
        target.write_text(before, encoding="utf-8")
    return None


class _First:
    """Keeps the name of the test that failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.path.write_text(report.nodeid, encoding="utf-8")


def _child(tests: list[str], mark: str, limit: int, told: Path) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    signal.alarm(10 * limit)  # for a mutant that waits
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, 1)
    os.dup2(void, 2)
    off = [word for name in ("cacheprovider", "xdist", "cov") for word in ("-p", f"no:{name}")]
    os._exit(int(pytest.main(["-x", "-q", *off, "-m", mark, *tests], plugins=[_First(told)])))


def report() -> None:
    """The shares killed, and what survived both suites."""
    drawn = json.loads((FOLDER / "drawn.json").read_text(encoding="utf-8"))
    fast, slow = _rows("fast"), _rows("slow")
    by_fast = sum(row["killed"] for row in fast.values())
    by_slow = sum(row["killed"] for row in slow.values())
    n = max(1, len(fast))
    text = f"{len(fast)} mutants: fast tests killed {by_fast} ({100 * by_fast / n:.1f} %)"
    if slow:
        text += f", all tests {by_fast + by_slow} ({100 * (by_fast + by_slow) / n:.1f} %)"
    sys.stdout.write(text + f"; tests cut short for {_cut(fast) + _cut(slow)}\n")
    for i, row in fast.items():
        if not row["killed"] and not slow.get(i, {"killed": False})["killed"]:
            old = (ROOT / drawn[i]["file"]).read_text(encoding="utf-8").splitlines()
            gone = Counter(old)
            gone.subtract(new := drawn[i]["code"].splitlines())
            lines = [("-", s) for s in old if gone[s] > 0] + [("+", s) for s in new if gone[s] < 0]
            sys.stdout.write(f"{drawn[i]['file']}:{drawn[i]['line']}\n")
            sys.stdout.writelines(f"  {sign} {line.strip()}\n" for sign, line in lines)


def _cut(rows: dict[int, dict[str, Any]]) -> int:
    return sum(not row["killed"] and row["tests"] < row["of"] for row in rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("draw", "run", "report"))
    parser.add_argument("--n", type=int, default=320, help="mutants")
    parser.add_argument("--most", type=float, default=40, help="seconds of tests for one")
    parser.add_argument(
        "--part", default="1/1", help="k/n: every n-th mutant from the k-th, in a clone"
    )
    parser.add_argument("--slow", action="store_true", help="the survivors on the slow tests")
    args = parser.parse_args()
    if args.what == "draw":
        draw(args.n)
    elif args.what == "run":
        run("slow" if args.slow else "fast", args.most, args.n, args.part)
    else:
        report()


if __name__ == "__main__":
    main()
