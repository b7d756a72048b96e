"""The free part of a recipe: options that it hands on to the method.

They are compared with what it takes, so that a misspelt or ill-typed option is reported together with all
other problems of a recipe, before anything heavy is imported. What is handed on to the data set and the model
is compared by the components that name these (`Options.handed_on_problems`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vimtune import parsers
from vimtune.fields import Option, not_an_option, options_of
from vimtune.methods import METHODS, sizing_options
from vimtune.recipe.components import OPTIONS_OF_METHODS
from vimtune.text import quote


def parse_handed_on(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Parse the options that a recipe hands on to its method.

    Args:
        values: the parsed values of the recipe's keys, except for those that are wrong.

    Returns:
        (new values of the keys that hold the options, problems).
    """
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    if "peft" in values:
        problems += _method_key_problems(values)
        if "peft_kwargs" in values:
            parsed["peft_kwargs"], more = _parse_method_options(values["peft"], values["peft_kwargs"])
            problems += more
        if not problems and values.get("budget") is not None:
            problems += _budget_problems({**values, **parsed})
    return parsed, problems


def _budget_problems(values: Mapping[str, Any]) -> list[str]:
    """Why a budget cannot choose anything of the method whose options are all right."""
    keys = {name: values[name] for name in OPTIONS_OF_METHODS if values.get(name) is not None}
    try:
        sizing_options(values["peft"], {**values.get("peft_kwargs", {}), **keys})
    except ValueError as error:
        return [f"budget = {quote(values['budget'])}: {error}"]
    return []


def _fields_of(methods: Iterable[str]) -> dict[str, Option]:
    """Options of all `methods` together."""
    return {name: item for method in methods for name, item in options_of(METHODS.get(method)).items()}


def _method_key_problems(values: Mapping[str, Any]) -> list[str]:
    """Problems of the options of methods that are keys of their own."""
    peft = values["peft"]
    given = {name: values[name] for name in OPTIONS_OF_METHODS if values.get(name) is not None}
    fields = _fields_of(peft.split("+"))
    problems = [
        not_an_option(name, value, peft, fields) for name, value in given.items() if name not in fields
    ]
    problems += _misfits(peft.split("+"), given)
    return problems + [
        f"{name} is given twice: as {name} and in peft_kwargs"
        for name in given
        if name in values.get("peft_kwargs", {})
    ]


def _parse_method_options(peft: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Parse `peft_kwargs` by the types of the options of `peft`, a method or several joined by "+".

    `{"lora": {...}}` holds options of one of several methods.
    """
    methods = peft.split("+")
    shared = {name: value for name, value in given.items() if name not in methods}
    parsed, problems = _parse_fields(peft, shared, _fields_of(methods))
    problems += _misfits(methods, parsed)
    for method in (name for name in methods if name in given):
        own = given[method]
        if isinstance(own, Mapping):
            parsed[method], more = _parse_fields(method, own, _fields_of([method]))
            problems += more
        else:
            problems.append(f"peft_kwargs: {method} = {quote(own)}: expected a mapping of its fields")
    return parsed, problems


def _misfits(methods: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """One line for each of `values` that a method with an option of this name does not take.

    Methods of different packages may declare the same name with different types or ranges.
    """
    problems = []
    for method in methods:
        own = options_of(METHODS.get(method))
        for name in (name for name in values if name in own):
            try:
                _parse_option(own[name], values[name])
            except ValueError as error:
                reason = str(error).rstrip(".")
                problems.append(
                    f"{name} = {quote(values[name])} does not fit method {method}: {reason}. Give each "
                    f"method its own value in peft_kwargs: {{{method}: {{{name}: ...}}}}"
                )
    return problems


def _parse_fields(
    owner: str, given: Mapping[str, Any], fields: Mapping[str, Option]
) -> tuple[dict[str, Any], list[str]]:
    parsed, problems = {}, []
    for name, value in given.items():
        if name not in fields:
            problems.append("peft_kwargs: " + not_an_option(name, value, owner, fields))
            continue
        try:
            parsed[name] = _parse_option(fields[name], value)
        except ValueError as error:
            problems.append(f"peft_kwargs: {name} = {quote(value)}: {error}")
    return parsed, problems


def _parse_option(option: Option, value: Any) -> Any:
    """An option of a method: one value, or a mapping from targets to values."""
    try:
        return option.parse(value)  # first, because the value itself may be a mapping or have "=" in it
    except ValueError:
        return parsers.per_target(option.parse)(value)
