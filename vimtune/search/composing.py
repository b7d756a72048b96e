"""From what was drawn to the recipe of a trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vimtune.fields import options_of
from vimtune.recipe.components import MethodSettings
from vimtune.search.space import Drawn, Part, Space

NOTHING = "linear"
"""The method of a trial without any part: the head alone is trained."""


def method_keys() -> dict[str, Any]:
    """The keys of a recipe that say how the model is adapted, with their defaults."""
    return {name: item.default for name, item in options_of(MethodSettings).items()}


def recipe_values(space: Space, drawn: Drawn) -> dict[str, Any]:
    """The keys of the recipe that train what was drawn."""
    by_method: dict[str, list[Part]] = {}
    for name in drawn.parts:
        by_method.setdefault(space.parts[name].method, []).append(space.parts[name])
    targets: dict[str, list[str]] = {}
    options: dict[str, dict[str, Any]] = {}
    for method, parts in by_method.items():
        # Of several values that hold for some rows the last one does, so that of the whole comes first.
        ordered = sorted(parts, key=lambda part: any("[" in target for target in part.targets))
        if named := [target for part in ordered for target in part.targets]:
            targets[method] = named
        if own := _options(ordered, drawn.parts):
            options[method] = own
    return {
        **method_keys(),
        "peft": "+".join(by_method) or NOTHING,
        "targets": targets or None,
        "peft_kwargs": options,
        **drawn.keys,
    }


def _options(parts: Sequence[Part], values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a method that has these parts, by target where there are several."""
    if len(parts) == 1:
        return dict(values[parts[0].name])
    options: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, value in values[part.name].items():
            options.setdefault(name, {})[",".join(part.targets)] = value
    return options
