"""What comes from a file is compared with a schema, and nothing in it is converted, dropped or run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import pytest
from annotated_types import Ge

from vimtune.schema import STRICT, As, Count, Name, check, dump_json, load_json, parse_json


class FileError(ValueError):
    pass


@dataclass
class Inner:
    __pydantic_config__: ClassVar = STRICT
    rate: Annotated[float, Ge(0)]


@dataclass
class Outer:
    __pydantic_config__: ClassVar = STRICT
    name: Name
    count: Count = 0
    inner: list[Inner] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def test_values_that_fit_become_an_instance_with_its_parts():
    found = check(Outer, {"name": "a", "inner": [{"rate": 1}], "options": {"b": [1, None]}}, "file.x")
    assert found == Outer("a", 0, [Inner(1.0)], {"b": [1, None]})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "count": True}, "count"),
        ({"name": "a", "count": "3"}, "count"),
        ({"name": "a", "count": -1}, "count"),
        ({"name": "a", "count": 2**70}, "count"),
        ({"name": ""}, "name"),
        ({"count": 1}, "name"),
        ({"name": "a", "nmae": "b"}, "nmae"),
        ({"name": "a", "inner": [{"rate": 1.0}, {"rate": -1.0}]}, "inner.1.rate"),
        ({"name": "a", "inner": [{"rate": math.nan}]}, "not finite"),
        ({"name": "a", "options": {"x": math.inf}}, "not finite"),
        ({"name": "a", "options": {"x": {1, 2}}}, "what a file cannot"),
        ([], "value"),
        (None, "value"),
    ],
)
def test_anything_else_is_one_line_that_names_file_and_place(values, words):
    with pytest.raises(FileError) as caught:
        check(Outer, values, "file.x", FileError)
    message = str(caught.value)
    assert message.startswith("file.x ") and words in message and "\n" not in message and len(message) < 900


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ("nothing", "not valid JSON"),
        (None, "missing"),
    ],
)
def test_json_that_is_not_plain_is_refused(text, words):
    with pytest.raises(FileError, match=words):
        parse_json(text, "file.x", FileError)


def test_a_nested_value_that_python_can_parse_but_no_schema_takes():
    text = '{"name": "a", "count": ' + "[" * 500 + "]" * 500 + "}"
    with pytest.raises(FileError):
        load_json(Outer, text, "file.x", FileError)


def test_text_that_json_cannot_hold():
    with pytest.raises(FileError, match=r"^file.x holds text that is not Unicode"):
        check(str, "\udc80", "file.x", FileError)


@dataclass
class Open:
    __pydantic_config__: ClassVar = STRICT
    values: Annotated[dict[str, Any], As(dict[str, int])]


def test_a_schema_for_a_plain_dict():
    assert check(Open, {"values": {"a": 1}}, "file.x").values == {"a": 1}
    with pytest.raises(ValueError, match=r"values\.a"):
        check(Open, {"values": {"a": "1"}}, "file.x")


def test_what_is_written_is_what_is_read():
    text = dump_json(Open, {"values": {"a": 1}}, "file.x")
    assert load_json(Open, text, "file.x") == Open({"a": 1})
    with pytest.raises(FileError, match=r"values\.a"):
        dump_json(Open, {"values": {"a": None}}, "file.x", FileError)
