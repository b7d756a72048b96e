"""Checks of structured data that comes from a file: one schema for each kind of file.

A file may come from anybody, so nothing in it is believed before it was compared with a schema: a
dataclass whose annotations say which fields there are, of which types and in which ranges. The
comparison is pydantic's, in strict mode: no field is guessed, converted, dropped or added. The same
schema is applied when a file is written, so that what we write can be read.

A schema is a plain dataclass with `__pydantic_config__: ClassVar[Any] = STRICT` (Python 3.10 refuses a
bare `ClassVar` there); ranges are written as `Annotated[int, annotated_types.Ge(1)]` or with the types
below.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Le, Len

from vimtune.text import quote

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Schema = TypeVar("Schema")
"""The type with which values are compared."""

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""What a schema class sets as `__pydantic_config__`."""

MAX_TEXT_BYTES = 64 * 2**20
"""Longest JSON text that is parsed; the class names of ImageNet-21k are 1 MiB."""

Count = Annotated[int, Ge(0), Le(2**62)]
"""A whole number of something, such as epochs or images."""
Name = Annotated[str, Len(1, 200)]
"""A short name, such as a model's or a method's."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Code points that JSON can write and UTF-8 cannot."""


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # This comes late, because `--help` reads no files.

    return TypeAdapter(schema)


def check(schema: type[Schema], values: Any, what: str, error: type[ValueError] = ValueError) -> Schema:
    """Return `values` as an instance of `schema`.

    Args:
        schema: a dataclass with `__pydantic_config__ = STRICT`, or any type that pydantic knows.
        values: plain values as JSON has them. What is not Unicode in a text (Python holds a byte of a file
            name that is not UTF-8 as a surrogate) comes out as the text \\udcXX.
        what: the file and the part of it, for the message.
        error: the class of the error.

    Raises:
        ValueError: (or the subclass `error`) the first few places where `values` differ from the schema.
    """
    from pydantic import ValidationError

    adapter: TypeAdapter[Schema] = _adapter(schema)  # type: ignore[arg-type]  # types hash
    try:
        # Through JSON: in strict mode pydantic makes a dataclass out of an object of JSON, not out of a dict.
        text = _SURROGATE.sub(_escape, json.dumps(values, ensure_ascii=False, allow_nan=False))
        return adapter.validate_json(text, strict=True)
    except ValidationError as failure:
        problems = _by_place(failure.errors(include_url=False, include_context=False), json.loads(text))
        # The schema is one value and not the parts of a file.
        if "" in problems and not is_dataclass(schema):
            raise error(f"{what}: {_describe_value(problems[''])}") from None
        shown = "; ".join(_describe(place, problems[place]) for place in list(problems)[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise error(f"{what} does not have the expected form: {shown}{more}") from None
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except TypeError as failure:  # This happens on writing a value that JSON does not have.
        raise error(f"{what} holds what a file cannot: {failure}") from None
    except ValueError as failure:
        raise error(f"{what} holds a number that is not finite: {failure}") from None


def _escape(surrogate: re.Match[str]) -> str:
    return f"\\\\u{ord(surrogate[0]):04x}"


def _by_place(problems: Iterable[Any], values: Any) -> dict[str, list[Any]]:
    """The differences from a schema by their place in `values`, such as "inner.1.rate".

    There may be several at one place: pydantic gives one for each type that the value may have, and puts
    its own name for the type behind the place, which is left out here.
    """
    found: dict[str, list[Any]] = {}
    for problem in problems:
        kept, inner, last = [], values, problem["loc"][-1:]
        for part in problem["loc"]:
            indexed = isinstance(inner, list) and isinstance(part, int) and part < len(inner)
            if indexed or (isinstance(inner, dict) and part in inner):
                inner = inner[part]
            elif part != "[key]" and not (problem["type"] == "missing" and (part,) == last):
                continue
            kept.append(str(part))
        found.setdefault(".".join(kept), []).append(problem)
    return found


def _message(problems: Sequence[Any]) -> str:
    """What was expected at one place."""
    messages = dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in problems)
    first, *others = messages
    return " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])


def _describe(place: str, problems: Sequence[Any]) -> str:
    """The differences from a schema at one place: where it is, what is wrong, what was found."""
    message = _message(problems)
    # The schema class itself raised it, and words it fully.
    if all(problem["type"] == "value_error" for problem in problems):
        return f"{place}: {message}" if place else message
    return f"{place or 'value'}: {message} (found {quote(problems[0]['input'])})"


def _describe_value(problems: Sequence[Any]) -> str:
    """What was expected of a single value, and what was found."""
    expected = re.sub("^Input should be (?=greater|less)", "expected a value ", _message(problems))
    return f"{expected.replace('Input should be', 'expected')} (found {quote(problems[0]['input'])})"


def parse_json(text: str | None, what: str, error: type[ValueError] = ValueError) -> Any:
    """Plain values of a JSON text: no NaN, no infinity, no key twice, not too long, not too deep.

    Raises:
        ValueError: (or the subclass `error`) `text` is None (the file lacks this part) or anything else.
    """
    if text is None:
        raise error(f"{what} is missing")
    _refuse_long(text, what, error)
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except ValueError as failure:
        raise error(f"{what} is not valid JSON: {json_failure(failure)}") from None


def json_failure(failure: ValueError) -> str:
    """Why a text is no JSON, from what Python's parser says."""
    if isinstance(failure, json.JSONDecodeError) and "\n" not in failure.doc:
        # Such a text is a line of a file, whose number there the reader knows.
        return f"{failure.msg} (column {failure.colno})"
    if "set_int_max_str_digits" in str(failure):
        return f"a whole number has more than {sys.get_int_max_str_digits():,} digits"
    return str(failure)


def load_json(
    schema: type[Schema], text: str | None, what: str, error: type[ValueError] = ValueError
) -> Schema:
    """`check(schema, parse_json(text))`."""
    return check(schema, parse_json(text, what, error), what, error)


def dump_json(schema: Any, values: Any, what: str, error: type[ValueError] = ValueError) -> str:
    """The JSON text of `values`, made sure that `load_json` with the same `schema` reads it.

    Raises:
        ValueError: (or the subclass `error`) as `check` does, or the text is too long.
    """
    check(schema, values, what, error)
    text = json.dumps(values)
    _refuse_long(text, what, error)
    return text


def finite_json(values: Any, *, indent: int | None = None) -> str:
    """JSON text of plain values that any parser reads: ASCII, null for what is not finite."""
    return json.dumps(finite_or_none(values), indent=indent, allow_nan=False)


def finite_or_none(value: Any) -> Any:
    """Plain values with None in the place of each number that is not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    return value


def _refuse_long(text: str, what: str, error: type[ValueError]) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise error(f"{what} has {len(text):,} characters; at most {MAX_TEXT_BYTES:,} are read")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the number {name} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {quote(text)} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {quote(twice)} is given twice")
    return found
