"""YAML for recipes: plain values only, and never more work than the length of the text suggests.

A recipe may come from anybody, and YAML can do more than state values: an anchor that is repeated by
aliases lets ten lines stand for billions of values, a tag calls a constructor, and nesting ends in a
`RecursionError`. None of this has a use in a recipe, so it is refused with the line where it stands.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from vimtune.files import read_regular_file
from vimtune.text import printable, quote, shorten

MAX_BYTES = 64 * 2**10
"""Longest text that is parsed; it is more than ten times the longest recipe."""
MAX_DEPTH = 20
"""Deepest nesting of lists and mappings."""

_SCALARS = ("bool", "float", "int", "null")
"""What an unquoted word may stand for beside text; dates and merge keys (`<<`) stay text."""


def _resolvers_of_scalars() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    return {
        start: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in _SCALARS]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class YAMLTextError(ValueError):
    """The text is not YAML of the kind that recipes are written in; `line` counts from 1."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        self.problem = printable(shorten(problem))
        self.line = line
        super().__init__(self.problem)


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, tags and dates, whose keys are scalars that stand there once."""

    yaml_implicit_resolvers = _resolvers_of_scalars()

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose the next node; refuse anchors, aliases, tags and deep nesting."""
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the parser has no types
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _error(event, "anchors (&) and aliases (*) are not allowed; write the value out")
        if event.tag is not None:
            raise _error(event, f"the tag {quote(event.tag)} is not allowed; write the plain value")
        if self._depth == MAX_DEPTH:
            raise _error(event, f"nested more than {MAX_DEPTH} levels deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dict; refuse keys that are no scalars or stand there twice."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(key_node, "a list or a mapping cannot be a key")
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _error(key_node, f"{quote(key)} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node; refuse numbers that Python cannot read."""
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:  # It looks like a number and is none, or has thousands of digits.
            raise _error(node, f"cannot read the number {quote(node.value)}") from error


def _error(place: Any, problem: str) -> yaml.MarkedYAMLError:
    """A problem at an event or a node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: None, bool, int, float, str, and lists and dicts of them.

    Raises:
        YAMLTextError: the text is not YAML, too long, too deep, or uses anchors, aliases or tags.
    """
    if len(text) > MAX_BYTES:
        raise YAMLTextError(f"{len(text):,} characters; at most {MAX_BYTES:,} are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise YAMLTextError(error.problem or str(error), line) from error
    except yaml.reader.ReaderError as error:
        raise YAMLTextError(f"it is not valid YAML: character {error.character:#x} is not allowed") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ValueError: the file cannot be read or does not hold `key: value` lines; the message names file
            and line.
    """
    name = quote(os.fspath(path))
    try:
        text = read_regular_file(path, MAX_BYTES).decode("utf-8")
        values = parse_yaml(text)
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a YAML text file") from error
    except YAMLTextError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise ValueError(f"{name}{line}: {error.problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected 'key: value' lines, got {quote(values)}")
    return values
