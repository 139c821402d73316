"""Sphinx: API reference, executed notebooks and `paper_and_code.md` as pages in `docs/_build/html`.

Sources lie all over the repository, so its root is the source directory: `make docs` runs
`sphinx-build -W -c docs . docs/_build/html`. Nothing is executed and nothing is fetched.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from sphinx.ext.napoleon import Config, GoogleDocstring  # noqa: E402
from where import HOME  # noqa: E402

import pmet_lens  # noqa: E402

project = "pmet_lens"
author = copyright = "pmet_lens contributors"
release = version = pmet_lens.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "where",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/api/*.md",
    "notebooks/*.ipynb",
    "figures/README.md",
    "figures/results/plan.md",
    "pmet_lens/bundled/*/README.md",
    "CHANGELOG.md",
]
exclude_patterns = ["docs/_build", ".venv", ".git", "figures/out", "build", "dist"]

nb_execution_mode = "off"  # outputs are those that `make notebooks` kept
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # nothing from another server
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "py:obj"  # `name` in a docstring: a link where there is such a thing
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
viewcode_follow_imported_members = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"pmet_lens {release}"
html_static_path = ["static"]
html_css_files = ["own.css"]
html_copy_source = html_show_sourcelink = False
suppress_warnings = ["mystnb.unknown_mime_type"]


def _value_docs(app, what, name, obj, options, lines):
    """The text under a value (`PMET = …`) stands in the module it comes from; names of `pmet_lens`
    are imported from there."""
    module, _, attribute = name.rpartition(".")
    home = HOME.get(attribute) if module == "pmet_lens" else None
    if what != "data" or home is None:
        return
    from sphinx.pycode import ModuleAnalyzer

    found = ModuleAnalyzer.for_module(f"pmet_lens.{home}").find_attr_docs()
    lines[:] = found.get(("", attribute), [])


def _sections(app, what, name, obj, options, lines):
    """Args and Raises of functions and classes as lists. Not of values and properties, whose texts
    napoleon would cut at a colon, as `type: text`."""
    if what in ("class", "exception", "function", "method"):
        lines[:] = GoogleDocstring(list(lines), Config(), app, what, name, obj, options).lines()


def _names(app, what, name, obj, options, lines):
    """`name` is a link where there is such a thing, but not where it is an argument; `Fact`s ends
    before the s."""
    try:
        arguments = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        arguments = set()

    def shown(found: re.Match[str]) -> str:
        text, behind = found.groups()
        plain = text in arguments or not (text[0].isalpha() or text[0] == "_")
        return (f"``{text}``" if plain else f"`{text}`") + (f"\\ {behind}" if behind else "")

    lines[:] = [re.sub(r"`([^`]+)`(\w?)", shown, line) for line in lines]


def _documented_once(app, what, name, obj, skip, options):
    """Modules list what `pmet_lens` itself does not: a name has one entry."""
    if what != "module" or name not in HOME:
        return None
    return True if obj is getattr(pmet_lens, name) else None


def _every_module(app, docname, source):
    """`<!-- modules -->` becomes an entry per module of the package."""
    root = Path(pmet_lens.__file__).parent
    files = [file.relative_to(root).with_suffix("") for file in sorted(root.rglob("[!_]*.py"))]
    names = [".".join(file.parts) for file in files]
    entries = (f"## {n}\n\n```{{eval-rst}}\n.. automodule:: pmet_lens.{n}\n```\n" for n in names)
    source[0] = source[0].replace("<!-- modules -->\n", "\n".join(entries))


def _start_page(app, exception):
    """`index.html` leads to the first page."""
    if exception is None and app.builder.format == "html":
        text = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def setup(app):
    """Called by Sphinx."""
    for home in set(HOME.values()):
        importlib.import_module(f"pmet_lens.{home}")
    app.connect("autodoc-process-docstring", _value_docs)
    app.connect("autodoc-process-docstring", _names)
    app.connect("autodoc-process-docstring", _sections)
    app.connect("autodoc-skip-member", _documented_once)
    app.connect("source-read", _every_module)
    app.connect("build-finished", _start_page)
