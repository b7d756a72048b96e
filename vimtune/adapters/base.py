"""What a method is: a registered dataclass of options that says where its rules go and builds them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule
from vimtune.adapters.targets import resolve_targets
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
        raise ValueError(f"unknown method {name!r}.{suggest(name, _METHODS)} Known: {', '.join(_METHODS)}")
    return _METHODS[name]


def method_fields(name: str) -> dict[str, tuple[str, Any, str]]:
    """Fields of a method: name -> (type, default, help)."""
    fields = dataclasses.fields(get_method(name))
    return {item.name: (str(item.type), item.default, item.metadata["help"]) for item in fields}


def build_methods(spec: str, options: dict[str, Any]) -> list[Method]:
    """Methods of a spec such as "lora" or "lora+bitfit".

    With several methods an option goes to every one that has such a field; `{"lora": {...}}` sets
    those of one method alone.

    Raises:
        ValueError: unknown method, unknown option (with a suggestion), or a value out of range.
    """
    names = [name.strip() for name in spec.split("+")]
    if len(set(names)) < len(names):
        raise ValueError(f"method {spec!r} names one method twice")
    classes = [get_method(name) for name in names]
    shared = {key: value for key, value in options.items() if key not in names}
    known = {
        name: {item.name for item in dataclasses.fields(cls)}
        for name, cls in zip(names, classes, strict=True)
    }
    for key in shared:
        if not any(key in fields for fields in known.values()):
            fields = sorted(set().union(*known.values()))
            expected = f"its options are {', '.join(fields)}" if fields else "it has none"
            raise ValueError(f"method {spec!r} has no option {key!r}.{suggest(key, fields)} ({expected})")
    methods = []
    for name, cls in zip(names, classes, strict=True):
        own = {key: value for key, value in shared.items() if key in known[name]} | options.get(name, {})
        unknown = own.keys() - known[name]
        if unknown:
            key = min(unknown)
            raise ValueError(f"method {name!r} has no option {key!r}.{suggest(key, known[name])}")
        methods.append(cls(**own))
    return methods


def check_matrix(method: str, path: str, weight: Tensor, rank: int) -> tuple[int, int]:
    """(out, in) of a weight matrix that takes a rank-`rank` update.

    Raises:
        ValueError: not a matrix, or a rank that is not between 1 and the smaller side.
    """
    if weight.dim() != 2:
        raise ValueError(f"{method} needs a matrix; {path} has shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"rank {rank} does not fit {path} of shape {rows} x {columns}: expected 1 to {min(rows, columns)}"
        )
    return rows, columns
