"""What is left out of tiny runs, half of whose time it would be: drawing, and painting images anew."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

NO_PICTURES: dict[str, Callable[..., Any]] = {
    "vimtune.pages.style.save_picture": lambda figure, path: path.touch(),
    "vimtune.training.pictures.draw_learning_curve": lambda *what: None,
    "vimtune.tasks.classes.confusion.draw_confusion_matrix": lambda *what: None,
    "vimtune.tasks.classes.reliability.draw_reliability": lambda *what: None,
    "vimtune.tasks.images.gallery.draw_gallery": lambda *what: None,
    "vimtune.pages.page.to_png": lambda figure: b"",
}
"""Functions by their full names, and what stands in for them. The files of the pictures are there, empty."""
TAKERS = ("vimtune.compare.tables.files", "vimtune.search.search", "vimtune.tasks.classes.page")
"""Modules that take one of these functions from its own, and would keep what stands in for it."""


def painting_once() -> dict[str, Callable[..., Any]]:
    """The same for the function that paints flowers. Each caller gets a copy, so that none spoils an image of
    another."""
    from vimtune.data.synthetic import scene

    paint = functools.lru_cache(maxsize=2000)(scene.render_flower)
    return {"vimtune.data.synthetic.scene.render_flower": lambda *place: paint(*place).copy()}


def replace_until_undone(functions: dict[str, Callable[..., Any]], patch: pytest.MonkeyPatch) -> None:
    """Put these functions in the place of those of the same names until `patch` is undone."""
    for module, name, function in _found(functions):
        patch.setattr(module, name, function)


def replace_in_process(functions: dict[str, Callable[..., Any]]) -> None:
    """Put these functions in the place of those of the same names until the process ends."""
    for module, name, function in _found(functions):
        setattr(module, name, function)


def _found(functions: dict[str, Callable[..., Any]]) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """Modules, names and functions. All modules are imported before anything is replaced."""
    for taker in TAKERS:
        importlib.import_module(taker)
    places = [(name.rpartition("."), function) for name, function in functions.items()]
    return [(importlib.import_module(place[0]), place[2], function) for place, function in places]
