"""The operation `add_silu_pair`: two scaled activations added to tokens, as SVP does before every block.

As one operation it reads and writes everything once, and keeps for the backward pass what it was given. Where
no backend has kernels for it, `vimtune.ops.reference.add_silu_pair` computes it.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Gradients, Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    run,
    wanted,
    zero_gradients,
)


class SiluPair(NamedTuple):
    """What is added to tokens, in the order of the gradients. All are contiguous in kernels."""

    first: Tensor
    """(B, L, D)"""
    first_scale: Tensor
    """(D,)"""
    second: Tensor
    """(B, L, D)"""
    second_scale: Tensor
    """(D,)"""


class SiluPairKernels(Kernels[SiluPair]):
    """Kernels of `add_silu_pair`. Results are contiguous and new tensors; inputs are never empty.

    They compute in fp32, for fp64 inputs in fp64.
    """

    operation = "add_silu_pair"

    @abstractmethod
    def forward(self, x: Tensor, pair: SiluPair, skipped: int) -> Tensor:
        """The sum, (B, L, D) in the dtype of `x`, which is contiguous."""

    @abstractmethod
    def backward(self, grad: Tensor, pair: SiluPair, skipped: int) -> Gradients:
        """Gradients of the pair from `grad` (B, L, D), that of the sum, which is contiguous."""


def add_silu_pair(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    skipped: int,
    backend: str = "auto",
) -> Tensor:
    """x + first_scale SiLU(first) + second_scale SiLU(second), at all tokens but one.

    Args:
        x: (B, L, D).
        first: (B, L, D).
        first_scale: (D,).
        second: (B, L, D).
        second_scale: (D,).
        skipped: the token that stays as it is.
        backend: see `vimtune.ops`.

    Returns:
        (B, L, D) in the dtype of `x`.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which the kernels of a
            backend lack and `backend="reference"` has.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be (B, L, D), got {tuple(x.shape)}")
    pair = SiluPair(first, first_scale, second, second_scale)
    shapes = (x.shape, x.shape[-1:]) * 2
    named = zip(SiluPair._fields, pair, shapes, strict=True)
    check_inputs(x.device, x=(x, x.shape), **{name: (tensor, shape) for name, tensor, shape in named})
    name = find_backend(SiluPairKernels, backend, x.device, pair)
    if not name:
        return reference.add_silu_pair(x, *pair, skipped)
    result: Tensor = run("add_silu_pair", x, *pair, skipped, name)
    return result


def _laid_out(pair: Sequence[Tensor]) -> SiluPair:
    """The pair as kernels take it."""
    return SiluPair(*(tensor.contiguous() for tensor in pair))


# About the spelling of annotations see `scan.py`.


@operation("add_silu_pair")
def _add_silu_pair(
    x: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    skipped: int,
    backend: str,
) -> Tensor:
    """The sum."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    pair = _laid_out((first, first_scale, second, second_scale))
    _, kernels = find_kernels(SiluPairKernels, backend, x.device, pair)
    return kernels.forward(x.contiguous(), pair, skipped)


@_add_silu_pair.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


@operation("add_silu_pair_backward")
def _add_silu_pair_backward(
    grad: Tensor,
    first: Tensor,
    first_scale: Tensor,
    second: Tensor,
    second_scale: Tensor,
    skipped: int,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the pair."""
    pair = _laid_out((first, first_scale, second, second_scale))
    if first.numel() == 0:
        return zero_gradients(pair, needs, first)
    _, kernels = find_kernels(SiluPairKernels, backend, first.device, pair)
    return as_list(wanted(kernels.backward(grad.contiguous(), pair, skipped), pair, needs), first)


@_add_silu_pair_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_gradients(arguments[:4], arguments[-1], arguments[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the pair; of `x` the gradient knows everything."""
    _, *pair, ctx.skipped, ctx.backend = inputs
    ctx.save_for_backward(*pair)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    need_x, *needs = ctx.needs_input_grad[:5]
    gradients: list[Tensor | None] = [None] * 4
    if any(needs):
        others = ctx.skipped, ctx.backend, needs
        found = run("add_silu_pair_backward", grad, *ctx.saved_tensors, *others)
        gradients = as_optional(found, needs)
    return grad if need_x else None, *gradients, None, None


_add_silu_pair.register_autograd(_autograd, setup_context=_setup)
