"""How a model comes to see the rules of its adapters.

A rule is attached to a parameter or to a call of one module. The module gets a subclass in which that
parameter is a property and that call a method of the subclass. Read or called, the effect is the same; the
frozen base parameter keeps its place and its key in `state_dict()`, and a module without rules is exactly
what it was.

The rules of a module lie in its child "adapters", by the name of the parameter ("weight") or the call
("scan()"), and below that by the name of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from vimtune.adapters.parts import TextPart
from vimtune.adapters.rule import CallRule, Rule, WeightRule, exact

SLOTS = "adapters"
"""Name of the child module that holds the rules of a module."""
CALL = "()"
"""What the name of a call ends with, to tell it from a parameter: "scan()"."""


class Stack(NamedTuple):
    """Effective values of several weights that were computed together."""

    values: Tensor
    """The values, one behind the other in the first dimension."""
    rounded: Tensor | None
    """The same in the dtype of autocast, where products will ask for it."""


@dataclass
class Ahead:
    """The effective value of one weight, computed before anyone reads it (`batched.py`)."""

    weight: Tensor
    """The frozen weight."""
    value: Tensor
    """What its rule makes of it."""
    grad_enabled: bool
    """Whether `value` carries a graph if its rule's tensors are trained."""
    rounded: Tensor | None
    """`value` in the dtype of autocast, for the next product alone: autocast casts anew for each
    product, and sums the gradients of several in full precision."""
    stack: Stack
    """Where `value` lies."""
    place: int
    """At which place."""


computed_ahead: ContextVar[dict[WeightRule, Ahead] | None] = ContextVar("computed_ahead", default=None)
"""Values computed ahead, by rule. They belong to the present thread and lie on no module, so that copies and
state dicts have no part in them."""


class Choice:
    """Which adapter acts in one call of a model, whatever adapter is the active one (`mixing.py`).

    It holds in the thread that makes the call, and for the slots of that model alone.
    """

    def __init__(
        self, model: nn.Module, slots: Collection[Slot], adapter: str | None, surrounds_calls: bool
    ) -> None:
        """Choose one adapter.

        Args:
            model: the model, no wrapper.
            slots: its slots.
            adapter: its name; None for the plain model.
            surrounds_calls: whether it has rules for calls.
        """
        self.model = model
        self.slots = slots
        self.adapter = adapter
        self.surrounds_calls = surrounds_calls

    def rules(self, slot: Slot) -> list[Any]:
        """The rules of a slot whose effective values are needed."""
        return [slot[self.adapter]] if self.adapter is not None and self.adapter in slot else []

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor | None:
        """What a linear layer with rules gives for x; None if it is what a single rule makes of it."""
        return None


choice: ContextVar[Choice | None] = ContextVar("choice", default=None)
"""The choice in force in the present thread."""


def choice_to_follow() -> Choice | None:
    """The choice in force for what a model computes now.

    What is recorded follows none: it has to stand for later computations, and torch.compile cannot read a
    ContextVar before torch 2.14.
    """
    return None if is_recorded() else choice.get()


def choice_for(slot: Slot) -> Choice | None:
    """The choice in force, if it concerns a slot."""
    found = choice_to_follow()
    return found if found is not None and slot in found.slots else None


def refuse_within_choice(model: nn.Module) -> None:
    """Refuse what changes adapters where the present thread has chosen one for itself: it would see the rules
    of that one, whatever adapter is active.

    Raises:
        ValueError: such a choice is in force for the model.
    """
    chosen = choice.get()
    if chosen is not None and chosen.model is model:
        raise ValueError(
            f"adapters do not change within `using`, which has chosen {chosen.adapter!r} for this thread: "
            "end its block first"
        )


def is_recorded() -> bool:
    """Whether the present computation is being compiled, exported or traced, and so has to stand for later
    ones."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())


def find_ahead(rule: WeightRule, weight: Tensor) -> Ahead | None:
    """What has been computed for this weight under this rule, if that serves here."""
    if is_recorded():
        return None
    found = (computed_ahead.get() or {}).get(rule)
    if found is None or found.weight is not weight or found.grad_enabled != torch.is_grad_enabled():
        return None
    return found


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Within the block `module` and all below it are in evaluation mode."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


class Slot(nn.ModuleDict):
    """The rules of all named adapters at one point; at most one of them is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None

    @property
    def rule(self) -> Any:
        """The `Rule` in force; None if there is none."""
        chosen = choice_for(self)
        name = self.active if chosen is None else chosen.adapter
        if name is None or name not in self:
            return None
        return self[name]

    @property
    def rules_in_force(self) -> list[Any]:
        """The rules of which the present call needs the effective values: several where it mixes adapters."""
        chosen = choice_for(self)
        if chosen is not None:
            return chosen.rules(self)
        return [] if self.rule is None else [self.rule]


class WeightSlot(Slot):
    """The slot of a parameter; its rules are `WeightRule`s.

    Called without arguments it gives the effective value of its parameter. Tracing by torch.fx records this
    call (`WeightSlot` is a leaf for timm's tracer): an access to the parameter would be recorded as one to
    its name, under which the traced module finds the effective value, and the rules would be applied twice.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.place = (owner, name)

    def forward(self) -> Tensor:
        """The effective value of the parameter."""
        if is_fx_symbolic_tracing():
            raise NotImplementedError(
                "this way of torch.fx tracing looks into the rules of adapters and would record them "
                "wrongly: trace with timm.models.create_feature_extractor, or merge the adapter first"
            )
        return self.effective(base_value(*self.place))

    def effective(self, weight: Tensor) -> Tensor:
        """The value of `weight` for whoever reads it."""
        return self.effective_under(self.rule, weight)

    @staticmethod
    def effective_under(rule: WeightRule | None, weight: Tensor) -> Tensor:
        """The value of `weight` under a rule, if there is one."""
        if rule is None:
            return weight
        ahead = find_ahead(rule, weight)
        if ahead is not None:
            return ahead.value
        with exact(weight):
            return rule.effective_weight(weight)

    @torch.no_grad()
    def evaluated(self, weight: Tensor, adapter: str | None = None) -> Tensor:
        """The value of `weight` in evaluation, whatever mode the rule is in; detached.

        Args:
            weight: the frozen weight.
            adapter: under which adapter, which has a rule here; under the rule in force if None.
        """
        rule = self.rule if adapter is None else self[adapter]
        with in_evaluation(self):
            return self.effective_under(cast("WeightRule | None", rule), weight)

    def factor(self, weight: Tensor) -> Tensor:
        """The value of `weight` for one product: under autocast already in its dtype, if at hand."""
        ahead = None if self.rule is None else find_ahead(self.rule, weight)
        if ahead is not None and ahead.rounded is not None:
            device = weight.device.type
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == ahead.rounded.dtype:
                rounded, ahead.rounded = ahead.rounded, None
                return rounded
        return self.effective(weight)


class CallSlot(Slot):
    """The slot of a call; its rules are `CallRule`s."""

    def run(
        self, call: Callable[[Any], Any], x: Any, *flow: dict[str, Tensor], part: TextPart | None = None
    ) -> Any:
        """`call(x)` under the rule in force; `part` says where `x` is not a whole text without padding."""
        rule: CallRule | None = self.rule
        if rule is None:
            return call(x)
        return rule.around(call, x, *flow) if part is None else rule.around_part(call, x, part, *flow)


def has_rules(module: nn.Module) -> bool:
    """Whether `module` itself has a rule, for a parameter or a call."""
    return SLOTS in module._modules


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module that has rules, by name of the parameter or call."""
    return cast(dict[str, Slot], module._modules[SLOTS])


def base_value(module: nn.Module, parameter: str) -> nn.Parameter:
    """The frozen parameter itself, whatever rules it has."""
    parameters = module._parameters
    if parameter not in parameters:  # A replica of DataParallel has tensors as plain attributes instead.
        return cast(nn.Parameter, module.__dict__[parameter])
    return cast(nn.Parameter, parameters[parameter])


# --- the subclass


def _effective_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        slot = cast(WeightSlot, slots_of(module)[name])
        if is_fx_symbolic_tracing():
            return cast(Tensor, slot())
        return slot.effective(base_value(module, name))

    def write(module: nn.Module, value: Tensor) -> None:
        if not getattr(module, "_is_replica", False):
            raise AttributeError(f"{name!r} has rules of an adapter; only an nn.Parameter can replace it")
        module.__dict__[name] = value

    return property(read, write, doc=f"effective value of {name!r} under the active adapter")


def _adapted_linear(module: nn.Linear, x: Tensor) -> Tensor:
    slot, weight = cast(WeightSlot, slots_of(module)["weight"]), base_value(module, "weight")
    chosen = choice_for(slot)
    if chosen is not None and (mixed := chosen.product(module, x)) is not None:
        return mixed
    result = F.linear(x, slot.factor(weight), module.bias)
    rule: WeightRule | None = slot.rule
    if rule is not None and rule.training and rule.perturbs:
        result = result + rule.perturbation(x, weight)
    return result


def _adapted_call(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """The method that takes the place of `plain`, whose slot is called `name`."""
    if name == "forward" + CALL:

        def forward(module: nn.Module, x: Any) -> Any:
            slot = cast(CallSlot, slots_of(module)[name])
            return slot.run(lambda changed: plain(module, changed), x)

        return forward

    def call(
        module: nn.Module, x: Any, flow: dict[str, Tensor] | None = None, *rest: Any, **options: Any
    ) -> Any:
        slot, shared = cast(CallSlot, slots_of(module)[name]), {} if flow is None else flow
        part_of_text = getattr(module, "part_of_text", None)  # Of modules that may get less than whole texts.
        part: TextPart | None = None if part_of_text is None else part_of_text(*rest, **options)

        def run_plain(changed: Any, **added: Any) -> Any:
            if part is not None:
                part.check_change(x, changed)
            return plain(module, changed, shared, *rest, **options, **added)

        return slot.run(run_plain, x, shared, part=part)

    return call


@cache
def _adapted_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    calls = [name for name in names if name.endswith(CALL)]
    members: dict[str, Any] = {name: _effective_property(name) for name in names if name not in calls}
    if base.forward is nn.Linear.forward and "weight" in names:
        members["forward"] = _adapted_linear
    for name in calls:
        method = name.removesuffix(CALL)
        members[method] = _adapted_call(name, members.get(method, getattr(base, method)))
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
    return cast(type[nn.Module], getattr(type(module), "_unadapted_class", type(module)))


def _update_class(module: nn.Module) -> None:
    base = plain_class(module)
    if has_rules(module):
        base = _adapted_class(base, tuple(sorted(slots_of(module))))  # type: ignore[arg-type]  # classes hash
    module.__class__ = base


def change_class(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a module another class without rules; the rules that it has act on the new class."""
    module.__class__ = base
    _update_class(module)


def is_factor(module: nn.Module, parameter: str) -> bool:
    """Whether `module`, called, multiplies by the effective value of this parameter and no more."""
    return parameter == "weight" and plain_class(module).forward is nn.Linear.forward


# --- attaching


def attach(module: nn.Module, name: str, adapter: str, rule: Rule) -> None:
    """Give a parameter of `module`, or its call `name`, a rule under the name of an adapter; inactive at
    first."""
    if not has_rules(module):
        module.add_module(SLOTS, nn.ModuleDict())
    slots = slots_of(module)
    if name not in slots:
        slots[name] = CallSlot() if name.endswith(CALL) else WeightSlot(module, name)
    rule.to(device=device_of(module, name)).train(module.training)
    slots[name][adapter] = rule
    _update_class(module)


def share(module: nn.Module, name: str, slot: Slot) -> None:
    """Give `module`, one parameter of which is that of another module, the slot of the parameter there: the
    rules of tied weights are one."""
    if not has_rules(module):
        module.add_module(SLOTS, nn.ModuleDict())
    slots_of(module)[name] = slot
    _update_class(module)


def device_of(module: nn.Module, name: str) -> torch.device | None:
    """Where a parameter lies, or the first parameter of a module for its calls; None for a module without
    any."""
    if not name.endswith(CALL):
        return base_value(module, name).device
    return next((parameter.device for _, parameter in base_parameters(module)), None)


def detach(module: nn.Module, adapter: str) -> None:
    """Remove an adapter's rules from `module`, and the mechanism itself after the last one."""
    slots = slots_of(module)
    for name in list(slots):
        if adapter in slots[name]:
            del slots[name][adapter]
        if not slots[name]:
            del slots[name]
    if not slots:
        del module._modules[SLOTS]
    _update_class(module)


def take_off(module: nn.Module) -> nn.Module:
    """Remove the rules of all adapters from `module`, which is plain then; they are returned as they were."""
    slots = cast(nn.Module, module._modules.pop(SLOTS))
    _update_class(module)
    return slots


def put_on(module: nn.Module, slots: nn.Module) -> None:
    """The reverse of `take_off`."""
    module.add_module(SLOTS, slots.train(module.training))
    _update_class(module)


# --- walking


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the model's modules, without those that belong to rules: these are more than half."""
    return _below("", model, set())


def adapted_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module with rules."""
    return [(path, module) for path, module in own_modules(model) if has_rules(module)]


def _below(path: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != SLOTS:
            yield from _below(join(path, name), child, seen)


def iter_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Slot]]:
    """(path of the owner, owner, name of the parameter or call, slot) of every point with rules.

    A parameter that modules share is one point, at its first place.
    """
    seen: set[Slot] = set()
    for path, module in adapted_modules(model):
        for name, slot in slots_of(module).items():
            if slot not in seen:
                seen.add(slot)
                yield path, module, name, slot


def iter_weight_slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, WeightSlot]]:
    """(parameter path, owner, parameter name, slot) of every parameter with rules."""
    for path, module, name, slot in iter_slots(model):
        if isinstance(slot, WeightSlot):
            yield join(path, name), module, name, slot


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within the block no rule is in force: whoever reads a parameter gets the frozen one itself.

    Nothing else changes. `disabled` (`manage.py`) is for users: it also decides what requires a gradient.
    """
    slots = [(slot, slot.active) for _, _, _, slot in iter_slots(model)]
    for slot, _ in slots:
        slot.active = None
    try:
        yield
    finally:
        for slot, active in slots:
            slot.active = active


def point_path(place: str, name: str) -> str:
    """Path of a point from that of its module and the name of its slot: calls of a module itself are named by
    it."""
    return place + CALL if name == "forward" + CALL else join(place, name)


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
