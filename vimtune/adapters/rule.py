"""A rule says which value a parameter effectively has; attaching makes every reader see that value.

Mamba code reads weights (`F.linear(u, self.x_proj.weight)`, fused kernels), so an adapter that only
wraps `forward` is silently dead there. A rule is therefore attached to a *parameter*: the owner
module gets a subclass in which that parameter is a property. Read or called, the result is the same,
and the frozen base parameter keeps its place and its key in `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

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

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear` with the effective weight. Rules override it where a factored form is faster."""
        return F.linear(x, self.effective_weight(weight), bias)


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
            weight = rule.effective_weight(weight)
        return weight


class Slot(nn.ModuleDict):
    """The rules of all named adapters for one parameter; at most one of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    @property
    def rule(self) -> WeightRule | None:
        """The rule in force, if any."""
        return self[self.active] if self.active is not None and self.active in self else None

    def effective(self, weight: Tensor) -> Tensor:
        rule = self.rule
        if rule is None:
            return weight
        if torch.is_autocast_enabled(weight.device.type):
            # A weight rounded twice would differ from the merged one.
            with torch.autocast(weight.device.type, enabled=False):
                return rule.effective_weight(weight)
        return rule.effective_weight(weight)


def _effective_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        return module._modules[SLOTS][name].effective(module._parameters[name])

    return property(read, doc=f"effective value of {name!r} under the active adapter")


def _adapted_linear(module: nn.Linear, x: Tensor) -> Tensor:
    weight = module._parameters["weight"]
    rule = module._modules[SLOTS]["weight"].rule
    return F.linear(x, weight, module.bias) if rule is None else rule.linear(x, weight, module.bias)


@cache
def _adapted_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _effective_property(name) for name in names}
    if base.forward is nn.Linear.forward and "weight" in names:
        members["forward"] = _adapted_linear
    members["_unadapted_class"] = base
    members["__module__"] = base.__module__
    return type(base.__name__, (base,), members)


def _update_class(module: nn.Module) -> None:
    base = getattr(type(module), "_unadapted_class", type(module))
    slots = module._modules.get(SLOTS)
    module.__class__ = _adapted_class(base, tuple(sorted(slots))) if slots else base


def attach(module: nn.Module, parameter: str, adapter: str, rule: WeightRule) -> None:
    """Give `module.<parameter>` a rule under the name of an adapter; inactive at first."""
    base = module._parameters[parameter]
    assert base is not None
    if SLOTS not in module._modules:
        module.add_module(SLOTS, nn.ModuleDict())
    slots = module._modules[SLOTS]
    if parameter not in slots:
        slots[parameter] = Slot()
    slot = slots[parameter]
    rule.to(device=base.device).train(module.training)
    slot[adapter] = Chain(slot[adapter], rule) if adapter in slot else rule
    _update_class(module)


def detach(module: nn.Module, adapter: str) -> None:
    """Remove an adapter's rules from `module`, and the mechanism itself after the last one."""
    slots = module._modules[SLOTS]
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


def has_rules(module: nn.Module) -> bool:
    """Whether any parameter of `module` itself has a rule."""
    return SLOTS in module._modules


def iter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Slot]]:
    """(parameter path, owner, parameter name, slot) of every parameter with rules."""
    for path, module in adapted_modules(model):
        for parameter, slot in module._modules[SLOTS].items():
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
