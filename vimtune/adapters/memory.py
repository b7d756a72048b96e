"""Which parameters of a model lie in the same memory.

`a.data = b.data`, or `load_state_dict(assign=True)` with tied weights, makes two parameters of one piece of
memory: what is written into one changes the other. Parameters without memory (empty ones, those of the meta
device) overlap with none, and neither do parts of one flat buffer that lie beside each other.
"""

from __future__ import annotations

import torch
from torch import nn

from vimtune.adapters.slots import base_parameters


class Memory:
    """The memory of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._in_storage: dict[tuple[torch.device, int], list[tuple[str, nn.Parameter]]] = {}
        for path, parameter in base_parameters(model):
            if (key := _storage(parameter)) is not None:
                self._in_storage.setdefault(key, []).append((path, parameter))

    def other_in(self, parameter: nn.Parameter) -> str | None:
        """Path of another parameter in whose memory this one lies, too."""
        if (key := _storage(parameter)) is None:
            return None
        first, end = _extent(parameter)
        for path, other in self._in_storage.get(key, ()):
            start, stop = _extent(other)
            if other is not parameter and first < stop and start < end:
                return path
        return None


def _storage(parameter: nn.Parameter) -> tuple[torch.device, int] | None:
    """Device and address of the memory that a parameter is a part of; None if it has none."""
    if type(parameter) is not nn.Parameter or parameter.layout != torch.strided or not parameter.numel():
        return None
    address = 0 if parameter.is_meta else parameter.untyped_storage().data_ptr()
    return (parameter.device, address) if address else None


def _extent(parameter: nn.Parameter) -> tuple[int, int]:
    """First byte of a parameter and the one after its last, as addresses."""
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return parameter.data_ptr(), parameter.data_ptr() + elements * parameter.element_size()
