"""One list of dependencies: pyproject.toml has it, the lock pins it, the rest only points there."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pmet_lens"
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = TABLES["project"]
LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

PIN = re.compile(r"[a-z0-9-]+==[0-9][a-z0-9.]*( ; [^#@]+)?")  # no URL, no hash, no +local build
DISTRIBUTION = {"sklearn": "scikit-learn"}  # import name → name on PyPI, where they differ
PLATFORMS = [
    {"python_version": v, "python_full_version": f"{v}.9", "sys_platform": s, "os_name": o}
    | {"platform_machine": "x86_64", "implementation_name": "cpython", "platform_system": p}
    for v in ("3.10", "3.11", "3.12", "3.13")
    for s, o, p in (("linux", "posix", "Linux"), ("darwin", "posix", "Darwin"))
]


def declared(project: dict) -> list[Requirement]:
    """Every requirement of the project, those of the extras too."""
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(r) for group in (project["dependencies"], *extras) for r in group]


def unbounded(requirements: list[Requirement]) -> list[str]:
    """Requirements without a lower or without an upper bound."""
    ops = {str(r): {s.operator for s in r.specifier} for r in requirements}
    return [name for name, has in ops.items() if not (has & {">=", "=="} and has & {"<", "=="})]


def drift(requirements: list[Requirement], lock: str, platform: dict[str, str]) -> list[str]:
    """Requirements that `lock` does not pin exactly once, or pins outside their bounds."""
    pins: dict[str, list[str]] = {}
    for line in filter(lambda text: text and not text.startswith("#"), lock.splitlines()):
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(platform):
            (only,) = pin.specifier
            pins.setdefault(canonicalize_name(pin.name), []).append(only.version)
    wrong = [f"{name} has {len(found)} pins" for name, found in pins.items() if len(found) > 1]
    for need in requirements:
        if need.marker is None or need.marker.evaluate(platform):
            found = pins.get(canonicalize_name(need.name), [])
            if not found:
                wrong.append(f"{need.name} is not pinned")
            wrong += [f"{need} is pinned to {v}" for v in found if v not in need.specifier]
    return wrong


def additions(conda: dict, requires_python: str) -> list[str]:
    """What a conda environment holds beyond a fitting Python, pip and the project itself."""
    plain = [item for item in conda["dependencies"] if isinstance(item, str)]
    (block,) = (item["pip"] for item in conda["dependencies"] if isinstance(item, dict))
    (python,) = (item.partition("=")[2] for item in plain if item.startswith("python="))
    wrong = [item for item in plain if item != f"python={python}" and item != "pip"]
    if f"{python}.0" not in SpecifierSet(requires_python):
        wrong.append(f"python {python}")
    return wrong + [i for i in block if i not in ("-c constraints.txt", "-e .[notebook,dev]")]


def undeclared(source: str, project: dict) -> set[str]:
    """What `source` imports and the project's plain dependencies do not name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    listed = {canonicalize_name(Requirement(r).name) for r in project["dependencies"]}
    names -= {*sys.stdlib_module_names, "pmet_lens"}
    return {n for n in names if canonicalize_name(DISTRIBUTION.get(n, n)) not in listed}


@pytest.mark.parametrize(
    "platform", PLATFORMS, ids=lambda p: f"{p['python_version']}-{p['os_name']}"
)
def test_the_lock_pins_every_dependency_within_its_bounds(platform):
    assert drift(declared(PROJECT), LOCK, platform) == []


def test_every_dependency_has_both_bounds():
    assert unbounded(declared(PROJECT)) == []


def test_the_lock_names_versions_and_nothing_else():
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert "torch==2.13.0" in lines
    assert not re.search(r"://|--|/(opt|work|home|root)/", "\n".join(lines))


def test_conda_and_make_install_the_project_and_only_it():
    assert additions(CONDA, PROJECT["requires-python"]) == []
    (block,) = (item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict))
    assert block == ["-c constraints.txt", "-e .[notebook,dev]"]
    assert "-c constraints.txt" in MAKEFILE
    assert "-e '.[notebook,dev]'" in MAKEFILE
    assert set(PROJECT["optional-dependencies"]) == {
        *("notebook", "gguf", "browser", "ray", "dev", "docs")
    }
    assert "-e '.[docs]'" in MAKEFILE


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_the_package_imports_what_it_declares(path):
    of_gguf = ("gguf_files", "gguf_copies")
    group = {"widgets": "notebook", **dict.fromkeys(of_gguf, "gguf")}.get(path.stem)
    extra = PROJECT["optional-dependencies"][group] if group else []
    needs = {"dependencies": [*PROJECT["dependencies"], *extra]}
    assert undeclared(path.read_text(encoding="utf-8"), needs) == set()


def test_the_wheel_takes_every_bundled_file():
    patterns = TABLES["tool"]["setuptools"]["package-data"]["pmet_lens"]
    taken = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert {p for p in (PACKAGE / "bundled").rglob("*") if p.is_file()} <= taken


def test_the_command_exists():
    module, _, function = PROJECT["scripts"]["pmet-lens"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_said_once():
    assert "version" in PROJECT["dynamic"]
    assert TABLES["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pmet_lens.__version__"}


def test_continuous_integration_runs_the_commands_of_the_readme():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    script = path.read_text(encoding="utf-8")
    commands = re.findall(r"^ *(make [a-z-]+)", script, re.MULTILINE)
    assert {"make coverage", "make test-browser", "make docs"} <= set(commands)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [command for command in commands if f"`{command}`" not in readme] == []


# Each check above sees what it is there for.


def test_drift_is_seen():
    need, here = [Requirement("torch>=2.6,<2.14")], PLATFORMS[0]
    assert drift(need, "torch==2.13.0", here) == []
    assert drift(need, "torch==2.13.0 ; python_version < '3.9'", here) == ["torch is not pinned"]
    assert drift(need, "numpy==2.0.0", here) == ["torch is not pinned"]
    assert "is pinned to 2.14.0" in drift(need, "torch==2.14.0", here)[0]
    assert drift(need, "torch==2.13.0\ntorch==2.12.0", here) == ["torch has 2 pins"]


def test_a_missing_bound_is_seen():
    assert unbounded([Requirement("torch>=2.6"), Requirement("numpy<3"), Requirement("scipy")])
    assert unbounded([Requirement("torch>=2.6,<3"), Requirement("numpy==2.0")]) == []


@pytest.mark.parametrize("line", ["a", "a>=1", "a==1+cpu", "a @ file:///x", "a==1 --hash=sha256:0"])
def test_what_is_no_pin_is_seen(line):
    assert not PIN.fullmatch(line)


def test_additions_to_the_conda_environment_are_seen():
    def conda(*plain, pip=("-c constraints.txt", "-e .[notebook,dev]")):
        return {"dependencies": [*plain, {"pip": list(pip)}]}

    assert additions(conda("python=3.11", "pip"), ">=3.10") == []
    assert additions(conda("python=3.9", "pip"), ">=3.10") == ["python 3.9"]
    assert additions(conda("python=3.11", "pip", "numpy"), ">=3.10") == ["numpy"]
    assert additions(conda("python=3.11", "pip", pip=["torch"]), ">=3.10") == ["torch"]


def test_an_undeclared_import_is_seen():
    project = {"dependencies": ["numpy>=1,<3", "scikit-learn>=1,<2"]}
    assert undeclared("import os, numpy.linalg\nfrom sklearn import svm", project) == set()
    assert undeclared("def f():\n    from scipy import linalg", project) == {"scipy"}
