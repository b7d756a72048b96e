"""Packages of users that add methods, models, data sets and tasks by registering them when imported.

A package is imported because somebody named it on the command line (`--import my_package`), or because it is
installed with an entry point in the group "vimtune.plugins". Files never cause an import: a recipe or an
adapter may come from anybody, and importing a package runs its code.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
from importlib.metadata import entry_points

from vimtune.text import quote

logger = logging.getLogger(__name__)

ENTRY_POINTS = "vimtune.plugins"
"""Group of the entry points. The value of each is a module to import."""

_imported: list[str] = []
"""Packages that were named, in order."""
_failures: dict[str, str] | None = None
"""Why installed packages could not be loaded, by name of the entry point. None before any was tried."""


def import_package(name: str) -> None:
    """Import a package or module by its dotted name; it may lie in the working directory.

    Raises:
        ValueError: there is no such module, or it fails to import.
    """
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        # It comes last, so that no file there takes the place of an installed module.
        sys.path.append(folder)
    try:
        importlib.import_module(name)
    except Exception as error:  # Whatever the module raises, the user named it and has to know.
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"package {quote(name)} cannot be imported ({reason}); expected the dotted name of an installed "
            "module or of one in the working directory"
        ) from error
    if name not in _imported:
        _imported.append(name)


def imported_packages() -> tuple[str, ...]:
    """The packages that were named here, in order; processes that are to find what they add import them."""
    return tuple(_imported)


def with_imports(command: str) -> str:
    """A command line for the user to go on with, which finds what the packages named here have registered.

    What it continues may be made of that, and files cause no import.
    """
    return f"{command} --import {shlex.quote(','.join(_imported))}" if _imported else command


def load_installed() -> dict[str, str]:
    """Import the modules of all entry points, once in a process.

    A package that fails does not stop those who do not need it: it is logged as a warning, and named again
    where an unknown name is refused.

    Returns:
        The reasons of those that failed, by name of the entry point.
    """
    global _failures
    if _failures is None:
        # This comes first, because a package may look something up while it is being imported.
        _failures = {}
        for entry in entry_points(group=ENTRY_POINTS):
            try:
                entry.load()
            except Exception as error:
                _failures[entry.name] = f"{type(error).__name__}: {error}"
                logger.warning("the installed package %s cannot be loaded: %s", entry.value, error)
    return _failures
