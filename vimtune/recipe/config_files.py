"""Files for `--config`: the values of one recipe, or of a grid of recipes that share most of them.

A grid has the key `variants`. Under it stand groups, and in each group the named choices of it:

    epochs: 100
    variants:
      data:
        flowers: {dataset: flowers}
        cars: {dataset: cars}
      method:
        full: {peft: full, lr: 1.0e-4}
        lora_in: {peft: lora, targets: in_proj}

`--variant flowers/lora_in` takes one choice of every group, in the order of the groups. The values of the
choices come before those at the top of the file; no two groups may set the same key.

`vimtune compare --config` takes the whole of a grid that has a group `method`: these are the methods, and the
choices of the other groups the data. For it the key `published` may have scores that others have published,
by method and data; it is no key of a recipe.
"""

from __future__ import annotations

import os
from typing import Any

from vimtune.strict_yaml import read_yaml
from vimtune.text import quote, suggest

GRID = "variants"
"""Key under which the groups of a grid stand."""

METHOD = "method"
"""The group of a grid whose choices are the methods of a comparison."""

PUBLISHED = "published"
"""Key of a grid under which published scores stand."""

Groups = dict[str, dict[str, dict[str, Any]]]
"""Group -> choice -> the values that it sets."""


def read_config(path: str | os.PathLike[str], variant: str | None = None) -> dict[str, Any]:
    """The values of the recipe that a file states.

    Args:
        path: a YAML file.
        variant: which recipe of a grid is meant, as choices joined by "/"; None for a file that is no grid.

    Raises:
        ValueError: the file cannot be read or is malformed; a grid without `variant`, or the other way round;
            or a choice that the grid does not have. The message names the file and the choices.
    """
    values = read_yaml(path)
    name = quote(os.fspath(path))
    if GRID not in values:
        if variant is not None:
            raise ValueError(f"variant = {quote(variant)}: {name} is no grid, it has no key {GRID!r}")
        return values
    groups = _check_groups(values.pop(GRID), name)
    values.pop(PUBLISHED, None)
    for choice in _choices(variant, groups, name):
        values |= choice
    return values


def variants_of(path: str | os.PathLike[str]) -> list[str]:
    """All recipes of a grid, as `read_config` takes them; empty for a file that is no grid.

    Raises:
        ValueError: the file cannot be read or is malformed.
    """
    values = read_yaml(path)
    if GRID not in values:
        return []
    variants = [""]
    for choices in _check_groups(values[GRID], quote(os.fspath(path))).values():
        variants = [f"{variant}/{choice}" for variant in variants for choice in choices]
    return [variant.removeprefix("/") for variant in variants]


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of the plan of a comparison that a file states.

    A file that is no grid has them as they are. Of a grid the choices of the group `method` are its methods;
    one choice of every other group, their names joined by "-", is a data set.

    Args:
        path: a YAML file.

    Raises:
        ValueError: the file cannot be read or is malformed, or a grid without methods.
    """
    values = read_yaml(path)
    if GRID not in values:
        return values
    name = quote(os.fspath(path))
    groups = _check_groups(values.pop(GRID), name)
    if METHOD not in groups:
        raise ValueError(
            f"{name}: a comparison needs a grid with the group {METHOD!r}; it has {', '.join(groups)}"
        )
    methods = groups.pop(METHOD)
    data: dict[str, dict[str, Any]] = {"": {}}
    for choices in groups.values():
        data = {
            f"{before}-{choice}".removeprefix("-"): {**given, **own}
            for before, given in data.items()
            for choice, own in choices.items()
        }
    return {**values, "methods": methods, **({"data": data} if groups else {})}


def _check_groups(groups: Any, name: str) -> Groups:
    """`groups` of the file `name`, if they have the form of a grid."""
    if not _is_mapping(groups) or not all(
        _is_mapping(choices) and all(isinstance(choice, dict) for choice in choices.values())
        for choices in groups.values()
    ):
        raise ValueError(
            f"{name}: expected under {GRID!r} groups of named choices, each with the values that it sets, "
            "such as 'data: {flowers: {dataset: flowers}}'"
        )
    owners: dict[Any, str] = {}
    for group, choices in groups.items():
        for choice, values in choices.items():
            if "/" in choice:
                raise ValueError(f"{name}: the name {quote(choice)} under {GRID!r} has a '/'; choose another")
            for key in values:
                if owners.setdefault(key, group) != group:
                    raise ValueError(
                        f"{name}: {quote(key)} is set by the groups {quote(owners[key])} and {quote(group)}; "
                        "expected every key in one group"
                    )
    checked: Groups = groups
    return checked


def _is_mapping(value: Any) -> bool:
    """Whether `value` is a mapping that is not empty, from names."""
    return isinstance(value, dict) and bool(value) and all(isinstance(key, str) and key for key in value)


def _choices(variant: str | None, groups: Groups, name: str) -> list[dict[str, Any]]:
    """The values of the choices that `variant` names, one of every group."""
    parts = [] if variant is None else variant.split("/")
    if len(parts) != len(groups):
        given = "" if variant is None else f"variant = {quote(variant)}: "
        known = "; ".join(f"{quote(group)}: {', '.join(choices)}" for group, choices in groups.items())
        raise ValueError(
            f"{given}{name} is a grid: expected --variant {'/'.join(groups)}, with one choice of each "
            f"({known})"
        )
    for part, (group, choices) in zip(parts, groups.items(), strict=True):
        if part not in choices:
            raise ValueError(
                f"variant = {quote(variant)}: {name} has no {quote(part)} among its choices of "
                f"{quote(group)}: {', '.join(choices)}.{suggest(part, choices)}"
            )
    return [choices[part] for part, choices in zip(parts, groups.values(), strict=True)]
