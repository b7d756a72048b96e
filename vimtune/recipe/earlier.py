"""Recipes that earlier versions of vimtune have stored: what they mean today."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vimtune.data.datasets import reads_files
from vimtune.methods import split_options
from vimtune.recipe.components import OPTIONS_OF_METHODS, MethodSettings
from vimtune.text import split_outside

_SINCE_BOTH_DIRECTIONS = "budget"
"""A key of every recipe that has been stored since targets without `_b` mean both directions of a scan."""
_FORWARD = re.compile(r"(?=(A_log|D|conv1d|x_proj|dt_proj)(?!\w))")
"""Where a target begins that meant the forward direction alone."""

DEFAULTS_THEN: dict[str, dict[str, Any]] = {"prodial": {"variant": "free"}}
"""Defaults of methods that were others when states of runs did not yet hold all options."""


def options_then(method: MethodSettings) -> dict[str, dict[str, Any]]:
    """`all_options` of a method as they were when states did not yet hold them.

    Raises:
        ValueError: as `all_options` raises it.
    """
    stated = split_options(method.peft, method.given_options)
    options = method.all_options
    for name in options.keys() & DEFAULTS_THEN.keys():
        options[name] |= {key: then for key, then in DEFAULTS_THEN[name].items() if key not in stated[name]}
    return options


def complete_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an earlier run as today's: keys that it lacks are set to what vimtune did when it was
    stored, and its targets are written so that they mean the same."""
    completed = {"data_seed": values.get("seed", 0), **values}  # One seed drew everything.
    if not reads_files(values.get("dataset")):
        completed["data_dir"] = None  # It was passed over then, and is refused today.
    if _SINCE_BOTH_DIRECTIONS in values:
        return completed
    rewritten = {
        "targets": _of_targets,
        "peft_kwargs": _of_options,
        **dict.fromkeys(OPTIONS_OF_METHODS, _of_option),
    }
    return {key: rewritten[key](value) if key in rewritten else value for key, value in completed.items()}


def _of_targets(targets: Any) -> Any:
    """Targets in all the ways in which they can be stated, by method included."""
    if isinstance(targets, Mapping):
        return {method: _of_targets(own) for method, own in targets.items()}
    if isinstance(targets, str):
        return ",".join(map(_of_target, split_outside(targets, ",")))
    return [_of_target(target) for target in targets] if isinstance(targets, list) else targets


def _of_target(target: Any) -> Any:
    """One target: what began at the projection itself now begins above it."""
    if not isinstance(target, str):
        return target
    sign, name = ("!", target.strip()[1:].strip()) if target.strip().startswith("!") else ("", target.strip())
    return sign + _FORWARD.sub("mixer.", name, count=1) if _FORWARD.match(name) else target


def _of_option(value: Any) -> Any:
    """An option, whose values by target are a mapping."""
    return (
        {_of_targets(target): own for target, own in value.items()} if isinstance(value, Mapping) else value
    )


def _of_options(values: Any) -> Any:
    """`peft_kwargs`: options, or those of one method by its name."""
    if not isinstance(values, Mapping):
        return values
    return {
        key: _of_options(value) if _is_of_method(value) else _of_option(value)
        for key, value in values.items()
    }


def _is_of_method(value: Any) -> bool:
    """Whether a value among the options is itself a mapping of options, some of which are by target."""
    return isinstance(value, Mapping) and any(isinstance(own, Mapping) for own in value.values())
