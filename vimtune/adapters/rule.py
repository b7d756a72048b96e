"""A rule says which value a parameter effectively has; attaching makes every reader see that value.

Mamba code reads weights (`F.linear(u, self.x_proj.weight)`, fused kernels), so an adapter that only
wraps `forward` is silently dead there. A rule is therefore attached to a *parameter*: the owner
module gets a subclass in which that parameter is a property. Read or called, the result is the same,
and the frozen base parameter keeps its place and its key in `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = "adapters"
"""Name of the child module that holds the rules of a module's parameters."""


class WeightRule(nn.Module):
    """One formula for the effective value of one parameter."""

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The value that takes the place of the frozen `weight`; may have another shape (heads)."""
        raise NotImplementedError

    @property
    def acts_on_input(self) -> bool:
        """Whether the rule does, at present, what no weight can express (dropout on the input).

        Linear layers then call `linear` in place of multiplying by the effective weight.
        """
        return False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output (..., out) for `x` (..., in) where `acts_on_input`."""
        raise NotImplementedError


class Tuned(WeightRule):
    """The parameter itself is trained: a copy takes its place, the base stays as it was."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.value


class Chain(WeightRule):
    """Several rules for one parameter, applied one after the other."""

    def __init__(self, *rules: WeightRule) -> None:
        super().__init__()
        self.rules = nn.ModuleList(rules)

    def effective_weight(self, weight: Tensor) -> Tensor:
        for rule in self.rules:
            weight = cast(WeightRule, rule).effective_weight(weight)
        return weight


def exact(weight: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a weight computed in half precision and rounded again differs from the merged one."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.autocast(weight.device.type, enabled=False)
    return nullcontext()


class Slot(nn.ModuleDict):
    """The rules of all named adapters for one parameter; at most one of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    @property
    def rule(self) -> WeightRule | None:
        """The rule in force, if any."""
        if self.active is None or self.active not in self:
            return None
        return cast(WeightRule, self[self.active])

    def effective(self, weight: Tensor) -> Tensor:
        rule = self.rule
        if rule is None:
            return weight
        with exact(weight):
            return rule.effective_weight(weight)


def has_rules(module: nn.Module) -> bool:
    """Whether any parameter of `module` itself has a rule."""
    return SLOTS in module._modules


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module that has rules, by parameter name."""
    return cast(dict[str, Slot], module._modules[SLOTS])


def base_value(module: nn.Module, parameter: str) -> nn.Parameter:
    """The frozen parameter itself, whatever rules it has."""
    return cast(nn.Parameter, module._parameters[parameter])


def _effective_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        return slots_of(module)[name].effective(base_value(module, name))

    return property(read, doc=f"effective value of {name!r} under the active adapter")


def _adapted_linear(module: nn.Linear, x: Tensor) -> Tensor:
    slot, weight = slots_of(module)["weight"], base_value(module, "weight")
    rule = slot.rule
    if rule is not None and rule.acts_on_input:
        return rule.linear(x, weight, module.bias)
    return F.linear(x, slot.effective(weight), module.bias)


@cache
def _adapted_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _effective_property(name) for name in names}
    if base.forward is nn.Linear.forward and "weight" in names:
        members["forward"] = _adapted_linear
    members["_unadapted_class"] = base
    members["__module__"] = base.__module__
    return type(base.__name__, (base,), members)


def _update_class(module: nn.Module) -> None:
    base: type[nn.Module] = getattr(type(module), "_unadapted_class", type(module))
    if has_rules(module):
        base = _adapted_class(base, tuple(sorted(slots_of(module))))  # type: ignore[arg-type]  # classes hash
    module.__class__ = base


def attach(module: nn.Module, parameter: str, adapter: str, rule: WeightRule) -> None:
    """Give `module.<parameter>` a rule under the name of an adapter; inactive at first."""
    if not has_rules(module):
        module.add_module(SLOTS, nn.ModuleDict())
    slots = slots_of(module)
    if parameter not in slots:
        slots[parameter] = Slot()
    slot = slots[parameter]
    rule.to(device=base_value(module, parameter).device).train(module.training)
    slot[adapter] = Chain(cast(WeightRule, slot[adapter]), rule) if adapter in slot else rule
    _update_class(module)


def detach(module: nn.Module, adapter: str) -> None:
    """Remove an adapter's rules from `module`, and the mechanism itself after the last one."""
    slots = slots_of(module)
    for parameter in list(slots):
        if adapter in slots[parameter]:
            del slots[parameter][adapter]
        if not slots[parameter]:
            del slots[parameter]
    if not slots:
        del module._modules[SLOTS]
    _update_class(module)


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module with rules."""
    return [(path, module) for path, module in model.named_modules() if has_rules(module)]


def iter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Slot]]:
    """(parameter path, owner, parameter name, slot) of every parameter with rules."""
    for path, module in adapted_modules(model):
        for parameter, slot in slots_of(module).items():
            yield join(path, parameter), module, parameter, slot


def join(path: str, name: str) -> str:
    """Dotted path of `name` below `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the frozen base: what `named_parameters` gives without the rules' own."""
    inside = tuple(join(path, SLOTS) + "." for path, _ in adapted_modules(model))
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield name, parameter
