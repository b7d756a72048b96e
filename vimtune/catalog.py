"""Names, descriptions and options of models, methods and data sets, read off the source files.

Importing the registries takes seconds (torch, timm), and `--help` and `--list` answer at once. So the
files that register things are parsed here and not run. What they say stays in one place; the tests
compare these tables with the registries.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent


def _parse(*parts: str) -> ast.Module:
    return ast.parse(_PACKAGE.joinpath(*parts).read_text(encoding="utf-8"))


def _registering_files(package: str) -> list[ast.Module]:
    """The modules that a package imports so that they register themselves, in that order."""
    imports = (
        node
        for node in _parse(package, "__init__.py").body
        if isinstance(node, ast.ImportFrom) and node.module == f"vimtune.{package}"
    )
    return [_parse(package, f"{alias.name}.py") for node in imports for alias in node.names]


def _registered_classes(files: list[ast.Module], decorator: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """(name, class) of each class under `@decorator("name")`."""
    for node in (node for file in files for node in file.body if isinstance(node, ast.ClassDef)):
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                yield ast.literal_eval(call.args[0]), node


def _summary(node: ast.ClassDef) -> str:
    for line in node.body:
        if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["summary"]:
            return ast.literal_eval(line.value)
    raise AssertionError(f"class {node.name} has no summary")


def _options(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> dict[str, tuple[Any, str]]:
    """Fields given as `option(default, help)`: name -> (default, help), inherited ones first."""
    options: dict[str, tuple[Any, str]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            options |= _options(classes[base.id], classes)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
            default, help = (ast.literal_eval(argument) for argument in line.value.args)
            options[ast.unparse(line.target)] = (default, help)
    return options


def _models() -> dict[str, str]:
    functions = (node for node in _parse("models", "vim.py").body if isinstance(node, ast.FunctionDef))
    return {
        node.name: (ast.get_docstring(node) or "").removesuffix(".")
        for node in functions
        if [ast.unparse(decorator) for decorator in node.decorator_list] == ["register_model"]
    }


_methods = dict(_registered_classes(_registering_files("adapters"), "register_method"))
_classes = {node.name: node for node in _methods.values()}

MODELS: dict[str, str] = _models()
METHODS: dict[str, str] = {name: _summary(node) for name, node in _methods.items()}
METHOD_FIELDS: dict[str, dict[str, tuple[Any, str]]] = {
    name: _options(node, _classes) for name, node in _methods.items()
}
DATASETS: dict[str, str] = {
    name: _summary(node) for name, node in _registered_classes(_registering_files("data"), "register_dataset")
}
