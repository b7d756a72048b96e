"""Names, descriptions and options of models, methods and data sets, read off the source files.

Importing the registries takes seconds (torch, timm), and `--help` and `--list` answer at once. So the
files that register things are parsed here and not run. What they say stays in one place; the tests
compare these tables with the registries. Where a file computes what others state as a constant, the
registry itself is imported: slower, and right.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vimtune.methods import METHODS as METHODS_OF_PACKAGE
from vimtune.methods import method_fields

Fields = dict[str, tuple[str, Any, str]]
"""Fields of a method: name -> (type as it is written, default, help)."""

_PACKAGE = Path(__file__).parent


class _NotConstant(Exception):
    """The source does not state as a constant what is looked for."""


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _registering_files(package: str) -> list[ast.Module]:
    """The modules that a package imports so that they register themselves, in that order."""
    imports = (
        node
        for node in _parse(_PACKAGE / package / "__init__.py").body
        if isinstance(node, ast.ImportFrom) and node.module == f"vimtune.{package}"
    )
    return [_parse(_PACKAGE / package / f"{alias.name}.py") for node in imports for alias in node.names]


def _registered_classes(files: list[ast.Module], decorator: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """(name, class) of each class under `@decorator("name")`."""
    for node in (node for file in files for node in file.body if isinstance(node, ast.ClassDef)):
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                yield _constant(call.args[0]), node


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _NotConstant from error


def _summary(node: ast.ClassDef) -> str:
    for line in node.body:
        if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["summary"]:
            return _constant(line.value)
    raise _NotConstant


def _methods() -> tuple[dict[str, str], dict[str, Fields]]:
    """Summaries and fields of all methods."""
    summaries = {name: method.summary for name, method in METHODS_OF_PACKAGE.items()}
    return summaries, {name: method_fields(name) for name in summaries}


def _datasets() -> dict[str, str]:
    try:
        nodes = _registered_classes(_registering_files("data"), "register_dataset")
        return {name: _summary(node) for name, node in nodes}
    except _NotConstant:
        from vimtune.data import list_datasets

        return list_datasets()


def _models() -> dict[str, str]:
    """Functions under `@register_model`; their docstrings are their descriptions."""
    path = _PACKAGE / "models" / "vim.py"
    models = {}
    for node in _parse(path).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        if "register_model" not in map(ast.unparse, node.decorator_list):
            continue
        description = (ast.get_docstring(node) or "").removesuffix(".")
        if not description:
            raise ValueError(f"model {node.name} in {path} needs a docstring, one line that --list shows")
        models[node.name] = description
    return models


MODELS: dict[str, str] = _models()
METHODS, METHOD_FIELDS = _methods()
DATASETS: dict[str, str] = _datasets()
