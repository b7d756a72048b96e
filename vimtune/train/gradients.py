"""The gradients of an optimizer step: where they lie, their norm, and tensors that never get one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def put_gradients(loss: Tensor, parameters: Iterable[nn.Parameter], *, replace: bool) -> None:
    """`loss.backward()` that leaves every `.grad` where it lies, with a few launches for all of them.

    Gradients are added to `.grad`, or written over it with `replace`, which makes zeroing needless. A
    parameter that `loss` does not depend on keeps its sum, gets zeros with `replace`, and keeps a
    `.grad` of None.
    """
    parameters = [p for p in parameters if p.requires_grad]
    computed = torch.autograd.grad(loss, parameters, allow_unused=True)
    places: list[Tensor] = []
    gradients: list[Tensor] = []
    unused: list[Tensor] = []
    for parameter, gradient in zip(parameters, computed, strict=True):
        if gradient is None:
            if parameter.grad is not None:
                unused.append(parameter.grad)
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        place = parameter.grad
        if gradient.stride() != place.stride():  # one such would send all of them the slow way, one by one
            gradient = torch.empty_like(place).copy_(gradient)
        places.append(place)
        gradients.append(gradient)
    if not replace:
        torch._foreach_add_(places, gradients)
        return
    torch._foreach_copy_(places, gradients)
    if unused:
        torch._foreach_zero_(unused)


def scale_and_clip(parameters: Iterable[nn.Parameter], factor: float, max_norm: float) -> Tensor:
    """Multiply all gradients by `factor`, then make their common norm at most `max_norm` (0: leave it).

    Returns:
        The norm before clipping, a scalar on the device, which nobody waits for here.
    """
    parameters = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class GradientWatch:
    """Finds the trained tensors whose gradient is exactly zero in each of the first `num_steps` steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_steps: int) -> None:
        self.parameters = dict(parameters)
        self.num_steps = num_steps
        self._unmoved = list(parameters)
        self._seen = 0

    def look(self) -> list[str]:
        """Look at the gradients of one step; after the last one, the names of those that never moved."""
        if self._seen == self.num_steps:
            return []
        self._seen += 1
        if self._unmoved:
            moved = torch.stack([_moves(self.parameters[name]) for name in self._unmoved]).tolist()
            self._unmoved = [name for name, moves in zip(self._unmoved, moved, strict=True) if not moves]
        return list(self._unmoved) if self._seen == self.num_steps else []


def _moves(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.bool, device=parameter.device)
    return parameter.grad.any()
