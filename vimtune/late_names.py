"""Public names that a package offers without importing them: each is imported when it is first asked for.

Packages with modules that need torch use this, so that the command line answers at once (PEP 562). Each of
them also imports the names under `TYPE_CHECKING`, from which type checkers and editors know them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def late_names(
    package: str, homes: Mapping[str, Collection[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package assigns to `__getattr__` and `__dir__`.

    Args:
        package: the `__name__` of the package.
        homes: the modules that define the names -> the names.

    Returns:
        A function that imports the home of a name and returns what the name stands for (AttributeError for
        a name that nothing defines), and one that lists the public names, imported yet or not, with the
        modules of the package that have been imported.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home_of[name]), name)

    def list_all() -> list[str]:
        own = vars(sys.modules[package])
        modules = {
            name
            for name, value in own.items()
            if value is sys.modules.get(f"{package}.{name}") and not name.startswith("_")
        }
        special = {name for name in own if name.startswith("__")}
        return sorted({*own["__all__"], *home_of, *modules, *special})

    return get, list_all
