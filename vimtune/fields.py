"""How an option is stated: once, as a documented and typed field of a dataclass.

The components of a recipe, methods and tasks state their options in this way. The annotation of a field is
its type; the parser for values from Python, YAML and flags, and the message that says what was expected,
follow from it. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.parsers import Parser
from vimtune.text import quote, shorten, suggest

Whole = Annotated[int, Ge(0)]
"""A whole number from 0."""
Positive = Annotated[int, Ge(1)]
"""A whole number from 1."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
"""A seed of random numbers."""
Amount = Annotated[float, Ge(0)]
"""A number that is not negative."""
Count = Annotated[int, Ge(1), Le(1024)]
"""A number of things that a model makes room for, such as tokens or states."""
InnerWidth = Annotated[int, Ge(0), Le(4096)]
"""Inner width of a small network beside a model; 0 may stand for none."""
PositiveAmount = Annotated[float, Gt(0)]
"""A number above 0."""
Share = Annotated[float, Ge(0), Lt(1)]
"""A number from 0 to below 1."""

Purpose = Literal["scores", "loss", "run"]
"""What an option of a recipe can be of use for, from the narrowest to the widest: to score a model that is
there, to compute the loss of training batches as well, or to make a whole run."""


def option(
    default: Any,
    help: str,
    *,
    parse: Parser | None = None,
    switch: bool = False,
    purpose: Purpose = "scores",
) -> Any:
    """A documented field of a dataclass of options.

    Args:
        default: value of the field unless it is given; a list or a mapping is copied for each instance.
        help: what it is, in one line for `--help`.
        parse: reads a value where the annotation alone does not say what is right, such as a path.
        switch: whether its flag may stand alone and be negated, as that of a bool, beside having a value.
        purpose: the narrowest thing that it is of use for. Commands that do less neither offer nor take it:
            a value that changes nothing there would be a mistake that nobody notices.
    """
    metadata = {"help": help, "parse": parse, "switch": switch, "purpose": purpose}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What is known about one field that was stated with `option`."""

    name: str
    """Name of the field."""
    annotation: Any
    """Its type with its range, such as Annotated[int, Ge(1)]."""
    default: Any
    """Its value unless it is given."""
    help: str
    """What it is, in one line for `--help`."""
    parse: Parser
    """Returns a value as the field holds it. Raises ValueError("expected ...") for a value that is wrong."""
    switch: bool = False
    """Whether `parse` takes true and false, beside other values."""
    purpose: Purpose = "scores"
    """The narrowest thing that it is of use for."""

    def serves(self, purpose: Purpose) -> bool:
        """Whether it is of use for that, which may be wider than its own purpose."""
        order = get_args(Purpose)
        return order.index(self.purpose) <= order.index(purpose)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name, in the order in which they are stated.

    Raises:
        ValueError: a field was not stated with `option`, or its annotation names something that does not
            exist in its module.
    """
    return _read_options(cls)


@cache
def _read_options(cls: type) -> dict[str, Option]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ValueError(f"class {cls.__name__}: an annotation cannot be read ({error})") from error
    found = {}
    for item in dataclasses.fields(cls):
        if "help" not in item.metadata:
            raise ValueError(
                f"class {cls.__name__}: field {item.name} has no help: expected "
                f'{item.name}: TYPE = option(DEFAULT, "what it is"), with from vimtune import option'
            )
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        parse = item.metadata.get("parse") or parser_of(hints[item.name])
        found[item.name] = Option(
            item.name,
            hints[item.name],
            default,
            item.metadata["help"],
            parse,
            item.metadata.get("switch", False),
            item.metadata.get("purpose", "scores"),
        )
    return found


def option_of_method(method: type, name: str) -> Any:
    """A field that stands for an option of methods outside of them; None where it is not given.

    Type, range and help are those that `method` declares, and like any option of a method it may have a value
    for each of several targets. Other methods may declare the same name in another way; whether a value fits
    the methods that are chosen is their own declarations' business.
    """
    declared = options_of(method)[name]
    parse = parsers.optional(parsers.per_target(declared.parse))
    return option(None, declared.help, parse=parse, purpose="run")


def parser_of(annotation: Any) -> Parser:
    """The parser of a field with this annotation.

    It knows bool, int, float and str, bounds such as Annotated[int, Ge(1)], Literal, dict[str, ...], and
    "| None" of these. Of any other type it checks that the value is one that a file can hold.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType) and type(None) in arguments:
        others = [other for other in arguments if other is not type(None)]
        return parsers.optional(parser_of(Union[tuple(others)]))  # noqa: UP007 - of a tuple
    if origin is Literal:
        return parsers.choice(*arguments)
    simple: dict[Any, Parser] = {
        int: parsers.integer(),
        float: parsers.number(),
        bool: parsers.boolean,
        str: parsers.text,
        dict: parsers.mapping,
    }
    return simple.get(origin or annotation, parsers.plain)


def _bounded(kind: Any, bounds: Iterable[Any]) -> Parser:
    """The parser of Annotated[kind, *bounds]."""
    lower = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    upper = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    above, below = isinstance(lower, Gt), isinstance(upper, Lt)
    limits: dict[str, Any] = {}
    if lower is not None:
        limits["low"] = lower.gt if isinstance(lower, Gt) else lower.ge
    if upper is not None:
        limits["high"] = upper.lt if isinstance(upper, Lt) else upper.le
    if kind is float:
        return parsers.number(**limits, above=above, below=below)
    if kind is int:
        whole = {
            name: limit + above * (name == "low") - below * (name == "high") for name, limit in limits.items()
        }
        return parsers.integer(**whole)
    return parser_of(kind)


def parse_fields(cls: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse values of the options of `cls`; those that are not given have their default.

    Returns:
        (parsed values by name, problems by the name of the option that is wrong).
    """
    parsed, problems = {}, {}
    for name, item in options_of(cls).items():
        value = values.get(name, item.default)
        try:
            parsed[name] = item.parse(value)
        except ValueError as error:
            problems[name] = f"{name} = {quote(value)}: {error}"
    return parsed, problems


AnyOptions = TypeVar("AnyOptions", bound="Options")
"""Any class of options."""


class Options:
    """Base of frozen dataclasses whose fields are options. Building one checks its values."""

    @classmethod
    def build(cls: type[AnyOptions], given: Mapping[str, Any], owner: str) -> AnyOptions:
        """An instance with the given values, of which all have to be options of this class.

        Args:
            given: values by name.
            owner: whose options these are, for messages.

        Raises:
            ValueError: a value that is wrong, or an option that the class does not have.
        """
        known = options_of(cls)
        for name, value in given.items():
            if name not in known:
                raise ValueError(not_an_option(name, value, owner, known))
        return cls(**given)

    @classmethod
    def handed_on_problems(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with options that are handed on to something else, a line each.

        Args:
            values: the parsed values of a recipe's keys, except for those that are wrong.
        """
        return []

    def __post_init__(self) -> None:
        """Parse every field.

        Raises:
            ValueError: all problems, separated by semicolons.
        """
        parsed, problems = parse_fields(type(self), vars(self))
        if problems:
            raise ValueError("; ".join(problems.values()))
        for name, value in parsed.items():
            object.__setattr__(self, name, value)


def not_an_option(name: str, value: Any, owner: str, known: Collection[str]) -> str:
    """The message about an option that `owner`, a method or a task, does not have."""
    fields = f"its fields are {', '.join(sorted(known))}" if known else "it has none"
    return f"{shorten(name)} = {quote(value)} is not a field of {owner}: {fields}.{suggest(name, known)}"
