"""Effective weights of all layers at once.

An effective weight takes some ten small operations, forward and backward, and a Vim asks for one in two
projectors of each of its layers. On a GPU each operation is a kernel that takes longer to start than
to run. Layers differ in their numbers alone, so the weights and the rules' tensors of all layers are
stacked, and the one formula (`WeightRule.effective_weight`) is applied to the stacks by
`torch.func.vmap`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule, exact
from vimtune.adapters.slots import (
    Ahead,
    base_value,
    computed_ahead,
    find_ahead,
    is_factor,
    is_recorded,
    iter_weight_slots,
    join,
)

Module = TypeVar("Module", bound=nn.Module)
"""A module of any class, for functions that give back a module of the class they got."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
"""Types of attributes that are compared by value; all others agree only if they are the same object."""
_MODULE_STATE = frozenset(vars(nn.Module()))
"""What every module has in its `__dict__`."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module keeps its hooks. A rule with hooks computes for itself, so that they run."""
_INDEX = re.compile(r"\d+")
"""The numbers in a path: paths that are equal but for these name the same parameter of different layers."""

# Slices of so many elements start where kernels expect a tensor to start: at a multiple of 16 bytes.
_ALIGNED_ELEMENTS = 8


def shared_effective_weights(modules: nn.Module) -> AbstractContextManager[Any]:
    """Compute the effective weights below `modules` together, for all who read them within the block.

    Taken together are rules for the same parameter of different layers (paths equal but for numbers)
    that agree in all but the values of their tensors: types, shapes, dtypes, devices, what is
    trained, every plain attribute. Any other rule computes for itself as ever, and so do those that
    are not `WeightRule.batchable`.

    The results are those of the single rules up to the rounding of batched products, the gradients
    too, with one difference: a weight that nobody reads gives its rule's tensors a gradient of zero, not
    none, if that of another layer in its group is read. Rules that draw random numbers draw other ones.
    Weights and tensors must not change within the block; adapters may be switched, disabled, merged.

    Nothing is kept on the modules: other threads, copies and state dicts see none of it. Under
    torch.compile, torch.export and torch.jit.trace the block does nothing.
    """
    if is_recorded():
        return nullcontext()
    return _sharing(modules)


@contextmanager
def _sharing(modules: nn.Module) -> Iterator[None]:
    values = dict(computed_ahead.get() or {})
    for members in _groups(modules):
        values.update(_compute(members))
    token = computed_ahead.set(values)
    try:
        yield
    finally:
        computed_ahead.reset(token)


class _Member(NamedTuple):
    """One parameter and the rule in force."""

    rule: WeightRule
    weight: Tensor
    tensors: dict[str, Tensor]
    """Parameters and buffers of the rule by path; under each of its paths, if one has several."""
    is_factor: bool


def _groups(modules: nn.Module) -> Iterable[list[_Member]]:
    """Parameters below `modules` that can be computed together, two or more in a group."""
    groups: dict[Hashable, list[_Member]] = {}
    for path, owner, parameter, slot in iter_weight_slots(modules):
        weight, called = base_value(owner, parameter), is_factor(owner, parameter)
        for rule in slot.rules_in_force:
            traits: list[Hashable] = [_INDEX.sub("*", path), called]
            tensors: dict[str, Tensor] = {}
            if find_ahead(rule, weight) is not None or not _inspect(rule, "", traits, tensors):
                continue
            if _can_stack(weight, *tensors.values()):
                traits += [_traits(tensor) for tensor in (weight, *tensors.values())]
                member = _Member(rule, weight, tensors, called)
                groups.setdefault(tuple(traits), []).append(member)
    return (members for members in groups.values() if len(members) > 1)


def _inspect(module: nn.Module, path: str, traits: list[Hashable], tensors: dict[str, Tensor]) -> bool:
    """Collect what the formula of a rule depends on: its tensors by path, and all else in `traits`.

    Returns whether the rule can be applied to stacks.
    """
    if isinstance(module, WeightRule) and not module.batchable:
        return False
    state = vars(module)
    if any([state[name] for name in _HOOKS]):
        return False
    traits += (path, type(module), state["training"])  # type: ignore[arg-type]  # classes hash
    for name, value in state.items():
        if name not in _MODULE_STATE:
            traits += (name, _identity(value))
    for own in (state["_parameters"], state["_buffers"]):
        for name, tensor in own.items():
            if tensor is not None:
                tensors[join(path, name)] = tensor
                traits.append(name)
    for name, child in state["_modules"].items():
        if child is not None and not _inspect(child, join(path, name), traits, tensors):
            return False
    return True


def _identity(value: Any) -> Hashable:
    """Equal for equal plain values; anything else equals itself alone."""
    if isinstance(value, tuple):
        return type(value), *map(_identity, value)
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)


def _can_stack(weight: Tensor, *tensors: Tensor) -> bool:
    # Subclasses of tensors (quantised, sharded over processes, fake) have ways of their own.
    return weight.numel() % _ALIGNED_ELEMENTS == 0 and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        for tensor in (weight, *tensors)
    )


def _traits(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


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


def _compute(members: list[_Member]) -> dict[WeightRule, Ahead]:
    """Apply the rules of a group, all at once."""
    rule, _, tensors, is_factor = members[0]
    stacks = {path: torch.stack([member.tensors[path] for member in members]) for path in tensors}
    weights = torch.stack([member.weight for member in members])

    def effective_weight(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return _with_tensors(rule, tensors).effective_weight(weight)

    with exact(weights):
        values = torch.func.vmap(effective_weight, randomness="different")(weights, stacks)
    rounded: Iterable[Tensor | None] = [None] * len(members)
    device = values.device.type
    if is_factor and values.dtype == torch.float32 and torch.is_autocast_enabled(device):
        rounded = values.to(torch.get_autocast_dtype(device)).unbind()
    # The gradient of unbind is one stack; indexing would give a tensor of zeros for each slice.
    return {
        member.rule: Ahead(member.weight, value, torch.is_grad_enabled(), low)
        for member, value, low in zip(members, values.unbind(), rounded, strict=True)
    }
