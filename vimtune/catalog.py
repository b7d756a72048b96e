"""Names, descriptions and options of models, methods and data sets, read off the source files.

Importing the registries takes seconds (torch, timm), and `--help` and `--list` answer at once. So the
files that register things are parsed here and not run. What they say stays in one place; the tests
compare these tables with the registries. Where a file computes what others state as a constant, the
registry itself is imported: slower, and right.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from vimtune.data import list_datasets
from vimtune.methods import METHODS as METHODS_OF_PACKAGE
from vimtune.methods import method_fields

Fields = dict[str, tuple[str, Any, str]]
"""Fields of a method: name -> (type as it is written, default, help)."""

_PACKAGE = Path(__file__).parent


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _methods() -> tuple[dict[str, str], dict[str, Fields]]:
    """Summaries and fields of all methods."""
    summaries = {name: method.summary for name, method in METHODS_OF_PACKAGE.items()}
    return summaries, {name: method_fields(name) for name in summaries}


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
DATASETS: dict[str, str] = list_datasets()
