"""Parsers of recipe values.

A parser takes a value as it comes from Python, YAML or a flag (text) and returns it as the recipe's
field holds it. It raises ValueError("expected ...") and leaves a value that is right already as it is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from vimtune.utils import suggest

Parser = Callable[[Any], Any]


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not readable as YAML ({getattr(error, 'problem', error)})") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-3 as text
    return value


def _unbracket(value: Any) -> Any:
    """A flag such as '[0, 1]' or '{lora: both}' as the list or mapping it means."""
    return _yaml_value(value) if isinstance(value, str) and value.startswith(("[", "{")) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Parser:
    """Float in [low, high]; `above`/`below` make the bound an open one."""
    lower = f"> {low:g}" if above else f">= {low:g}"
    upper = f"< {high:g}" if below else f"<= {high:g}"
    expected = "a number " + " and ".join(
        text for text, bound in ((lower, low), (upper, high)) if math.isfinite(bound)
    )

    def parse(value: Any) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"expected {expected}") from None
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"expected {expected}")
        if value < low or value > high or (above and value == low) or (below and value == high):
            raise ValueError(f"expected {expected}")
        return float(value)

    return parse


def integer(low: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"expected a whole number >= {low}")
        return value

    return parse


def boolean(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in {"true", "yes", "on", "false", "no", "off"}:
        return value.lower() in {"true", "yes", "on"}
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """Text that is not empty, or a path."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    return value


def choice(*options: str) -> Parser:
    def parse(value: Any) -> str:
        if isinstance(value, bool):  # YAML 1.1 reads `on` and `yes` as true, `off` and `no` as false
            meant = ("on",) if value else ("off", "none")
            value = next((option for option in meant if option in options), value)
        if value not in options:
            raise ValueError(f"expected one of {', '.join(options)}.{suggest(str(value), options)}")
        return str(value)

    return parse


def known(kind: str, table: Mapping[str, str]) -> Parser:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in table:
            raise ValueError(f"expected a known {kind}: {', '.join(table)}.{suggest(str(value), table)}")
        return value

    return parse


def mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and "=" in value:  # --peft-kwargs variant=paper,rank=8
        pairs = [pair.partition("=") for pair in value.split(",")]
        value = {key.strip(): _yaml_value(text) for key, _, text in pairs}
    elif isinstance(value, str):
        value = _yaml_value(value)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("expected a mapping such as '{name: value}' or name=value,name=value")
    return dict(value)


def image_size(value: Any) -> int | list[int]:
    value = _unbracket(value)
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+)\s*[x, ]\s*(\d+)\s*", value)):
        value = list(match.groups())
    try:
        if isinstance(value, list | tuple):
            height, width = (integer(1)(side) for side in value)
            return [height, width]
        return integer(1)(value)
    except ValueError:
        raise ValueError("expected pixels such as 224, or height and width such as [64, 96]") from None


def targets(value: Any) -> str | list[str]:
    value = _unbracket(value)
    if isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(x, str) and x for x in value):
        raise ValueError("expected both, in_proj, out_proj, or a list of target names")
    return list(value)


def layers(value: Any) -> list[int]:
    expected = "expected block indices such as [0, 1, 2], or 0,1,2, or 0-11 (-1 is the last block)"
    value = _unbracket(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        indices: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(?:(-?\d+)|(\d+)\s*-\s*(\d+))\s*", part)
            if match is None:
                raise ValueError(expected)
            indices += [int(match[1])] if match[1] else range(int(match[2]), int(match[3]) + 1)
        value = indices
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(expected)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in value):
        raise ValueError(expected)
    return list(value)


def per_method(parse: Parser) -> Parser:
    """Takes what `parse` takes, or a mapping from methods of a composition to that."""

    def parse_each(value: Any) -> Any:
        value = _unbracket(value)
        if not isinstance(value, Mapping):
            return parse(value)
        if not value or not all(isinstance(name, str) for name in value):
            raise ValueError("expected a mapping from methods, such as {lora: both, ft: A_log}")
        return {name: parse(own) for name, own in value.items()}

    return parse_each


def betas(value: Any) -> list[float]:
    value = _unbracket(value)
    parts = value.split(",") if isinstance(value, str) else value
    parse = number(0, 1, below=True)
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise ValueError("expected two numbers such as [0.9, 0.999]")
    return [parse(part) for part in parts]


def optional(parse: Parser) -> Parser:
    def parse_optional(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in {"none", "null"}):
            return None
        return parse(value)

    return parse_optional
