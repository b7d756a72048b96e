"""How files of weights end is said in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import vimtune
from vimtune.export.formats import FORMATS
from vimtune.weight_files import PLAIN_WEIGHTS, WEIGHTS


def test_exported_files_are_known_as_files_of_weights():
    assert FORMATS.keys() == set(WEIGHTS) - set(PLAIN_WEIGHTS)


def test_no_other_module_lists_endings_of_weights():
    """Each such list had other endings."""
    for path in Path(vimtune.__file__).parent.rglob("*.py"):
        if path.name == "weight_files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = getattr(node, "elts", None) or getattr(node, "keys", None) or []
            endings = [
                item.value for item in items if isinstance(item, ast.Constant) and item.value in WEIGHTS
            ]
            assert len(endings) < 2, f"{path}:{node.lineno}: {endings}"
