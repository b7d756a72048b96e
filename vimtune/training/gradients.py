"""The gradients of an optimizer step: where they lie, their norm, and tensors that never get one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from vimtune.training.sharding import whole


class Gradients(Protocol):
    """Where the gradients of the batches of an optimizer step come together."""

    def start(self, empty: bool) -> None:
        """Begin a step; `empty` tells that this process has no batch in it."""

    def add(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar, to those of the step."""


class FreshGradients:
    """Gradients as `loss.backward()` makes them: new tensors in every step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def start(self, empty: bool) -> None:
        """Forget the gradients of the step before."""
        del empty
        for parameter in self.parameters:
            parameter.grad = None

    def add(self, loss: Tensor) -> None:
        """Run the backward pass of `loss`."""
        loss.backward()


class StandingGradients:
    """Gradients that stay where they once were put, because a recorded graph writes them there."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, one_batch: bool) -> None:
        """`one_batch` says that a step has one batch, whose gradients replace those of the step before."""
        self.parameters, self._one_batch = parameters, one_batch

    def start(self, empty: bool) -> None:
        """Set the gradients to zero where nothing will be written over them."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and (empty or not self._one_batch):
            torch._foreach_zero_(gradients)

    def add(self, loss: Tensor) -> None:
        """Run the backward pass of `loss` and put its gradients in their places."""
        put_gradients(loss, self.parameters, replace=self._one_batch)


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
    norm = whole(torch.nn.utils.get_total_norm(gradients))
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
            moved = whole(torch.stack([_moves(self.parameters[name]) for name in self._unmoved])).tolist()
            self._unmoved = [name for name, moves in zip(self._unmoved, moved, strict=True) if not moves]
        return list(self._unmoved) if self._seen == self.num_steps else []


def _moves(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.bool, device=parameter.device)
    return parameter.grad.any()
