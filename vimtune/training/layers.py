"""Layer-wise decay of the learning rate: blocks near the input, whose features are general, learn slower."""

from __future__ import annotations

from collections.abc import Iterable

from timm.models import group_parameters
from torch import nn

from vimtune.adapters import AdaptedParameter, base_parameters
from vimtune.adapters.slots import CALL
from vimtune.training.sharding import blocks_of


def layer_rates(
    model: nn.Module, entries: Iterable[AdaptedParameter], layer_decay: float
) -> dict[str, float]:
    """The multiple of the learning rate of each point that a rule acts on.

    It is `layer_decay` to the power of the number of layers above that of the point. Layers are those of timm
    (`group_matcher`), or where a model has none the stem, each block, and what follows; the multiple of the
    head is 1. A call belongs to the layer of its module, and one of the whole model, such as prompts beside
    its input, to the stem.

    Args:
        model: has the adapter.
        entries: what it trains.
        layer_decay: learning rate of a layer as a multiple of that of the next one.

    Returns:
        The multiples by path (`AdaptedParameter.base_name`).
    """
    numbers = _layers(model)
    last = max(numbers.values())
    paths = {entry.base_name for entry in entries}
    return {path: layer_decay ** (last - _layer_of(path, numbers)) for path in paths}


def _layers(model: nn.Module) -> dict[str, int]:
    """The number of the layer of every parameter of the base, by its path."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is not None:
        groups = group_parameters(model, matcher())
        return {path: number for number, members in groups.items() for path in members}
    modules = {module: name for name, module in model.named_modules()}
    blocks = [f"{modules[block]}." for block in blocks_of(model)]
    numbers, passed = {}, False
    for path, _ in base_parameters(
        model
    ):  # in the order of definition: what comes after the blocks is above them
        inside = [number for number, block in enumerate(blocks, 1) if path.startswith(block)]
        passed = passed or bool(inside)
        numbers[path] = inside[0] if inside else passed * (len(blocks) + 1)
    return numbers


def _layer_of(path: str, numbers: dict[str, int]) -> int:
    """The layer of a parameter, or of a call by the parameters of its module or of the one around it."""
    if path in numbers:
        return numbers[path]
    module = path.removesuffix(CALL)
    while module:
        if own := [number for name, number in numbers.items() if name.startswith(f"{module}.")]:
            return min(own)
        module = module.rpartition(".")[0]
    return 0
