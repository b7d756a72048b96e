"""The free part of a recipe: options that it hands on to the data set, the model and the method.

They are compared with what the catalogue knows, so that a misspelt, reserved or ill-typed option is
reported together with all other problems of a recipe, before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vimtune import catalog, parsers
from vimtune.text import quote, shorten
from vimtune.utils import suggest

# Options that the recipe sets from elsewhere, and where.
RESERVED = {
    "dataset_kwargs": {
        "name": "the key dataset",
        "split": "the keys train_split and eval_split",
        "data_dir": "the key data_dir",
        "seed": "the key data_seed",
        "img_size": "the key img_size",
        "download": "the key download",
    },
    "model_kwargs": {
        "model_name": "the key model",
        "num_classes": "the data set",
        "img_size": "the key img_size",
        "drop_path_rate": "the key drop_path",
        "pretrained": "the key pretrained",
        "peft": "the key peft",
        "peft_targets": "the key targets",
        "peft_layers": "the key layers",
        "peft_kwargs": "the key peft_kwargs",
    },
}


def reserved_problems(key: str, options: Mapping[str, Any]) -> list[str]:
    """One line for each of `options`, given as `key`, that another key of the recipe sets."""
    return [f"{key}: {name} is set by {owner}" for name, owner in RESERVED[key].items() if name in options]


def model_problems(given: Mapping[str, Any]) -> list[str]:
    """Problems of `model_kwargs` besides names that another key sets."""
    of_methods = method_fields(catalog.METHODS)
    problems = [
        f"model_kwargs: {name} is an option of a method, not of the model: give it in peft_kwargs"
        for name in given
        if name in of_methods
    ]
    own = {
        name: value
        for name, value in given.items()
        if name not in RESERVED["model_kwargs"] and name not in of_methods
    }
    if not own:
        return problems
    from vimtune.model_options import check_model_options  # late: `--help` does not wait for the schema

    try:
        check_model_options(own, "model_kwargs")
    except ValueError as error:
        problems.append(str(error))
    if own.get("in_chans", 3) != 3:
        problems.append(
            f"model_kwargs: in_chans = {quote(own['in_chans'])}: images are read as RGB, which has 3 "
            "channels, grey ones, too. Leave it out"
        )
    return problems


def method_fields(methods: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """Fields of all `methods` together: name -> (type, default, help)."""
    return {name: field for method in methods for name, field in catalog.METHOD_FIELDS[method].items()}


def parse_method_options(peft: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Parse `peft_kwargs` by the types of the fields of `peft`, a method or several joined by "+".

    `{"lora": {...}}` holds fields of one of several methods.

    Returns:
        (options as the fields hold them, problems).
    """
    methods = peft.split("+")
    shared = {name: value for name, value in options.items() if name not in methods}
    parsed, problems = _parse_fields(peft, shared, method_fields(methods))
    for method in (name for name in methods if name in options):
        own = options[method]
        if isinstance(own, Mapping):
            parsed[method], more = _parse_fields(method, own, catalog.METHOD_FIELDS[method])
            problems += more
        else:
            problems.append(f"peft_kwargs: {method} = {quote(own)}: expected a mapping of its fields")
    return parsed, problems


def _parse_fields(
    owner: str, options: Mapping[str, Any], fields: Mapping[str, tuple[str, Any, str]]
) -> tuple[dict[str, Any], list[str]]:
    parsed, problems = {}, []
    for name, value in options.items():
        if name not in fields:
            problems.append("peft_kwargs: " + not_a_field(name, value, owner, fields))
            continue
        try:
            parsed[name] = parsers.typed(fields[name][0])(value)
        except ValueError as error:
            problems.append(f"peft_kwargs: {name} = {quote(value)}: {error}")
    return parsed, problems


def not_a_field(name: str, value: Any, owner: str, fields: Iterable[str]) -> str:
    """The message about a field that the method `owner` does not have."""
    known = f"its fields are {', '.join(sorted(fields))}" if fields else "it has none"
    return f"{shorten(name)} = {quote(value)} is not a field of {owner}: {known}.{suggest(name, fields)}"
