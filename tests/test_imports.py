"""Who may import whom: the rule of docs/architecture.md, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path, *, top: bool = False) -> Iterator[tuple[int, str]]:
    """The modules that a file imports, as absolute names, with the lines; if `top`, those alone that it runs first."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = file.relative_to(PACKAGE.parent).with_suffix("").parts
    parts = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) or _for_types(part)]
    later = {id(node) for part in parts for node in ast.walk(part)} if top else set()
    for node in ast.walk(tree):
        if id(node) in later:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from . import x` may name modules.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _for_types(node: ast.AST) -> bool:
    """Whether this is what only type checkers read."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def room(name: str) -> str | None:
    """The folder, or the module beside the folders, of an absolute name; None for names outside the package."""
    parts = name.split(".")
    if parts[0] != NAME:
        return None
    return parts[1] if len(parts) > 1 and not parts[1].startswith("__") else "__init__"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_rule(file: Path) -> None:
    here = file.relative_to(PACKAGE)
    own = here.parts[0].removesuffix(".py")
    allowed = GROUND | {own} | (MAY_IMPORT[own] if len(here.parts) > 1 else BESIDE.get(own, set()))
    for line, name in imports(file):
        there = room(name)
        if there is None or there == "__init__":
            continue
        assert there in allowed, f"{here}:{line}: {own} imports {there} ({name})"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_neml2_is_imported_at_the_top_in_one_folder_only(file: Path) -> None:
    if file.relative_to(PACKAGE).parts[0] != WITH_NEML2:
        assert not [line for line, name in imports(file, top=True) if name.split(".")[0] in ("neml2", "nmhit")]


def test_no_circles() -> None:
    """Within a folder too, and through functions and what only type checkers read."""
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in MODULES}

    def imported(found: str) -> str | None:
        """The module of what is imported, which is a module or a name in one; a folder's own module is `__init__`."""
        there = (found, f"{found}.__init__", *(f"{found.rpartition('.')[0]}{end}" for end in ("", ".__init__")))
        return next((name for name in there if name in names), None)

    edges = {name: {imported(found) for _, found in imports(file)} - {name, None} for name, file in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(filter(None, edges[name])):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


def test_the_table_in_the_documents_is_this_rule() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert table() in text, f"docs/architecture.md needs this table:\n{table()}"


def table() -> str:
    """The rule as the documents show it."""
    lines = ["| folder | may import, besides itself and the ground |", "|---|---|"]
    for name, others in MAY_IMPORT.items():
        shown = [f"`{other}/`" if other in MAY_IMPORT else f"`{other}`" for other in sorted(others)]
        lines.append(f"| `{name}/` | {', '.join(shown) or '-'} |")
    return "\n".join(lines)
