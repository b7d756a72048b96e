"""What may be drawn for one option or key, as YAML states it.

That is a value, `{value: ...}`, `{low, high}` with `step` or `log`, or `{choose: [...]}`; all but a plain
value may have `times`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from vimtune import parsers
from vimtune.fields import Option
from vimtune.search.settings import Choice, Fixed, Plain, Range, Setting
from vimtune.text import quote

MAX_CHOICES = 64
"""Most values of a choice."""
_KEYS = ("choose", "high", "log", "low", "step", "times", "value")


def parse_setting(value: Any, option: Option) -> Setting:
    """What may be drawn for an option.

    Args:
        value: as YAML gives it.
        option: what the values are for, and are compared with.

    Raises:
        ValueError: what was expected.
    """
    if not isinstance(value, dict) or not value or not all(key in _KEYS for key in value):
        return Fixed(None, option.parse(value))
    times = value.get("times")
    if times is not None and not isinstance(times, str):
        raise ValueError("times: expected the name of an option or a key")
    setting = _drawable({key: item for key, item in value.items() if key != "times"}, times)
    for end in setting.ends():
        if times is None:
            parsed = option.parse(end)
            if isinstance(setting, Range) and not setting.is_whole and isinstance(parsed, int):
                raise ValueError("expected whole numbers as low and high")
        elif isinstance(end, bool) or not isinstance(end, int | float):
            raise ValueError(f"times: expected numbers to multiply, not {quote(end)}")
    return setting


def _drawable(value: Mapping[str, Any], times: str | None) -> Setting:
    kinds = set(value)
    if kinds == {"value"}:
        return Fixed(times, value["value"])
    if kinds == {"choose"}:
        choices = value["choose"]
        if not isinstance(choices, list) or not 1 <= len(choices) <= MAX_CHOICES:
            raise ValueError(f"choose: expected a list of 1 to {MAX_CHOICES} values")
        if not all(choice is None or isinstance(choice, bool | int | float | str) for choice in choices):
            raise ValueError("choose: expected numbers, words, true, false or null")
        if len({repr(choice) for choice in choices}) < len(choices):
            raise ValueError("choose: expected every value once")
        return Choice(times, cast("tuple[Plain, ...]", tuple(choices)))
    if not {"low", "high"} <= kinds or not kinds <= {"low", "high", "step", "log"}:
        raise ValueError("expected a value, {low, high} with step or log, or {choose: [...]}")
    return _range(value, times)


def _range(value: Mapping[str, Any], times: str | None) -> Range:
    low, high = _number(value["low"]), _number(value["high"])
    log, step = parsers.boolean(value.get("log", False)), value.get("step")
    if low > high:
        raise ValueError(f"expected low <= high, not {low:g} and {high:g}")
    if log and low <= 0:
        raise ValueError("log: expected low > 0")
    if step is not None:
        step = parsers.integer(1)(step)
        if log or not (isinstance(low, int) and isinstance(high, int)) or (high - low) % step:
            raise ValueError("step: expected whole numbers that lead from low to high, without log")
    return Range(times, low, high, step, log)


def _number(value: Any) -> int | float:
    """A number as it is, whole or not; YAML reads 1e-3 as text."""
    found: float = parsers.number()(value)
    return value if isinstance(value, int) else found
