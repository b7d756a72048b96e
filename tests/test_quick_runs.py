"""What is left out of tiny runs is left out as long as they last."""

from __future__ import annotations

import ast
from pathlib import Path

from quick_runs import NO_PICTURES, TAKERS

import vimtune

PACKAGE = Path(vimtune.__file__).parent


def test_whoever_takes_a_replaced_function_is_known():
    """A module that is first imported while a function is replaced would keep what stands in for it, and what
    it draws in later tests would be missing."""
    takers = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("vimtune", *path.relative_to(PACKAGE).with_suffix("").parts))
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ImportFrom):
                takers |= {
                    module for name in statement.names if f"{statement.module}.{name.name}" in NO_PICTURES
                }
    assert takers == set(TAKERS)
