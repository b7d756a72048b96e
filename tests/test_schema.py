"""What comes from a file is compared with a schema, and nothing in it is converted, dropped or run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge

from vimtune.schema import STRICT, Count, Name, check, dump_json, load_json, parse_json


class FileError(ValueError):
    pass


@dataclass
class Inner:
    __pydantic_config__: ClassVar[Any] = STRICT
    rate: Annotated[float, Ge(0)]


@dataclass
class Outer:
    __pydantic_config__: ClassVar[Any] = STRICT
    name: Name
    count: Count = 0
    inner: list[Inner] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def test_values_that_fit_become_an_instance_with_its_parts():
    found = check(Outer, {"name": "a", "inner": [{"rate": 1}], "options": {"b": [1, None]}}, "file.x")
    assert found == Outer("a", 0, [Inner(1.0)], {"b": [1, None]})


@pytest.mark.parametrize("value", ["3", True, 3.5, None])
def test_plain_types_are_not_converted_either(value):
    with pytest.raises(ValueError, match=r"valid integer"):
        check(int, value, "an option")
    assert check(Annotated[float, Ge(0)], 3, "an option") == 3.0


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
        ("9" * 5000, r"not valid JSON: a whole number has more than 4,300 digits$"),
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


def test_text_that_is_not_unicode_comes_out_escaped():
    found = check(dict, {"caf\udce9": ["\udcff", "é😀", "\\ud800"]}, "file.x")
    assert found == {r"caf\udce9": [r"\udcff", "é😀", r"\ud800"]}


def test_a_single_value_is_told_what_is_expected():
    with pytest.raises(ValueError) as caught:
        check(Annotated[int, Ge(2)], 1, "species=1")
    assert str(caught.value) == "species=1: expected a value greater than or equal to 2 (found 1)"
    with pytest.raises(ValueError, match=r"^rank='x': expected a valid integer"):
        check(int, "x", "rank='x'")


@dataclass
class Either:
    __pydantic_config__: ClassVar[Any] = STRICT
    one: Count | Literal["auto"]
    many: list[bool | int | Name] = field(default_factory=list)
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"one": "x"}, "one: Input should be a valid integer or 'auto' (found 'x')"),
        ({"one": 1, "many": [1, None]}, "many.1: Input should be a valid boolean or a valid integer or "),
        ({"one": 1, "inner": {}}, "inner.rate: Field required (found {})"),
        ({"many": []}, "one: Field required"),
    ],
)
def test_types_among_which_a_value_may_choose_are_no_places(values, expected):
    with pytest.raises(ValueError) as caught:
        check(Either, values, "file.x")
    assert str(caught.value).startswith(f"file.x does not have the expected form: {expected}")
    with pytest.raises(ValueError, match=r"^a: expected a valid integer or a valid string \(found None\)$"):
        check(int | str, None, "a")


@dataclass
class Range:
    __pydantic_config__: ClassVar[Any] = STRICT
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")


@pytest.mark.parametrize(("schema", "place"), [(Range, ""), (list[Range], "0: ")])
def test_a_schema_may_word_what_its_fields_have_to_do_with_each_other(schema, place):
    values = {"low": 2, "high": 1}
    with pytest.raises(ValueError) as caught:
        check(schema, values if schema is Range else [values], "file.x")
    assert str(caught.value) == (f"file.x does not have the expected form: {place}low = 2 is above high = 1")


def test_what_is_written_is_what_is_read():
    text = dump_json(Outer, {"name": "a", "options": {"b": 1}}, "file.x")
    assert load_json(Outer, text, "file.x") == Outer("a", options={"b": 1})
    with pytest.raises(FileError, match="name"):
        dump_json(Outer, {"name": None}, "file.x", FileError)
