"""Rules that agree in all but the values of their tensors, and one formula for all of them.

On a GPU each operation is a kernel that takes longer to start than to run, and a formula takes some ten for
each rule. The tensors of rules that agree are stacked, and the formula is applied to the stacks by
`torch.func.vmap`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule, exact
from vimtune.adapters.slots import join

Module = TypeVar("Module", bound=nn.Module)
"""A module of any class, for functions that give back a module of the class they got."""

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
"""Types of attributes that are compared by value; all others agree only if they are the same object."""
_MODULE_STATE = frozenset(vars(nn.Module()))
"""What every module has in its `__dict__`."""
_OWN_NAMES: dict[type[nn.Module], tuple[str, ...]] = {}
"""What the latest module of each class has there besides."""
_INDEX = re.compile(r"\d+")
"""The numbers in a path: paths that are equal but for these name the same parameter of different layers."""

# Slices of so many elements start where kernels expect a tensor to start: at a multiple of 16 bytes.
_ALIGNED_ELEMENTS = 8


class Member(NamedTuple):
    """One rule and the parameter that it is for."""

    rule: WeightRule
    weight: Tensor
    """The frozen parameter itself."""
    tensors: dict[str, Tensor]
    """Parameters and buffers of the rule by path; under each of its paths, if one has several."""
    is_factor: bool
    """Whether the module of the parameter multiplies by it and does nothing else with it."""


class Groups:
    """Rules sorted into groups, of which each can be computed at once.

    Of one group are rules for the same parameter of different layers (paths equal but for numbers) that
    agree in all but the values of their tensors: types, shapes, dtypes, devices, every plain attribute, and,
    where gradients are recorded, what is trained. Members of a group are in the order in which they were
    added.
    """

    def __init__(self) -> None:
        self._members: dict[Hashable, list[Member]] = {}
        self._recorded = torch.is_grad_enabled()

    def __iter__(self) -> Iterator[list[Member]]:
        return iter(self._members.values())

    def add(self, path: str, weight: Tensor, is_factor: bool, rules: Iterable[WeightRule]) -> None:
        """Sort in rules for one parameter; those that cannot be applied to stacks are left out.

        Args:
            path: that of the parameter.
            weight: the frozen parameter itself.
            is_factor: whether its module multiplies by it and does nothing else with it.
            rules: those that are wanted, with a formula each.
        """
        if weight.numel() % _ALIGNED_ELEMENTS or not can_stack(weight):
            return
        trained = self._recorded and weight.requires_grad
        place = _INDEX.sub("*", path), is_factor, weight.shape, weight.dtype, weight.device, trained
        for rule in rules:
            traits: list[Hashable] = [place]
            tensors: dict[str, Tensor] = {}
            if _inspect(rule, "", traits, tensors, self._recorded) and tensors:
                member = Member(rule, weight, tensors, is_factor)
                self._members.setdefault(tuple(traits), []).append(member)


def apply_together(
    members: Sequence[Member], formula: Callable[[WeightRule, Tensor], Any], reads_weight: bool = True
) -> Any:
    """What a formula gives for the rules of a group, stacked in their order.

    Args:
        members: those of one group.
        formula: of a rule and its weight; it gives a tensor, or a tuple of tensors.
        reads_weight: whether it depends on the values of the weight. If not, the first one stands for all of
            them, and none is copied.

    Returns:
        The tensor or tensors, with one more dimension in front, that of the members.
    """
    rule, weight, tensors, _ = members[0]
    stacks = {path: torch.stack([member.tensors[path] for member in members]) for path in tensors}
    if reads_weight and any(member.weight is not weight for member in members):
        weights = torch.stack([member.weight for member in members])
    else:
        weights = weight.expand(len(members), *weight.shape)

    def apply(weight: Tensor, tensors: dict[str, Tensor]) -> Any:
        return formula(_with_tensors(rule, tensors), weight)

    with exact(weights):
        return torch.func.vmap(apply, randomness="different")(weights, stacks)


def can_stack(tensor: Tensor) -> bool:
    """Whether a tensor can be stacked: others (quantised, sharded over processes, fake) have ways of their
    own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _inspect(
    module: nn.Module, path: str, traits: list[Hashable], tensors: dict[str, Tensor], recorded: bool
) -> bool:
    """Collect what the formula of a rule depends on: its tensors by path, and all else in `traits`, with what
    is trained if gradients are `recorded`.

    Returns whether the rule can be applied to stacks.
    """
    # This is asked of every rule in every forward pass, hence the few calls.
    state, kind = module.__dict__, type(module)
    if state["_forward_pre_hooks"] or state["_forward_hooks"]:
        return False  # A rule with hooks computes for itself, so that they run.
    if state["_backward_pre_hooks"] or state["_backward_hooks"]:
        return False
    if isinstance(module, WeightRule) and not module.batchable:
        return False
    traits += (path, kind, state["training"])  # type: ignore[arg-type]  # classes hash
    for name in _own_names(state, kind):
        value = state[name]
        plain = type(value) in _PLAIN
        traits += (name, type(value), value if plain else _identity(value))  # type: ignore[arg-type]
    for own in (state["_parameters"], state["_buffers"]):
        for name, tensor in own.items():
            if tensor is None:
                continue
            if not can_stack(tensor):
                return False
            tensors[f"{path}{name}"] = tensor
            traits += (name, tensor.shape, tensor.dtype, tensor.device, recorded and tensor.requires_grad)
    for name, child in state["_modules"].items():
        if child is not None and not _inspect(child, f"{path}{name}.", traits, tensors, recorded):
            return False
    return True


def _own_names(state: Mapping[str, Any], kind: type[nn.Module]) -> tuple[str, ...]:
    """The attributes in the `__dict__` of a module that not every module has."""
    names = _OWN_NAMES.get(kind, ())
    # Every module has the common ones, so that these are all if they are there and the number is right.
    if len(state) != len(_MODULE_STATE) + len(names) or not all([name in state for name in names]):
        names = _OWN_NAMES[kind] = tuple([name for name in state if name not in _MODULE_STATE])
    return names


def _identity(value: Any) -> Hashable:
    """Equal for equal plain values; anything else equals itself alone."""
    if isinstance(value, tuple):
        return tuple([(type(item), _identity(item)) for item in value])
    return value if isinstance(value, (*_PLAIN, type)) else id(value)


def _with_tensors(module: Module, tensors: dict[str, Tensor], path: str = "") -> Module:
    """A copy of `module` with the tensors given by path.

    `torch.func.functional_call` would exchange those of the module itself, under the eyes of other threads.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: tensors.get(join(path, name)) for name in vars(module)[kind]}
    twin.__dict__["_modules"] = {
        name: None if child is None else _with_tensors(child, tensors, join(path, name))
        for name, child in module._modules.items()
    }
    return twin
