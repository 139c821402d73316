"""Imports point down, a room stays small, one file knows the model, some things are not written."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = (
    *("data", "models", "shipping", "evaluation", "editing", "moments", "interp"),
    *("experiments", "plans", "plotting", "explorer", "panel"),
)
"""The folders from the bottom to the top: each imports only from those before it."""
ROOF = {"cli", "cli_edit", "__init__"}
"""`import pmet_lens` is for the command line and for users."""
MOST_FILES, MOST_LINES = 12, 300
"""Of a folder, its `__init__.py` aside; of a file."""
# Who alone may import these and what lies in them; the longest name decides.
GUARDED = {
    "transformer_lens": {"models.bridge"},
    "transformer_lens.tools": {"interp.lens"},
    **dict.fromkeys(("cloudpickle", "dill", "joblib", "pickle", "shelve"), frozenset()),
}
_CACHES = re.compile(r"(functools\.)?(lru_)?cache\b").match
MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "setdefault", "update"}
PACKAGE = Path(__file__).parents[2] / "pmet_lens"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(source: str) -> Iterator[str]:
    """Dotted names of what `source` imports anywhere, type-checking blocks and functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["pmet_lens" * (node.level > 0), node.module]))
            inside = base.removeprefix("pmet_lens.") in {*ROOMS, "pmet_lens"}
            yield from (f"{base}.{alias.name}" for alias in node.names) if inside else [base]


def siblings(source: str) -> set[str]:
    """Modules of the package that `source` imports, as `room.file`."""
    parts = [name.split(".")[1:] for name in imported(source) if name.split(".")[0] == "pmet_lens"]
    return {".".join(p[:2]) if p and p != ["__version__"] else "__init__" for p in parts}


def level(module: str) -> int | None:
    """The floor of the room that `module` stands in; None: it stands in no room."""
    room = module.partition(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS) if module in ROOF else None


def arrows(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports between modules: unknown, upward, or in a circle."""
    wrong = [f"{module} stands in no room" for module in sources if level(module) is None]
    graph = {module: siblings(text) for module, text in sources.items() if module != "__init__"}
    for module, others in graph.items():
        wrong += [f"{module} imports unknown {o}" for o in others if level(o) is None]
        top = level(module) or 0
        wrong += [f"{module} ↑ {other}" for other in others if (level(other) or 0) > top]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        wrong.append(f"circle: {' → '.join(error.args[1])}")
    return wrong


def crowded(sources: dict[str, str]) -> list[str]:
    """Rooms with too many files, and files with too many lines."""
    files = Counter(m.partition(".")[0] for m in sources if not m.endswith("__init__"))
    wrong = [f"{room} has {n} files" for room, n in files.items() if n > MOST_FILES]
    lines = {module: len(text.splitlines()) for module, text in sources.items()}
    return wrong + [f"{module} has {n} lines" for module, n in lines.items() if n > MOST_LINES]


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


def test_imports_point_down():
    assert arrows(SOURCES) == []


def test_every_room_is_there_and_says_what_lives_in_it():
    for room in ROOMS:
        assert ast.get_docstring(ast.parse(SOURCES[f"{room}.__init__"]))


def test_rooms_and_files_stay_small():
    assert crowded(SOURCES) == []
    assert crowded({f"data.x{i}": "" for i in range(13)}) == ["data has 13 files"]
    assert crowded({"data.facts": "\n" * 301}) == ["data.facts has 301 lines"]


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_forbidden_is_written(module):
    assert forbidden(module, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("sources", "word"),
    [
        ({"editing.keys": "from pmet_lens.data.facts import Fact", "data.facts": ""}, None),
        ({"editing.keys": "from pmet_lens.models import activations, tokens"}, None),
        ({"editing.keys": "from pmet_lens.editing import solvers", "editing.solvers": ""}, None),
        ({"cli": "import pmet_lens as pl"}, None),
        ({"cli": "from pmet_lens import __version__"}, None),
        ({"data.facts": "from pmet_lens.editing.edits import Edit"}, "data.facts ↑ editing.edits"),
        ({"data.facts": "from pmet_lens.editing import keys"}, "data.facts ↑ editing.keys"),
        ({"data.facts": "from pmet_lens import editing"}, "data.facts ↑ editing"),
        ({"data.facts": "import pmet_lens.editing.keys as k"}, "data.facts ↑ editing.keys"),
        ({"data.facts": "import pmet_lens"}, "data.facts ↑ __init__"),
        ({"data.facts": "from pmet_lens import edit"}, "data.facts imports unknown edit"),
        ({"data.facts": "def f():\n    from pmet_lens.editing.keys import x"}, "↑ editing.keys"),
        (
            {"data.facts": "if TYPE_CHECKING:\n    from pmet_lens.editing.keys import x"},
            "data.facts ↑ editing.keys",
        ),
        ({"utils": ""}, "utils stands in no room"),
        ({"data.facts": "from pmet_lens.utils import x"}, "data.facts imports unknown utils"),
        (
            {
                "data.facts": "from pmet_lens.data import world",
                "data.world": "import pmet_lens.data.facts",
            },
            "circle",
        ),
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
    assert forbidden("interp.lens", source) == []


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
    assert forbidden("interp.causal_trace", source)


@pytest.mark.parametrize("module", ["interp.causal_trace", "editing.keys"])
def test_only_one_file_may_import_transformer_lens(module):
    source = "from transformer_lens.model_bridge import sources"
    assert forbidden("models.bridge", source) == []
    assert forbidden(module, source)


def insides(source: str) -> list[str]:
    """What a script imports that is neither a public name nor on a room's face."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            wrong += [name for name in names if name.startswith("pmet_lens.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pmet_lens"):
            face = {*importlib.import_module(str(node.module)).__all__}
            face |= {*ROOMS} if node.module == "pmet_lens" else set()
            inside = [a.name for a in node.names if a.name not in face]
            wrong += [f"{node.module}.{name}" for name in inside]
    return wrong


ROOT = PACKAGE.parent
SCRIPTS = [*ROOT.glob("figures/*.py"), *ROOT.glob("notebooks/review/*.py")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_figures_and_notebooks_import_no_insides(path):
    assert insides(path.read_text(encoding="utf-8")) == []


def test_an_import_of_insides_is_seen():
    assert insides("import pmet_lens as pl\nfrom pmet_lens import plotting, edit") == []
    assert insides("from pmet_lens.experiments import measure") == []
    assert insides("from pmet_lens.plotting import rows_of") == ["pmet_lens.plotting.rows_of"]
    assert insides("import pmet_lens.editing.keys") == ["pmet_lens.editing.keys"]


def test_no_function_is_hidden_by_a_module_of_its_name():
    """`pmet_lens.edit` as a module would replace the function `pl.edit` once it is imported."""
    import pmet_lens

    assert not set(pmet_lens.__all__) & {*ROOMS, *SOURCES}
