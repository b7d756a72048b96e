"""Parsers of recipe values.

A parser takes a value as it comes from Python, YAML or a flag (text) and returns it as the recipe's
field holds it. It raises ValueError("expected ...") and leaves a value that is right already as it is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vimtune.strict_yaml import MAX_DEPTH, YAMLTextError, parse_yaml
from vimtune.text import quote, split_outside, suggest

Parser = Callable[[Any], Any]
"""Turns a value of a file or of the command line into that of a field, or raises ValueError."""
Value = TypeVar("Value")
"""What a parser makes."""

LARGEST = 2**31 - 1
"""Largest whole number of a recipe, unless the field says otherwise."""
MAX_IMAGE_SIDE = 2**14
"""Largest image side in pixels."""
MAX_LAYERS = 1024
"""Block indices lie between minus and plus this number."""
MAX_PATH = 4096
"""Characters of a path."""
MAX_OPTIONS = 8192
"""Characters of the options or targets of a recipe, so that its file stays one that can be read."""


def _yaml_value(text: str) -> Any:
    if text and not re.search(r"[\w\s\[\]{}\"'~]", text):
        return text  # Signs alone, such as a separator, are no values of YAML, though some begin one.
    try:
        value = parse_yaml(text)
    except YAMLTextError as error:
        raise ValueError(f"not readable as YAML ({error.problem})") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3 as text.
    return value


def _unbracket(value: Any) -> Any:
    """A flag such as '[0, 1]' or '{a: b}' as the list or mapping it means."""
    return _yaml_value(value) if isinstance(value, str) and value.startswith(("[", "{")) else value


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Parser:
    """Float in [low, high]; `above`/`below` make the bound an open one."""
    lower = f"> {low:g}" if above else f">= {low:g}"
    upper = f"< {high:g}" if below else f"<= {high:g}"
    bounds = [text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)]
    expected = " ".join(["a number", " and ".join(bounds)]) if bounds else "a finite number"

    def parse(value: Any) -> float:
        # Text, because YAML 1.1 reads 1e-3 as text.
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"expected {expected}")
        try:
            found = float(value)
        except (ValueError, OverflowError):
            raise ValueError(f"expected {expected}") from None
        if not math.isfinite(found) or found < low or found > high:
            raise ValueError(f"expected {expected}")
        if (above and found == low) or (below and found == high):
            raise ValueError(f"expected {expected}")
        return found

    return parse


def integer(low: int = -LARGEST, high: int = LARGEST) -> Parser:
    """Whole number in [low, high]; text and floats without a fraction are converted."""
    expected = "expected a whole number" + (f" >= {low}" if low > -LARGEST else "")

    def parse(value: Any) -> int:
        # The length is checked first: Python refuses to read thousands of digits.
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,30}", value.strip()):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(expected)
        if value > high:
            raise ValueError(f"expected a whole number <= {high}")
        return value

    return parse


def boolean(value: Any) -> bool:
    """True or false, also as the words that YAML has for them."""
    if isinstance(value, str) and value.lower() in {"true", "yes", "on", "false", "no", "off"}:
        return value.lower() in {"true", "yes", "on"}
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    return value


def device(value: Any) -> str:
    """Name of a device. Whether the machine has it is not asked."""
    if not isinstance(value, str) or not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d{1,3})?", value):
        raise ValueError("expected auto, cpu, cuda, cuda:<index> or mps")
    return value


def path(value: Any) -> str:
    """A path as text, with `~` replaced by the home folder. Whether anything lies there is not asked."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise ValueError("expected a path")
    if len(value) > MAX_PATH:
        raise ValueError(f"expected a path of at most {MAX_PATH} characters")
    if "\0" in value:
        raise ValueError("expected a path: no path has a NUL character in it")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError("expected a path: a character of it cannot be in a file name") from None
    expanded = os.path.expanduser(value)
    if expanded == value and re.match(r"~(/|$)", value):
        raise ValueError("expected a path without ~, because no home folder is known here")
    return expanded


def given_file(value: Any) -> Path:
    """The name of a file to write that somebody gives to a function as its argument `path`.

    Raises:
        ValueError: it is no path, or a folder.
    """
    path = given_path("path", value, "the file to write")
    if path.is_dir():
        raise ValueError(f"path = {quote(str(path))} is a folder: give the name of a file to write")
    return path


def given_path(name: str, value: Any, what: str, error: type[ValueError] = ValueError) -> Path:
    """The path that somebody gives to a function, as `path` takes it.

    Args:
        name: of the function's argument.
        value: what is given.
        what: of what it is to be the path, such as "a run folder".
        error: what is raised.

    Raises:
        ValueError: it is no path, or of the class `error`.
    """
    if not isinstance(value, str | os.PathLike) or not value:
        is_content = isinstance(value, bytes | bytearray | memoryview) or hasattr(value, "read")
        advice = "; write what is open or in memory to a file, and give its path" if is_content else ""
        raise error(f"{name} = {quote(value)}: expected the path of {what}, as text or pathlib.Path{advice}")
    try:
        return Path(path(value))
    except ValueError as wrong:
        raise error(f"{name} = {quote(value)}: {wrong}") from None


def absolute_path(value: Any) -> str:
    """`path`, made independent of the working directory."""
    return os.path.abspath(path(value))


def choice(*options: str) -> Parser:
    """One of several words."""

    def parse(value: Any) -> str:
        if isinstance(value, bool):  # YAML 1.1 reads `on` and `yes` as true, `off` and `no` as false.
            meant = ("on",) if value else ("off", "none")
            value = next((option for option in meant if option in options), value)
        if not isinstance(value, str) or value not in options:
            hint = suggest(value, options) if isinstance(value, str) else ""
            raise ValueError(f"expected one of {', '.join(options)}.{hint}")
        return value

    return parse


def automatic(parse: Parser) -> Parser:
    """Takes the word "auto", or what `parse` takes."""

    def parse_automatic(value: Any) -> Any:
        if isinstance(value, str) and value.lower() == "auto":
            return "auto"
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return parse_automatic


def mapping(value: Any) -> dict[str, Any]:
    """Options by name, whose values are plain: text, numbers, true, false, nothing, lists and mappings."""
    if isinstance(value, str) and re.match(r"\s*\{", value):
        value = _yaml_value(value)
    elif isinstance(value, str) and "=" in value:  # This is how --peft-kwargs variant=paper,rank=8 comes.
        value = {key: _yaml_value(text) for key, text in _pairs(value).items()}
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping such as '{name: value}' or name=value,name=value")
    return _bounded(_plain_mapping(value, 0))


def _bounded(value: Value) -> Value:
    if len(str(value)) > MAX_OPTIONS:
        raise ValueError(f"expected at most {MAX_OPTIONS} characters")
    return value


def _pairs(flag: str, name: str = ".*") -> dict[str, str]:
    """The pairs of 'a=1,b=x'. A comma begins a new pair only where a name and '=' follow: 'a=1,2' is one.
    What stands in brackets belongs together.

    `name` is the regular expression of what may be a name.
    """
    pairs: dict[str, str] = {}
    last = ""
    for part in split_outside(flag, ","):
        key, *after = split_outside(part, "=")
        if after and re.fullmatch(name, key):
            last = key.strip()
            if not last:
                raise ValueError("expected name=value,name=value")
            if last in pairs:
                raise ValueError(f"{quote(last)} is given twice")
            pairs[last] = "=".join(after).strip()
        elif last:
            pairs[last] += f",{part}"
        else:
            raise ValueError("expected name=value,name=value")
    return pairs


def _plain_mapping(values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    if not all(isinstance(key, str) and key for key in values):
        raise ValueError("expected a mapping whose keys are text")
    return {key: _plain(value, f"{key} = {quote(value)}", depth) for key, value in values.items()}


def plain(value: Any) -> Any:
    """Any value that a recipe file can hold; text that begins with a bracket is read as YAML."""
    value = _unbracket(value)
    return _bounded(_plain(value, quote(value), 0))


def _plain(value: Any, shown: str, depth: int) -> Any:
    """`value` built anew from the types that a recipe file can hold."""
    if depth == MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if abs(value) > 2**63 - 1:
            raise ValueError(f"{shown}: expected whole numbers of at most 63 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{shown}: expected finite numbers")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, shown, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return _plain_mapping(value, depth + 1)
    raise ValueError(f"{shown}: expected text, numbers, true, false, null, or lists and mappings of them")


def image_size(value: Any) -> int | list[int]:
    """Side of a square image in pixels, or [height, width]."""
    value = _unbracket(value)
    side = integer(1, MAX_IMAGE_SIDE)
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*[x, ]\s*(\d+)\s*", value)):
        value = list(match.groups())
    try:
        if isinstance(value, list | tuple):
            height, width = map(side, value)
            return [height, width]
        return int(side(value))
    except ValueError:
        raise ValueError(
            f"expected pixels such as 224, or height and width such as [64, 96], at most {MAX_IMAGE_SIDE}"
        ) from None


def per_method(parse: Parser) -> Parser:
    """Takes what `parse` takes, or a mapping from methods of a composition to that.

    As a flag, the mapping is `lora=both,ft=A_log,D`: a name and '=' begin the part of a method. In
    `re:(?=x)a`, '=' does not follow a name, so that this is no mapping.
    """
    name = r"\s*[\w.-]+\s*"

    def parse_each(value: Any) -> Any:
        value = _unbracket(value)
        if isinstance(value, str) and re.match(rf"{name}=", value):
            value = _pairs(value, name)
        if not isinstance(value, Mapping):
            return _bounded(parse(value))
        if not value or not all(isinstance(method, str) and method for method in value):
            raise ValueError("expected a mapping from methods, such as {lora: both, ft: [A_log, D]}")
        return _bounded({method: parse(own) for method, own in value.items()})

    return parse_each


def per_target(parse: Parser) -> Parser:
    """Takes what `parse` takes, or a mapping from targets to that.

    As a flag, the mapping is `in_proj=8,x_proj[B]=4`. Targets with ',' or '=' outside of brackets, several of
    them or a regular expression, are put in quotes in a mapping of YAML: `{"in_proj,x_proj[B]": 8}`.
    """

    def parse_each(value: Any) -> Any:
        if isinstance(value, str) and re.match(r"\s*\{", value):
            value = _unbracket(value.strip())
        elif isinstance(value, str) and "=" in value:
            value = _pairs(value)
        if not isinstance(value, Mapping):
            return parse(value)
        if not value or not all(isinstance(target, str) and target for target in value):
            raise ValueError("expected a mapping from targets, such as in_proj=8,x_proj[B]=4")
        parsed = {}
        for target, own in value.items():
            if excludes(target):
                raise ValueError(
                    f"expected targets for which the value holds, not exclusions: {quote(target)}"
                )
            try:
                parsed[target] = parse(own)
            except ValueError as error:
                raise ValueError(f"{error} for target {quote(target)}, not {quote(own)}") from None
        return _bounded(parsed)

    return parse_each


def excludes(targets: str) -> bool:
    """Whether one of the targets in a text is an exclusion, such as "!in_proj"."""
    return any(target.strip().startswith("!") for target in split_outside(targets, ","))


def targets(value: Any) -> str | list[str]:
    """Targets as `vimtune.adapters.targets` reads them: one, or a list; text is split at commas outside
    of brackets."""
    value = _unbracket(value)
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in split_outside(value, ",")]
        value = value[0] if len(value) == 1 else value
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise ValueError(
            "expected both, in_proj, out_proj, or a list of target names, or one of these for each method: "
            "lora=both,ft=A_log,D"
        )
    return list(value)


def layers(value: Any) -> list[int]:
    """Indices of blocks; text may have ranges such as 0-11."""
    expected = "expected block indices such as [0, 1, 2], or 0,1,2, or 0-11 (-1 is the last block)"
    value = _unbracket(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        indices: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(?:(-?\d{1,30})|(\d{1,4})\s*-\s*(\d{1,4}))\s*", part)
            if match is None or (match[2] and int(match[2]) > int(match[3])):
                raise ValueError(expected)
            indices += [int(match[1])] if match[1] else range(int(match[2]), int(match[3]) + 1)
        value = indices
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(expected)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in value):
        raise ValueError(expected)
    if len(value) > MAX_LAYERS or not all(-MAX_LAYERS <= index < MAX_LAYERS for index in value):
        raise ValueError(f"expected at most {MAX_LAYERS} block indices below {MAX_LAYERS}")
    return list(value)


def betas(value: Any) -> list[float]:
    """The two decay rates of an optimizer."""
    value = _unbracket(value)
    parts = value.split(",") if isinstance(value, str) else value
    parse = number(0, 1, below=True)
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError("expected two numbers such as [0.9, 0.999]")
    return [parse(part) for part in parts]


def parameter_budget(value: Any) -> int | str:
    """How many numbers may be trained: a whole number such as 300000, also written 300k or 1.5M, or the text
    "0.5%" for a share of the backbone."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    match = (
        re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kKmM%]?)\s*", value)
        if isinstance(value, str)
        else None
    )
    if match is not None and match[2] == "%" and 0 < float(match[1]) <= 100:
        return f"{float(match[1]):g}%"
    if match is not None and match[2] != "%":
        numbers = float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()]
        if numbers.is_integer() and 1 <= numbers <= LARGEST:
            return int(numbers)
    raise ValueError("expected a number of parameters such as 300k, or a share of the backbone such as 0.5%")


def optional(parse: Parser) -> Parser:
    """Takes what `parse` takes, or nothing: None, "none", "null"."""

    def parse_optional(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in {"none", "null"}):
            return None
        return parse(value)

    return parse_optional
