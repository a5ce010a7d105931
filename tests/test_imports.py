"""Who may import whom: the rule of docs/architecture.md, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import neml2_aoti_plugin

PACKAGE = Path(neml2_aoti_plugin.__file__).parent
# The package may be the installed one; the documents lie beside the tests.
DOCS = Path(__file__).resolve().parent.parent / "docs"
NAME = PACKAGE.name

# The ground, which all may import.
GROUND = {"errors", "settings", "_checks", "_files", "_log", "notation", "_tensor_files"}
# Each folder, and the folders that it may import besides itself and the ground.
MAY_IMPORT: dict[str, set[str]] = {
    "_artifact": set(),
    "_graphs": {"_artifact", "_solve"},
    "_solve": set(),
    "_program": {"_artifact", "_graphs", "_solve"},
    "model": {"_artifact", "_program", "_solve"},
    "parallel": {"model"},
    "_host": {"_artifact", "model", "_program", "_solve"},
    "points": {"model"},
    "serve": {"model", "_solve"},
    "_cli": {"_artifact", "_graphs", "_host", "model", "_program", "serve", "_solve", "_status"},
}
# Modules beside the folders: activation, and the command.
BESIDE: dict[str, set[str]] = {
    "__init__": {"_artifact", "_autoload", "_cli", "_status", "_host", "model", "parallel", "points"},
    "__main__": {"_cli"},
    "_autoload": set(),
    "_status": {"_autoload", "_solve"},
}
# The folder whose modules import neml2 at the top; elsewhere it is imported within functions or not at all.
WITH_NEML2 = "_host"
# `_autoload` imports neml2 and the folders by name, when these are asked for.

MODULES = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


def imports(module: str, *, top: bool = False) -> Iterator[tuple[int, str]]:
    """What a module imports, as absolute names, with the lines; if `top`, those alone that it runs first."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    parts = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) or _for_types(part)]
    later = {id(node) for part in parts for node in ast.walk(part)} if top else set()
    for node in ast.walk(tree):
        if id(node) in later:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.rsplit(".", node.level)[:1] if node.level else []
            # `from . import x` may name modules.
            yield from ((node.lineno, ".".join([*base, *filter(None, [node.module]), a.name])) for a in node.names)


def _for_types(node: ast.AST) -> bool:
    """Whether this is what only type checkers read."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rule(module: str) -> None:
    _, own, *below = module.split(".")
    allowed = GROUND | {own} | (MAY_IMPORT[own] if below else BESIDE.get(own, set()))
    for line, name in imports(module):
        package, _, path = name.partition(".")
        there = path.partition(".")[0]
        # Names of the package itself are not folders.
        assert package != NAME or there[:2] in ("", "__") or there in allowed, f"{module}:{line} imports {name}"
    if own != WITH_NEML2:
        assert not [line for line, name in imports(module, top=True) if name.split(".")[0] in ("neml2", "nmhit")]


def test_no_circles() -> None:
    """Within a folder too, and through functions and what only type checkers read."""

    def imported(found: str) -> str | None:
        """The module of what is imported, which is a module or a name in one; a folder's own module is `__init__`."""
        there = (found, f"{found}.__init__", *(f"{found.rpartition('.')[0]}{end}" for end in ("", ".__init__")))
        return next((name for name in there if name in MODULES), None)

    # It raises an error that names the circle.
    TopologicalSorter({m: {imported(found) for _, found in imports(m)} - {m, None} for m in MODULES}).prepare()


def test_the_table_in_the_documents_is_this_rule() -> None:
    lines = ["| folder | may import, besides itself and the ground |", "|---|---|"]
    for name, others in MAY_IMPORT.items():
        shown = [f"`{other}/`" if other in MAY_IMPORT else f"`{other}`" for other in sorted(others)]
        lines.append(f"| `{name}/` | {', '.join(shown) or '-'} |")
    table = "\n".join(lines)
    assert table in (DOCS / "architecture.md").read_text(encoding="utf-8"), f"docs/architecture.md needs:\n{table}"


def test_no_two_classes_have_one_name() -> None:
    """A name stands for one thing. Some are defined in one of two ways, as by the installed neml2, in one module."""
    at: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        classes = (x.name for x in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(x, ast.ClassDef))
        for name in sorted(set(classes)):
            at.setdefault(name.lstrip("_"), []).append(module)
    assert {name: modules for name, modules in at.items() if len(modules) > 1} == {}
