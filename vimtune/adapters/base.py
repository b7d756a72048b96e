"""What a method is: a registered dataclass of options that says where its rules go and builds them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import Tensor, nn
from typing_extensions import TypedDict  # typing's own is not enough for pydantic before Python 3.12

from vimtune.adapters.rule import WeightRule
from vimtune.adapters.targets import resolve_targets
from vimtune.schema import STRICT, check
from vimtune.text import quote
from vimtune.utils import require_summary, suggest

_METHODS: dict[str, type[Method]] = {}


def option(default: Any, help: str) -> Any:
    """A documented field of a method."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Options of one method. Its fields are what `peft_kwargs` takes.

    A subclass states what it trains in `default_targets` (or by overriding `select`) and builds one
    rule per selected parameter. The classification head is trained beside it in any case.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    default_targets: ClassVar[str | tuple[str, ...]] = "both"
    trains_head_only: ClassVar[bool] = False
    """Whether it is meant to select no parameter. Of any other method that is refused as a mistake."""

    def select(
        self, model: nn.Module, targets: str | Sequence[str] | None, layers: Sequence[int] | None
    ) -> list[str]:
        """Paths of the parameters that get a rule."""
        return resolve_targets(model, self.default_targets if targets is None else targets, layers)

    @abstractmethod
    def build_rule(self, path: str, weight: Tensor) -> WeightRule:
        """The rule for the parameter `weight` at `path`.

        Raises:
            ValueError: the options do not fit the shape of `weight`.
        """


MethodType = TypeVar("MethodType", bound=type[Method])


def register_method(name: str) -> Callable[[MethodType], MethodType]:
    """Class decorator: make a method known under `name`.

    Raises:
        ValueError: the class has no summary of its own, or a field without help.
    """

    def register(cls: MethodType) -> MethodType:
        require_summary(cls, f"method {name!r}")
        for item in dataclasses.fields(cls):
            if "help" not in item.metadata:
                raise ValueError(f"method {name!r}: field {item.name} needs option(default, help)")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def list_methods() -> list[str]:
    """Names of all methods."""
    return list(_METHODS)


def get_method(name: str) -> type[Method]:
    """Class of a method.

    Raises:
        ValueError: unknown name.
    """
    if name not in _METHODS:
        known = ", ".join(_METHODS)
        raise ValueError(f"unknown method {quote(name)}.{suggest(name, _METHODS)} Known: {known}")
    return _METHODS[name]


def method_fields(name: str) -> dict[str, tuple[str, Any, str]]:
    """Fields of a method: name -> (type, default, help)."""
    fields = dataclasses.fields(get_method(name))
    return {item.name: (str(item.type), item.default, item.metadata["help"]) for item in fields}


def method_names(spec: str) -> list[str]:
    """Names of the methods of a spec such as "lora" or "lora+bitfit".

    Raises:
        ValueError: not such a text, unknown method, or one method twice.
    """
    if not isinstance(spec, str):
        raise ValueError(f"method = {quote(spec)}: expected the name of a method: {', '.join(_METHODS)}")
    names = [name.strip() for name in spec.split("+")]
    for name in names:
        get_method(name)
    if len(set(names)) < len(names):
        raise ValueError(f"method {spec!r} names one method twice")
    return names


def split_options(spec: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The given options of each method of a spec: method -> field -> value.

    With several methods an option goes to every one that has such a field; `{"lora": {...}}` sets
    those of one method alone.

    Raises:
        ValueError: unknown method, or unknown option (with a suggestion).
    """
    names = method_names(spec)
    known = {name: {item.name for item in dataclasses.fields(get_method(name))} for name in names}
    shared = {key: value for key, value in options.items() if key not in names}
    for key in shared:
        if not any(key in fields for fields in known.values()):
            anywhere = sorted(set().union(*known.values()))
            expected = f"its options are {', '.join(anywhere)}" if anywhere else "it has none"
            hint = suggest(str(key), anywhere)
            raise ValueError(f"method {spec!r} has no option {quote(key)}.{hint} ({expected})")
    split = {}
    for name, fields in known.items():
        own = options.get(name, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"options of method {name!r} are {quote(own)}: expected a mapping of its fields")
        for key in own:
            if key not in fields:
                raise ValueError(f"method {name!r} has no option {quote(key)}.{suggest(str(key), fields)}")
        split[name] = {key: value for key, value in shared.items() if key in fields} | {**own}
    return split


def resolve_options(spec: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every field of each method of a spec, defaults included: method -> field -> value.

    Raises:
        ValueError: unknown method or option, or a value of another type than the field's annotation.
    """
    resolved = {}
    for name, given in split_options(spec, options).items():
        types = _option_types(get_method(name))
        own = {item.name: item.default for item in dataclasses.fields(get_method(name))}
        for key, value in given.items():
            own |= check(types, {key: value}, f"option {key} of method {name!r}")
        resolved[name] = own
    return resolved


@cache
def _option_types(method: type[Method]) -> Any:
    """Schema of the options of a method: the annotations of its fields."""
    hints = get_type_hints(method, include_extras=True)
    fields = {item.name: hints[item.name] for item in dataclasses.fields(method)}
    schema = TypedDict(f"{method.__name__}Options", fields, total=False)  # type: ignore[misc]
    schema.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return schema


def build_methods(spec: str, options: Mapping[str, Any]) -> list[Method]:
    """Methods of a spec such as "lora" or "lora+bitfit", with the options of `split_options`.

    Raises:
        ValueError: unknown method, unknown option (with a suggestion), or a value of another type or
            out of range.
    """
    return [get_method(name)(**own) for name, own in resolve_options(spec, options).items()]


def check_matrix(method: str, path: str, weight: Tensor, rank: int) -> tuple[int, int]:
    """(out, in) of a weight matrix that takes a rank-`rank` update.

    Raises:
        ValueError: not a matrix, or a rank that is not between 1 and the smaller side.
    """
    if weight.dim() != 2:
        raise ValueError(f"{method} needs a matrix; {path} has shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        largest = min(rows, columns)
        raise ValueError(
            f"rank {quote(rank)} does not fit {path} of shape {rows} x {columns}: expected 1 to {largest}"
        )
    return rows, columns
