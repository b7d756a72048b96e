"""Giving up what only training has a use for."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from vimtune.adapters.composition import single_rules
from vimtune.adapters.manage import demand_adapter
from vimtune.adapters.slots import iter_slots
from vimtune.adapters.wrappers import unwrap
from vimtune.methods import get_method

Model = TypeVar("Model", bound=nn.Module)
"""A model of any class, for functions that give back the model they got."""


@torch.no_grad()
def simplify(model: Model) -> Model:
    """Reduce the active adapter to what its formulas need, in place, such as tokens that an MLP has made to a
    table.

    What the model computes stays the same. The adapter's file gets smaller, and is that of an adapter which
    was trained without the MLP; whoever wants to go on training with it keeps the file of before.

    Args:
        model: the adapted model.

    Returns:
        The model, as it was given.

    Raises:
        ValueError: no adapter is active, or the model is under DistributedDataParallel.
    """
    backbone = unwrap(model, retrains=True)
    _, record = demand_adapter(backbone)
    for _, _, _, slot in iter_slots(backbone):
        for rule in () if slot.rule is None else single_rules(slot.rule):
            rule.simplify()
    for name, options in record.options.items():
        options.update(get_method(name).training_only)
    return model
