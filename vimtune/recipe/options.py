"""The options of methods that a run has, beside those that a recipe has now: defaults count as well.

A recipe names what was given alone. Between two versions of vimtune the same recipe may have other defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vimtune import parsers
from vimtune.methods import differing_options, split_options
from vimtune.recipe.components import OPTIONS_OF_METHODS, MethodSettings
from vimtune.text import quote

OPTION_KEYS = frozenset((*OPTIONS_OF_METHODS, "peft_kwargs"))
"""The keys of recipes that say options of methods."""


@dataclass(frozen=True)
class ChangedOption:
    """An option of a method that a run has otherwise than a recipe."""

    method: str
    name: str
    was: Any
    """That of the run."""
    now: Any
    """That of the recipe."""
    is_default: bool
    """Whether the recipe does not state it, so that `now` is the default of this version."""

    def __str__(self) -> str:
        return f"{self.name} of {self.method} was {quote(self.was)} and is now {quote(self.now)}"


def changed_options(saved: Mapping[str, Any], method: MethodSettings) -> list[ChangedOption]:
    """The options of a method that are not those of a run.

    Args:
        saved: all options of the run as a file has them, method -> option -> value, beside which there may be
            more. What is not there counts as unchanged.
        method: that of the recipe.

    Raises:
        ValueError: as `MethodSettings.all_options` raises it.
    """
    stated = split_options(method.peft, method.given_options)
    return [
        ChangedOption(name, option, was, now, is_default=option not in stated[name])
        for name, option, was, now in differing_options(saved, method.all_options)
    ]


def options_over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with those that are given in their place.

    Where the method stays, an option that is given takes the place of this option alone, however it was
    stated: as a key, in `peft_kwargs`, or there for one of several methods. Those of another method replace
    all.

    Args:
        values: keys of a recipe, as a file or a run states them.
        given: keys of a recipe, as flags or a later file state them.
    """
    merged = {**values, **given}
    if merged.get("peft") != values.get("peft"):
        return merged
    try:
        options = parsers.mapping(given.get("peft_kwargs") or {})
        kept = parsers.mapping(values.get("peft_kwargs") or {})
    except ValueError:
        return merged  # The parser of the key says what is wrong.
    replaced = {name for name in OPTIONS_OF_METHODS if given.get(name) is not None} | options.keys()
    methods = str(values.get("peft", "")).split("+")
    for name, value in list(kept.items()):
        if name in methods and isinstance(value, Mapping):
            own = options.get(name, {})
            left = {key: item for key, item in value.items() if key not in replaced}
            kept[name] = {**left, **own} if isinstance(own, Mapping) else own
        elif name in replaced:
            del kept[name]
    merged |= {name: None for name in OPTIONS_OF_METHODS if name in options and given.get(name) is None}
    if kept or options:
        merged["peft_kwargs"] = {**options, **kept}
    return merged


def keeping(changed: Iterable[ChangedOption], method: MethodSettings) -> dict[str, Any]:
    """The `peft_kwargs` by which a method keeps the options of a run where it would have another default.

    Args:
        changed: what `changed_options` says of the two.
        method: that of the recipe.
    """
    kept: dict[str, dict[str, Any]] = {}
    for option in changed:
        if option.is_default:
            kept.setdefault(option.method, {})[option.name] = option.was
    if "+" not in method.peft:
        return {**method.peft_kwargs, **kept.get(method.peft, {})}
    return {
        **method.peft_kwargs,
        **{name: {**method.peft_kwargs.get(name, {}), **own} for name, own in kept.items()},
    }
