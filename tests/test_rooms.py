"""The rooms of the package import each other in the order of the table in CONTRIBUTING.md alone."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vimtune

PACKAGE = Path(vimtune.__file__).parent
TOOLS = "*"
"""The room of the modules that lie right in the package."""
LATE = {("methods", "adapters"): {"in functions", "in types"}, ("backends", "ops"): {"in types"}}
"""Rooms or modules that name what comes after them in the table: where they may."""
FACES = ("vimtune", "vimtune.__main__")
"""Modules that hand on names of all rooms, or start the command line."""


def table() -> list[list[str]]:
    """The rooms of each row, such as ["models.registry", "models.options"], from the ground up."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    first = (line.split("|")[1] for line in text.splitlines() if line.startswith("| `vimtune/"))
    named = (re.findall(r"`vimtune/([^`]+)`", cell) for cell in first)
    return [[name.strip("/").removesuffix(".py").replace("/", ".") for name in names] for names in named]


ROWS = table()
RANK = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
MODULES = {
    ".".join(("vimtune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def room_of(module: str) -> str:
    """The room of a module by its full name: what the table has for it or for a package around it."""
    name = module.removeprefix("vimtune.")
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return name or TOOLS


@functools.cache
def tree(module: str) -> ast.Module:
    """The syntax of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, str]]:
    """What a module imports of the package, and where: "at once", "in functions" or "in types"."""
    yield from _imports(tree(module), "at once")


def _imports(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole path"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from ((name if name in MODULES else str(child.module), where) for name in names)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, where) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(child, "in functions")
        elif isinstance(child, ast.If) and _names_type_checking(child.test):
            yield from _imports(child, "in types")
        else:
            yield from _imports(child, where)


def _names_type_checking(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "TYPE_CHECKING" for node in ast.walk(test))


def is_late(module: str, other: str, where: str) -> bool:
    """Whether `LATE` lets a module import another that comes after it."""
    names = (room_of(module), module.removeprefix("vimtune."))
    return any(where in LATE.get((name, room_of(other)), ()) for name in names)


@pytest.mark.parametrize("room", [room for rooms in ROWS for room in rooms])
def test_a_room_imports_only_what_stands_above_it(room):
    wrong = [
        f"{module} imports {other} ({where})"
        for module in sorted(MODULES)
        if room_of(module) == room and module not in FACES
        for other, where in imports(module)
        if other in MODULES and other not in FACES and RANK[room_of(other)] > RANK[room]
        if not is_late(module, other, where)
    ]
    assert not wrong, "see the table of rooms in CONTRIBUTING.md: " + "; ".join(wrong)


def test_the_table_has_every_room_once():
    rooms = [room for rooms in ROWS for room in rooms]
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(rooms) == len(set(rooms)) and {room for room in rooms if "." not in room} == {*folders, TOOLS}
    assert all(f"vimtune.{room}" in MODULES for room in rooms if room != TOOLS)


def test_nothing_imports_the_names_that_the_package_hands_on():
    """They come from everywhere; only its version is its own."""
    for module in MODULES.keys() - FACES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module == "vimtune":
                names = {alias.name for alias in node.names} - {"__version__"}
                assert all(f"vimtune.{name}" in MODULES for name in names), (module, names)
            elif isinstance(node, ast.Import):
                assert "vimtune" not in {alias.name for alias in node.names}, module
