"""Imports point down the floors, one file knows the model, and some things are never written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FLOORS = (
    {"container", "downloads", "facts", "jobs", "linalg", "markup", "memory", "metrics"}
    | {"statements", "summaries", "world"},
    {"adapter", "chat", "datasets", "fact_tables", "live", "sources", "twin"},
    {"hparams", "moment_files", "moments", "probes", "published_moments", "settings", "tokens"},
    {"activations", "analysis", "generation", "keys", "patterns", "problem", "readout"}
    | {"similarity", "swapping", "targets", "variance"},
    {"artifact", "costs", "editing", "edits", "evaluation", "finetune", "lora", "mend"}
    | {"mend_training", "methods", "receipts", "suggestion", "target_files"},
    {"ability", "geometry", "grid", "parcels", "plain", "results", "shards"},
    {"experiment", "recipes", "sessions", "training", "trials", "variants", "worker", "workload"},
    {"engine", "planning", "probing", "progress", "ray_engine", "scheduler"},
    {"explorer", "fact_panel", "map_plots", "method_plots", "panes", "plots", "tab_ablate"}
    | {"tab_ask", "tab_edit", "tab_look", "views", "widgets"},
    {"cli", "__init__"},  # `import pmet_lens` is for the command line and for users
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# Who alone may import these and what lies in them; the longest name decides.
GUARDED = {
    "transformer_lens": {"adapter"},
    "transformer_lens.tools": {"adapter", "readout"},
    **dict.fromkeys(("cloudpickle", "dill", "joblib", "pickle", "shelve"), frozenset()),
}
_CACHES = re.compile(r"(functools\.)?(lru_)?cache\b").match
MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "setdefault", "update"}
SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[1] / "pmet_lens").glob("*.py"))
}


def imported(source: str) -> Iterator[str]:
    """Dotted names of what `source` imports anywhere, type-checking blocks and functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["pmet_lens" if node.level else "", node.module]))
            inside = base == "pmet_lens"  # then the names are modules
            yield from (f"{base}.{alias.name}" for alias in node.names) if inside else [base]


def siblings(source: str) -> set[str]:
    """Modules of the package that `source` imports."""
    parts = [name.split(".") for name in imported(source)]
    found = {(p[1] if len(p) > 1 else "__init__") for p in parts if p[0] == "pmet_lens"}
    return {"__init__" if name == "__version__" else name for name in found}


def arrows(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports between modules: unknown, upward, or in a circle."""
    wrong = [f"{module} stands on no floor" for module in sources if module not in FLOOR]
    graph = {module: siblings(text) for module, text in sources.items() if module != "__init__"}
    for module, others in graph.items():
        wrong += [f"{module} imports unknown {o}" for o in others if o not in FLOOR]
        top = FLOOR.get(module, 0)
        wrong += [f"{module} ↑ {other}" for other in others if FLOOR.get(other, 0) > top]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"circle: {' → '.join(error.args[1])}")
    return wrong


def forbidden(module: str, source: str) -> list[str]:
    """What `source` contains and must not, by the rules of the house."""
    tree, wrong = ast.parse(source), []
    for name in imported(source):
        rule = next(
            (g for g in sorted(GUARDED, reverse=True) if f"{name}.".startswith(g + ".")), ""
        )
        if rule and module not in GUARDED[rule]:
            wrong.append(f"imports {name}")
    held = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        wrong += [f"line {getattr(node, 'lineno', '?')}: {what}" for what in _sins(node, held)]
    return wrong


def _sins(node: ast.AST, held: set[str]) -> Iterator[str]:
    match node:
        case ast.Call(func=ast.Name(id="print")):
            yield "print"
        case ast.Constant(value=str(text)) if text == "cuda" or text.startswith("cuda:"):
            yield "a cuda literal"
        case ast.Call(func=ast.Attribute(attr="cuda")):
            yield "a hard-wired device"
        case ast.Attribute(attr="inverse" | "inv") | ast.alias(name="inverse" | "inv"):
            yield "an explicit inverse"
        case ast.ExceptHandler(type=None):
            yield "a bare except"
        case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
            yield "torch.load"
        case ast.ImportFrom(module="torch", names=names) if "load" in {n.name for n in names}:
            yield "torch.load"
        case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) if "pickle" in name:
            yield "pickle"
        case ast.Global():
            yield "a global"
        case ast.FunctionDef(decorator_list=decorators):
            yield from ("a module-level cache" for d in decorators if _CACHES(ast.unparse(d)))
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store()) if name in held:
            yield f"{name}, a module-level cache"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=verb)) if (
            name in held and verb in MUTATORS
        ):
            yield f"{name}, a module-level cache"


def test_imports_point_down_the_floors():
    assert arrows(SOURCES) == []


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_forbidden_is_written(module):
    assert forbidden(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("sources", "word"),
    [
        ({"linalg": "from pmet_lens.facts import Fact", "facts": ""}, None),
        ({"keys": "from pmet_lens import probes, tokens"}, None),
        ({"cli": "import pmet_lens as pl"}, None),
        ({"cli": "from pmet_lens import __version__"}, None),
        ({"facts": "from pmet_lens.editing import edit"}, "facts ↑ editing"),
        ({"facts": "from pmet_lens import keys"}, "facts ↑ keys"),
        ({"facts": "from . import keys"}, "facts ↑ keys"),
        ({"facts": "from .keys import mean"}, "facts ↑ keys"),
        ({"facts": "import pmet_lens.keys as k"}, "facts ↑ keys"),
        ({"facts": "import pmet_lens"}, "facts ↑ __init__"),
        ({"facts": "def f():\n    from pmet_lens.keys import mean"}, "facts ↑ keys"),
        ({"facts": "if TYPE_CHECKING:\n    from pmet_lens.keys import mean"}, "facts ↑ keys"),
        ({"utils": ""}, "utils stands on no floor"),
        ({"facts": "from pmet_lens.utils import x"}, "facts imports unknown utils"),
        ({"facts": "from pmet_lens import linalg", "linalg": "import pmet_lens.facts"}, "circle"),
    ],
)
def test_the_arrows_are_seen(sources, word):
    assert not arrows(sources) if word is None else any(word in w for w in arrows(sources))


@pytest.mark.parametrize(
    "source",
    [
        "from transformer_lens.tools.analysis import logit_lens",
        "torch.cuda.is_available()\n'CUDA and cuda'",
        "torch.linalg.solve(a, b); np.unique(a, return_inverse=True)",
        "try:\n    f()\nexcept OSError:\n    g()",
        "TABLE = {'a': 1}\ndef f():\n    found = {}\n    found['b'] = TABLE['a']",
        "json.load(file)",
        "logits, cache = model.run_with_cache(ids)\ncache['x'] = cache.pop('y')",
        "class A:\n    @functools.cached_property\n    def x(self): ...",
    ],
)
def test_what_is_fine_passes(source):
    assert forbidden("readout", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import transformer_lens",
        "from transformer_lens import utilities",
        "from transformer_lens.toolshed import x",
        "def f():\n    from transformer_lens.model_bridge import bridge",
        "print('hello')",
        "x.to('cuda')",
        "f'cuda:{n}'",
        "x.cuda()",
        "torch.inverse(a)",
        "torch.linalg.inv(a)",
        "from numpy.linalg import inv",
        "try:\n    f()\nexcept:\n    pass",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import joblib",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "frame.to_pickle(path)",
        "SEEN = {}\ndef f(x):\n    SEEN[x] = 1",
        "SEEN: list = []\ndef f(x):\n    SEEN.append(x)",
        "def f():\n    global x\n    x = 1",
        "@functools.lru_cache(None)\ndef f(): ...",
        "from functools import cache\n@cache\ndef f(): ...",
    ],
)
def test_what_is_forbidden_is_seen(source):
    assert forbidden("analysis", source)


@pytest.mark.parametrize("module", ["analysis", "keys"])
def test_only_the_adapter_may_import_transformer_lens(module):
    source = "from transformer_lens.model_bridge import sources"
    assert forbidden("adapter", source) == []
    assert forbidden(module, source)


def test_no_function_is_hidden_by_a_module_of_its_name():
    """`pmet_lens.edit` as a module would replace the function `pl.edit` once it is imported."""
    import pmet_lens

    assert not set(pmet_lens.__all__) & set(SOURCES)
