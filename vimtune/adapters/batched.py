"""Effective weights of all layers at once.

An effective weight takes some ten small operations, forward and backward, and a Vim asks for one in two
projectors of each of its layers; a batch with several adapters (`mixing.py`) for one of each adapter. On a
GPU each operation is a kernel that takes longer to start than to run. Layers and adapters differ in their
numbers alone, so the one formula (`WeightRule.effective_weight`) is applied to stacks (`stacking.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vimtune.adapters.rule import WeightRule
from vimtune.adapters.slots import (
    Ahead,
    Stack,
    base_value,
    computed_ahead,
    find_ahead,
    is_factor,
    is_recorded,
    iter_weight_slots,
)
from vimtune.adapters.stacking import Groups, Member, apply_together


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
        if len(members) > 1:
            values.update(_compute(members))
    token = computed_ahead.set(values)
    try:
        yield
    finally:
        computed_ahead.reset(token)


def _groups(modules: nn.Module) -> Groups:
    """The rules in force below `modules` whose values are not there yet."""
    groups, known = Groups(), computed_ahead.get()
    for path, owner, parameter, slot in iter_weight_slots(modules):
        weight = base_value(owner, parameter)
        rules = slot.rules_in_force
        if known:
            rules = [rule for rule in rules if find_ahead(rule, weight) is None]
        groups.add(path, weight, is_factor(owner, parameter), rules)
    return groups


def _compute(members: Sequence[Member]) -> dict[WeightRule, Ahead]:
    """Apply the rules of a group, all at once."""
    values: Tensor = apply_together(members, lambda rule, weight: rule.effective_weight(weight))
    device, rounded = values.device.type, None
    if members[0].is_factor and values.dtype == torch.float32 and torch.is_autocast_enabled(device):
        rounded = values.to(torch.get_autocast_dtype(device))
    stack = Stack(values, rounded)
    # The gradient of unbind is one stack; indexing would give a tensor of zeros for each slice.
    parts = values.unbind()
    low: Iterable[Tensor | None] = [None] * len(members) if rounded is None else rounded.unbind()
    return {
        member.rule: Ahead(member.weight, value, torch.is_grad_enabled(), own, stack, place)
        for place, (member, value, own) in enumerate(zip(members, parts, low, strict=True))
    }
