"""Keys of a recipe that what is done with a trained model has no use for, such as those of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vimtune.fields import Purpose
from vimtune.recipe.recipe import keys_of
from vimtune.tasks import TASKS
from vimtune.text import quote


def keys_that_serve(values: Mapping[str, Any], purpose: Purpose) -> dict[str, Any]:
    """The stored values of a run without those of keys that are of no use for a purpose.

    What these name, such as the file of a teacher, may be gone since.
    """
    return {name: value for name, value in values.items() if _serves(name, purpose)}


def refuse_keys_without_use(given: Mapping[str, Any], purpose: Purpose, what: str) -> None:
    """Check that a user gives no keys that would change nothing.

    Args:
        given: values by key.
        purpose: for what they are given.
        what: the name of that for the message, in the singular, such as "evaluation".

    Raises:
        ValueError: a key that training alone reads.
    """
    for name, value in given.items():
        if not _serves(name, purpose):
            raise ValueError(f"unknown key {quote(name)} of an {what}: {_why_none(name, quote(value))}")


def keys_without_use(purpose: Purpose) -> dict[str, str]:
    """The keys of any task that are of no use for a purpose, and why they are refused."""
    names = dict.fromkeys(name for task in TASKS for name in keys_of(task))
    return {name: _why_none(name, "it") for name in names if not _serves(name, purpose)}


def _why_none(name: str, value: str) -> str:
    return f"training alone reads {name}, and {value} would change nothing here. Leave it out"


def _serves(name: str, purpose: Purpose) -> bool:
    """Whether a key of any task is of use; what is no key at all is for others to judge."""
    declared = [keys[name] for keys in map(keys_of, TASKS) if name in keys]
    return not declared or any(item.serves(purpose) for item in declared)
