"""What a type of HF peft needs to be translated: the schema of its configuration, and the way to and fro.

An adapter of HF peft is a folder with `adapter_config.json` and `adapter_model.safetensors`. The tensors have
keys such as "base_model.model.layers.0.mixer.in_proj.lora_A.weight": the path of an adapted module, then the
name of a tensor, which the type knows. Both files may come from anybody: the configuration is compared with a
schema in which settings that have no counterpart here can only be off.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le, Len
from torch import Tensor, nn

from vimtune.adapters import WeightRule
from vimtune.schema import STRICT
from vimtune.text import quote

ModulePath = Annotated[str, Len(1, 1000)]
"""Path of a module, or a part of one."""
Text = Annotated[str, Len(0, 1000)]
"""A text of moderate length."""
Size = Annotated[int, Ge(1), Le(2**20)]
"""A rank, or the side of a block."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The settings that all types have. What they leave open the tensors of the file decide."""

    __pydantic_config__ = STRICT

    peft_type: Text
    """The type."""
    target_modules: list[ModulePath] | ModulePath
    """The adapted modules, by the ends of their paths, or by a regular expression. The tensors say here which
    modules are meant; `compare_targets` compares them with it."""
    peft_version: Text | None = None
    """Version of HF peft that wrote the file."""
    base_model_name_or_path: Text | None = None
    """Name of the base model, for whoever looks for it."""
    revision: Text | None = None
    """Its revision."""
    task_type: Text | None = None
    """What it is used for."""
    inference_mode: bool = True
    """Whether the adapter is read to be used and not to be trained further."""
    auto_mapping: dict[Text, Any] | None = None
    """Class of the base model."""
    modules_to_save: list[ModulePath] | None = None
    """Modules that are trained as a whole: here the classification head."""
    exclude_modules: list[ModulePath] | ModulePath | None = None
    """Modules that `target_modules` does not mean."""
    layers_to_transform: list[int] | int | None = None
    """Blocks that `target_modules` means."""
    layers_pattern: list[ModulePath] | ModulePath | None = None
    """How paths name blocks."""
    fan_in_fan_out: Literal[False] = False
    """Whether weights are stored (in, out), which they never are in models that are adapted here."""
    bias: Literal["none"] = "none"
    """Which biases are trained."""


Pattern = Annotated[str, Len(1, 1000)]
"""End of a module's path, for which a setting holds."""
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+")
"""What is taken for such an end; HF peft allows regular expressions."""


def by_pattern(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of a setting for a module, where HF peft has it by the ends of paths.

    Args:
        values: the value by the end of a path; "^" means the whole path. The first one that fits holds.
        path: that of the module.
        default: the value where nothing fits.

    Raises:
        ValueError: a regular expression, of which none is run here.
    """
    for pattern, value in values.items():
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise ValueError(
                f"the pattern {quote(pattern)} is a regular expression: expected the end of the path of a "
                "module; write out the modules that it means"
            )
        name = pattern.removeprefix("^")
        if path == name or (name == pattern and path.endswith(f".{name}")):
            return value
    return default


@dataclass(frozen=True)
class AdaptedModule:
    """A module whose weight has a rule, on its way to a file."""

    path: str
    """Path of the module."""
    module: nn.Module
    """The module."""
    weight: Tensor
    """Its frozen weight."""
    rule: WeightRule
    """What changes the weight; a composition where several rules do."""


@dataclass(frozen=True)
class GivenModule:
    """A module for which a file has tensors."""

    path: str
    """Path of the module."""
    module: nn.Module
    """The module of the model at hand."""
    tensors: Mapping[str, Tensor]
    """The tensors of the file by their names behind the path."""


@dataclass(frozen=True)
class Written:
    """What a file is to hold."""

    settings: Mapping[str, Any]
    """Settings of the type."""
    tensors: Mapping[str, Tensor]
    """Tensors by path of the module and name."""


@dataclass(frozen=True)
class Translated:
    """What a file means here."""

    method: str
    """The method."""
    options: Mapping[str, Mapping[str, Any]]
    """Its options by the path of the module, those of all modules being the same fields."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """The tensors of the rules by path of the module and name."""


class PeftForm(ABC):
    """One type of HF peft."""

    config: ClassVar[type[PeftConfig]]
    """The schema of its configuration."""
    names: ClassVar[Sequence[str]]
    """What its tensors are called behind the path of a module."""

    @abstractmethod
    def write(self, modules: Sequence[AdaptedModule]) -> Written:
        """Translate the rules of an adapter.

        Raises:
            ValueError: a rule that the type cannot express; the message names the module.
        """

    @abstractmethod
    def read(self, config: Any, modules: Sequence[GivenModule]) -> Translated:
        """Translate a file.

        Args:
            config: an instance of `config`.
            modules: what the file adapts.

        Raises:
            ValueError: tensors that do not belong together, or settings that no method here has.
        """


def demand_names(given: GivenModule, *names: str) -> list[Tensor]:
    """The tensors of a module by these names, and no others.

    Raises:
        ValueError: others, or one is missing.
    """
    if set(given.tensors) != set(names):
        raise ValueError(
            f"{given.path} has the tensors {', '.join(sorted(given.tensors))}: expected {', '.join(names)}"
        )
    return [given.tensors[name] for name in names]


def refuse_kind(path: str, module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raise ValueError for a module of a class for which the type has no form."""
    if not isinstance(module, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path} is a {type(module).__name__}: this type of HF peft has {expected}")


def refuse_single(adapted: AdaptedModule, kind: type[WeightRule]) -> Any:
    """The rule of a module, which has to be of one class alone.

    Raises:
        ValueError: it is another rule, or one for some rows.
    """
    if type(adapted.rule) is not kind:
        raise ValueError(
            f"{adapted.path} has a {type(adapted.rule).__name__}, and this type of HF peft has one "
            f"{kind.__name__} for the whole weight: adapt whole weights, or merge the adapter"
        )
    return adapted.rule
