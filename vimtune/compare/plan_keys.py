"""The keys of a plan: which there are beside those of recipes, and how the values of all of them are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vimtune import parsers
from vimtune.fields import Options, Positive, option, options_of, parse_fields
from vimtune.methods import METHODS
from vimtune.recipe import absolute_paths, keys_of
from vimtune.tasks import TASKS
from vimtune.text import quote, suggest

Entries = dict[str, dict[str, Any]]
"""Methods or data sets by their name in the tables, with the keys of recipes that each sets."""

_NAME = re.compile(r"\w[\w.+-]{0,79}")
"""What a method or a data set may be called: it is part of the path of its runs."""

RESERVED = {
    "seed": "the key seeds",
    "output_dir": "the folder of the comparison",
    "resume": "the comparison, which continues what it finds",
    "force": "nothing: runs of a comparison have the data they began with",
}
"""Keys of recipes that the runs of a comparison do not take, and what sets them."""


def parse_entries(value: Any) -> Entries:
    """Methods or data sets: a list of names, or a mapping from names to keys of recipes.

    Raises:
        ValueError: something else.
    """
    value = parsers.plain(value)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
            raise ValueError("expected names, each of them once")
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not value:
        raise ValueError(
            "expected names such as lora,full, or a mapping such as '{lora: {rank: 8}, full: {}}'"
        )
    for name, entry in value.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"{quote(name)}: expected a name of letters, digits, '_', '-', '+' and '.'")
        if not isinstance(entry, dict | None):
            raise ValueError(f"{name}: {quote(entry)}: expected keys of recipes, such as {{rank: 8}}")
    return {name: entry or {} for name, entry in value.items()}


def _list_of(parse: parsers.Parser, what: str) -> parsers.Parser:
    """A list of different values that `parse` takes; one alone and text such as "1,2" are lists, too."""

    def parse_list(value: Any) -> list[Any]:
        value = parsers.plain(value)
        if isinstance(value, str):
            value = value.split(",")
        items = value if isinstance(value, list) else [value]
        try:
            parsed = [parse(item.strip() if isinstance(item, str) else item) for item in items]
        except ValueError as error:
            raise ValueError(f"expected {what}: {error}") from None
        if not parsed or len(set(parsed)) < len(parsed):
            raise ValueError(f"expected {what}, each of them once")
        return parsed

    return parse_list


def parse_published(value: Any) -> dict[str, dict[str, float]]:
    """Published scores by the names of a method and a data set.

    They may have names that a plan lacks, so that a part of a plan can be made with all of them.

    Raises:
        ValueError: something else.
    """
    value = parsers.plain(value)
    expected = "expected scores by method and data set, such as '{lora: {flowers: 87.3}}'"
    if not isinstance(value, dict) or not all(isinstance(own, dict) for own in value.values()):
        raise ValueError(expected)
    number = parsers.number()
    try:
        return {
            str(name): {str(data): number(score) for data, score in own.items()}
            for name, own in value.items()
        }
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from None


_NAME_OF_ONE = parsers.optional(parsers.text)
_SEEDS = _list_of(parsers.integer(0, 2**63 - 1), "seeds such as 0,1,2")
_DEVICES = _list_of(parsers.device, "devices such as cuda:0,cuda:1")
parse_rate = parsers.number(0, above=True)
"""A learning rate, the key `lr` of a recipe."""
parse_rates = _list_of(parse_rate, "learning rates such as 1e-3,3e-3")
"""Learning rates, the key `lrs` of a plan, of a method or of a data set."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """The keys of a plan beside those of recipes."""

    methods: dict[str, Any] | None = option(
        None, "names, or a mapping from names to keys of recipes", parse=parsers.optional(parse_entries)
    )
    data: dict[str, Any] | None = option(
        None, "data sets, as for methods (default: that of --dataset)", parse=parsers.optional(parse_entries)
    )
    seeds: list[int] = option([0], "seeds of the runs", parse=_SEEDS)
    lrs: list[float] | None = option(
        None, "learning rates of which the validation split chooses", parse=parsers.optional(parse_rates)
    )
    lr_seeds: list[int] | None = option(
        None, "seeds of the runs that choose (default: the first)", parse=parsers.optional(_SEEDS)
    )
    data_seeds: list[int] | None = option(
        None, "seeds of the data (--data-seed), each with every seed", parse=parsers.optional(_SEEDS)
    )
    soups: bool = option(False, "also score the average of the adapters of all seeds")
    jobs: Positive = option(1, "runs at a time on each device")
    published: dict[str, dict[str, float]] | None = option(
        None,
        "scores that others have published, to stand beside ours: '{lora: {flowers: 87.3}}'",
        parse=parsers.optional(parse_published),
    )
    reference: str | None = option(
        None, "method with which the others are compared run by run (default: the first)", parse=_NAME_OF_ONE
    )
    devices: list[str] | None = option(
        None, "devices that share the runs: cuda:0,cuda:1", parse=parsers.optional(_DEVICES)
    )


def read_keys(values: Mapping[str, Any]) -> tuple[PlanOptions, dict[str, Any], list[str]]:
    """Read the keys of a plan and of the recipes of its runs, as YAML or flags give them.

    Returns:
        (the plan's own keys; those of recipes that all runs have, with absolute paths; a line for each key or
        value that is wrong, which is left out of both).
    """
    own = options_of(PlanOptions)
    parsed, wrong = parse_fields(PlanOptions, values)
    problems = [*wrong.values()]
    if parsed.get("methods", ...) is None:
        problems.append(f"methods is missing: name what is compared, such as {','.join(list(METHODS)[:2])}")
    base = {key: value for key, value in values.items() if key not in own}
    base, more = _without_wrong_keys(base, "", {"peft": "the key methods", **RESERVED}, list(own))
    problems += more
    for kind in ("methods", "data"):
        for name, entry in (parsed.get(kind) or {}).items():
            entry, more = _without_wrong_keys(entry, f"{kind}: {name}: ", RESERVED, ["lrs"])
            parsed[kind][name] = absolute_paths(entry)
            problems += more
    return PlanOptions(**parsed), absolute_paths(base), problems


def _without_wrong_keys(
    values: Mapping[str, Any], where: str, reserved: Mapping[str, str], of_plans: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Keys of recipes, without those that the recipes of no task have or that a comparison sets itself, and a
    line for each of these.

    Args:
        values: the keys with their values.
        where: where they stand, for messages.
        reserved: keys that are set otherwise, and by what.
        of_plans: keys that are allowed or may have been meant there besides those of recipes.
    """
    of_recipes = dict.fromkeys(key for task in TASKS for key in keys_of(task))
    right, problems = {}, []
    for key, value in values.items():
        if key in reserved:
            problems.append(f"{where}{key} = {quote(value)}: set by {reserved[key]}")
        elif key in of_recipes or key in of_plans:
            right[key] = value
        else:
            hint = suggest(str(key), [*of_plans, *(known for known in of_recipes if known not in reserved)])
            problems.append(f"{where}unknown key {quote(key)}.{hint}")
    return right, problems
