"""A rule says which value a parameter effectively has; attaching makes every reader see that value.

Mamba code reads weights (`F.linear(u, self.x_proj.weight)`, fused kernels), so an adapter that only
wraps `forward` is silently dead there. A rule is therefore attached to a *parameter*: the owner
module gets a subclass in which that parameter is a property. Read or called, the result is the same,
and the frozen base parameter keeps its place and its key in `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOTS = "adapters"
"""Name of the child module that holds the rules of a module's parameters."""


class WeightRule(nn.Module):
    """One formula for the effective value of one parameter.

    The parameters of a rule are what its adapter trains. They and the rule's persistent buffers are saved,
    loaded and moved together.
    """

    replaces: ClassVar[bool] = False
    """Whether `effective_weight` ignores the weight that it is given."""

    batchable: ClassVar[bool] = True
    """Whether the formula may be applied to the stacked weights of several layers (`batched.py`).

    It then has to be one that `torch.func.vmap` can take: no control flow that depends on the values of
    tensors, no buffer changed in place. False also where stacking would only copy.
    """

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

    def decays(self, name: str) -> bool:
        """Whether weight decay makes sense for the parameter `name` of this rule: by default for all but
        vectors, which hold scales, magnitudes and biases."""
        return self.get_parameter(name).dim() > 1


class Tuned(WeightRule):
    """The parameter itself is trained: a copy takes its place, the base stays as it was."""

    replaces = True
    batchable = False

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.value


class Chain(WeightRule):
    """Two rules for one parameter: the second one is applied to what the first one makes of the weight.

    Only the second one may act on the input: what the first one then does is no weight that could be handed
    on. `inject` sees to that.
    """

    def __init__(self, first: WeightRule, second: WeightRule) -> None:
        super().__init__()
        self.rules = nn.ModuleList([first, second])

    @property
    def first(self) -> WeightRule:
        return cast(WeightRule, self.rules[0])

    @property
    def second(self) -> WeightRule:
        return cast(WeightRule, self.rules[1])

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.second.effective_weight(self.first.effective_weight(weight))

    @property
    def acts_on_input(self) -> bool:
        return self.second.acts_on_input

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with exact(weight):
            weight = self.first.effective_weight(weight)
        return self.second.linear(x, weight, bias)

    def decays(self, name: str) -> bool:
        _, index, own = name.split(".", 2)
        return cast(WeightRule, self.rules[int(index)]).decays(own)


def acts_on_input_when(rule: WeightRule, training: bool) -> bool:
    """Whether the rule would act on the input in training, or in evaluation; its mode stays as it is."""
    modes = [(module, module.training) for module in rule.modules()]
    rule.train(training)
    try:
        return rule.acts_on_input
    finally:
        for module, mode in modes:
            module.training = mode


def ever_acts_on_input(rule: WeightRule) -> bool:
    """Whether the rule acts on the input in training or in evaluation."""
    return acts_on_input_when(rule, training=True) or acts_on_input_when(rule, training=False)


def exact(weight: Tensor) -> AbstractContextManager[Any]:
    """No autocast: a weight computed in half precision and rounded again differs from the merged one."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which torch raises for on the meta device
        return torch.autocast(device, enabled=False)
    return nullcontext()


@dataclass
class Ahead:
    """The effective value of one weight, computed before anyone reads it (`batched.py`)."""

    weight: Tensor
    """The frozen weight."""
    value: Tensor
    grad_enabled: bool
    """Whether `value` carries a graph if its rule's tensors are trained."""
    rounded: Tensor | None
    """`value` in the dtype of autocast, for the next product alone: autocast casts anew for each
    product, and sums the gradients of several in full precision."""


computed_ahead: ContextVar[dict[WeightRule, Ahead] | None] = ContextVar("computed_ahead", default=None)
"""By rule. Of the present thread, and on no module: copies and state dicts have no part in it."""


def find_ahead(rule: WeightRule, weight: Tensor) -> Ahead | None:
    """What has been computed for this weight under this rule, if that serves here."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    found = (computed_ahead.get() or {}).get(rule)
    if found is None or found.weight is not weight or found.grad_enabled != torch.is_grad_enabled():
        return None
    return found


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
        """The value of `weight` for whoever reads it."""
        rule = self.rule
        if rule is None:
            return weight
        ahead = find_ahead(rule, weight)
        if ahead is not None:
            return ahead.value
        with exact(weight):
            return rule.effective_weight(weight)

    def factor(self, weight: Tensor) -> Tensor:
        """The value of `weight` for one product: under autocast already in its dtype, if at hand."""
        ahead = None if self.rule is None else find_ahead(self.rule, weight)
        if ahead is not None and ahead.rounded is not None:
            device = weight.device.type
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == ahead.rounded.dtype:
                rounded, ahead.rounded = ahead.rounded, None
                return rounded
        return self.effective(weight)


def has_rules(module: nn.Module) -> bool:
    """Whether any parameter of `module` itself has a rule."""
    return SLOTS in module._modules


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module that has rules, by parameter name."""
    return cast(dict[str, Slot], module._modules[SLOTS])


def base_value(module: nn.Module, parameter: str) -> nn.Parameter:
    """The frozen parameter itself, whatever rules it has."""
    parameters = module._parameters
    if parameter not in parameters:  # a replica of DataParallel has tensors as plain attributes instead
        return cast(nn.Parameter, module.__dict__[parameter])
    return cast(nn.Parameter, parameters[parameter])


def _effective_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        return slots_of(module)[name].effective(base_value(module, name))

    def write(module: nn.Module, value: Tensor) -> None:
        if not getattr(module, "_is_replica", False):
            raise AttributeError(f"{name!r} has rules of an adapter; only an nn.Parameter can replace it")
        module.__dict__[name] = value

    return property(read, write, doc=f"effective value of {name!r} under the active adapter")


def _adapted_linear(module: nn.Linear, x: Tensor) -> Tensor:
    slot, weight = slots_of(module)["weight"], base_value(module, "weight")
    rule = slot.rule
    if rule is not None and rule.acts_on_input:
        return rule.linear(x, weight, module.bias)
    return F.linear(x, slot.factor(weight), module.bias)


def is_factor(module: nn.Module, parameter: str) -> bool:
    """Whether `module`, called, multiplies by the effective value of this parameter and no more."""
    return type(module).forward is _adapted_linear and parameter == "weight"


def can_act_on_input(module: nn.Module, parameter: str) -> bool:
    """Whether a rule for this parameter is asked to act on the input: the model calls the module, which
    is a linear layer without a way of its own, and does not declare that it only reads the weight."""
    base = plain_class(module)
    only_read = getattr(base, "weight_is_read", False)
    return parameter == "weight" and base.forward is nn.Linear.forward and not only_read


@cache
def _adapted_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _effective_property(name) for name in names}
    if base.forward is nn.Linear.forward and "weight" in names:
        members["forward"] = _adapted_linear
    members["_unadapted_class"] = base
    members["__reduce_ex__"] = _reduce
    members["__module__"] = base.__module__
    return type(base.__name__, (base,), members)


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """For pickle and copy, which find a class by its name: name the class that the module had before."""
    adapted, base = type(module), plain_class(module)
    build, arguments, *state = cast(tuple[Any, ...], base.__reduce_ex__(module, protocol))
    arguments = tuple(base if argument is adapted else argument for argument in arguments)
    return (_rebuild, (tuple(sorted(slots_of(module))), build, arguments), *state)


def _rebuild(
    names: tuple[str, ...], build: Callable[..., nn.Module], arguments: tuple[Any, ...]
) -> nn.Module:
    """The counterpart of `_reduce`; pickled models refer to it by this name."""
    module = build(*arguments)
    module.__class__ = _adapted_class(type(module), names)  # type: ignore[arg-type]  # classes hash
    return module


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` has without rules."""
    return getattr(type(module), "_unadapted_class", type(module))


def _update_class(module: nn.Module) -> None:
    base = plain_class(module)
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
    rule.to(device=base_value(module, parameter).device).train(module.training)
    slots[parameter][adapter] = rule
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
    return list(_adapted_below("", model, set()))


def _adapted_below(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Unlike `named_modules` this passes by all that is inside rules, half of the modules."""
    if module in seen:
        return
    seen.add(module)
    if has_rules(module):
        yield path, module
    for name, child in module._modules.items():
        if child is not None and name != SLOTS:
            yield from _adapted_below(join(path, name), child, seen)


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
    inside = rule_prefixes(model)
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield name, parameter


def rule_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of all tensors of rules begin with."""
    return tuple(join(path, SLOTS) + "." for path, _ in adapted_modules(model))
