"""The role {where}: a function, class, value or file by name, shown with its file and line.

The documentation names code by what it is called, never by a line number: `locate` looks the line
up when the pages are built, and fails where nothing has that name.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_STUB = (ROOT / "pmet_lens" / "__init__.pyi").read_text(encoding="utf-8")
HOME = {
    alias.name: str(node.module)
    for node in ast.walk(ast.parse(_STUB))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
"""Public name → the file it is defined in, such as `editing.methods`."""


def locate(name: str) -> tuple[Path, int]:
    """File (from the root of the repository) and line of `folder/file.py`, or of a module, class,
    function, method or value of it: `pmet_lens.PMET`, `pmet_lens.Edit.save`,
    `pmet_lens.editing.keys`, `pmet_lens.editing.objective.loss_terms`, `figures.paper.GRID`.

    Raises:
        LookupError: where there is no such file, or nothing of that name in it.
    """
    if "/" in name:
        if not (ROOT / name).exists():
            raise LookupError(f"there is no file {name}")
        return Path(name), 1
    parts = name.split(".")
    if parts[0] == "pmet_lens" and len(parts) > 1:
        home = HOME.get(parts[1])
        parts[1:2] = [parts[1]] if home is None else [*home.split("."), parts[1]]
    for n in range(len(parts), 0, -1):
        file = Path(*parts[:n]).with_suffix(".py")
        if (ROOT / file).is_file():
            return _within(file, parts[n:])
    raise LookupError(f"there is no module for {name}")


def _within(file: Path, names: list[str]) -> tuple[Path, int]:
    """Where in `file`, or in the module it takes the name from, the nested `names` are defined."""
    body, line = ast.parse((ROOT / file).read_text(encoding="utf-8")).body, 1
    for name in names:
        for node in body:
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return locate(".".join([str(node.module), *names]))
        found = next((node for node in body if name in _defines(node)), None)
        if found is None:
            raise LookupError(f"{file} has no {'.'.join(names)}")
        line, body = found.lineno, getattr(found, "body", [])
    return file, line


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def page_of(file: Path) -> str | None:
    """The built page with the source of a module of the package; None for another file."""
    return f"_modules/{file.with_suffix('').as_posix()}" if file.parts[0] == "pmet_lens" else None


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    from docutils import nodes
    from sphinx import addnodes
    from sphinx.transforms.post_transforms import SphinxPostTransform
    from sphinx.util.docutils import SphinxRole

    class Where(SphinxRole):
        def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
            try:
                file, line = locate(self.text)
            except LookupError as error:
                message = self.inliner.reporter.error(str(error), line=self.lineno)
                return [], [message]
            place = file.as_posix() if "/" in self.text else f"{file.as_posix()}:{line}"
            shown = self.text.removeprefix("pmet_lens.").removeprefix("figures.")
            link = addnodes.download_reference("", "", reftarget=f"/{file}", refdomain="")
            link["refdoc"], link["anchor"] = self.env.docname, shown.partition(".")[2]
            link += nodes.literal("", place)
            if "/" in self.text:
                return [link], []
            return [nodes.literal("", shown), nodes.Text(" ("), link, nodes.Text(")")], []

    class SourcePages(SphinxPostTransform):
        """Links to modules of the package lead to the pages with their source."""

        default_priority = 5

        def run(self, **_: Any) -> None:
            for node in list(self.document.findall(addnodes.download_reference)):
                parts = Path(node["reftarget"]).parts
                if "pmet_lens" not in parts or not node["reftarget"].endswith(".py"):
                    continue
                file = Path(*parts[parts.index("pmet_lens") :])
                page = page_of(file)
                if page is None or self.app.builder.format != "html":
                    continue
                here = self.env.docname
                uri = self.app.builder.get_relative_uri(here, page)
                anchor = node.get("anchor", "")
                uri += f"#{anchor}" if anchor else ""
                new = nodes.reference("", "", *node.children, refuri=uri, internal=True)
                node.replace_self(new)

    app.add_role("where", Where())
    app.add_post_transform(SourcePages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
