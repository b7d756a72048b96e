"""Keys of a recipe that what is done with a trained model has no use for, such as those of the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vimtune.fields import Option, Purpose
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
            raise ValueError(
                f"unknown key {quote(name)} of an {what}: training alone reads {name}, and {quote(value)} "
                "would change nothing here. Leave it out"
            )


def _serves(name: str, purpose: Purpose) -> bool:
    """Whether a key of any task is of use; what is no key at all is for others to judge."""
    declared = [keys[name] for keys in map(keys_of, TASKS) if name in keys]
    return not declared or any(item.serves(purpose) for item in declared)


def serving(groups: Mapping[str, Mapping[str, Option]], purpose: Purpose) -> dict[str, dict[str, Option]]:
    """Keys by the title of their group without those that are of no use, and without groups that had no
    others."""
    found = {
        title: {name: item for name, item in items.items() if item.serves(purpose)}
        for title, items in groups.items()
    }
    return {title: items for title, items in found.items() if items}
