"""The operation `scaled_block_product`, by which ProDiaL changes a weight: blocks and a scale.

Shape letters: O rows, C columns, n blocks of b columns, C = n b.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.operation import as_optional, check_inputs, operation, run


class ProductInputs(NamedTuple):
    """Tensors of a product, in the order of their gradients."""

    weight: Tensor
    """W (..., O, C)"""
    row_scale: Tensor
    """s (..., O)"""
    blocks: Tensor
    """D_1 to D_n (..., n, b, b)"""


class ProductKernels(Kernels[ProductInputs]):
    """Kernels of the product. Tensors may lie anywhere with any strides; they are never empty.

    Results are contiguous, and have the dtype of the tensors.
    """

    operation = "scaled_block_product"

    @abstractmethod
    def forward(self, inputs: ProductInputs) -> Tensor:
        """The product (..., O, C)."""

    @abstractmethod
    def backward(
        self, grad: Tensor, inputs: ProductInputs, need_scale: bool, need_blocks: bool
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `row_scale` and `blocks` from `grad` (..., O, C); empty where they are not needed.

        That of the weight is a product, too, and computed by `forward`.
        """


def scaled_block_product(weight: Tensor, row_scale: Tensor, blocks: Tensor, backend: str = "auto") -> Tensor:
    """s (W + W diag(D_1, ..., D_n)), where s scales rows; `vimtune.ops.reference.scaled_block_product`.

    With kernels for it, W is read and the result written once, where matrix products of such small blocks are
    slow and want W in another order.

    Args:
        weight: W (..., O, C).
        row_scale: s (..., O).
        blocks: D_1 to D_n (..., n, b, b).
        backend: see `vimtune.ops.backend_names`. What "auto" stands for need not exist on the device of
            `weight`: chosen for scans, it does not forbid the formula.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: where kernels have run, derivatives that the formula has beyond them (the backend
            "reference" is the formula): gradients of the gradients of s and D, forward-mode derivatives and
            gradients under `torch.func`.
    """
    *leading, rows, columns = weight.shape
    size = blocks.shape[-1] if blocks.ndim else 0
    if size == 0 or columns % size or tuple(blocks.shape) != (*leading, columns // size, size, size):
        raise ValueError(
            f"blocks are {tuple(blocks.shape)}, expected (..., n, b, b) with n b = {columns} "
            f"for a weight {tuple(weight.shape)}"
        )
    check_inputs(
        weight.device,
        weight=(weight, weight.shape),
        row_scale=(row_scale, (*leading, rows)),
        blocks=(blocks, blocks.shape),
    )
    name = find_backend(ProductKernels, backend, weight.device, ProductInputs(weight, row_scale, blocks))
    if not name:
        return reference.scaled_block_product(weight, row_scale, blocks)
    result: Tensor = run("scaled_block_product", weight, row_scale, blocks, name)
    return result


# Programs exported before there was an argument `backend` call without it, hence the default.


@operation("scaled_block_product")
def _product(weight: Tensor, row_scale: Tensor, blocks: Tensor, backend: str = "auto") -> Tensor:
    """The product."""
    if weight.numel() == 0:  # This happens under a vmap over nothing.
        return torch.empty_like(weight)
    inputs = ProductInputs(weight, row_scale, blocks)
    return find_kernels(ProductKernels, backend, weight.device, inputs)[1].forward(inputs)


@_product.register_fake
def _(weight: Tensor, row_scale: Tensor, blocks: Tensor, backend: str = "auto") -> Tensor:
    return weight.new_empty(weight.shape)


@operation("scaled_block_product_backward")
def _backward(
    grad: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    blocks: Tensor,
    need_scale: bool,
    need_blocks: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gradients of `row_scale` and `blocks`, empty where they are not needed."""
    if weight.numel() == 0:
        return (
            row_scale.new_zeros(row_scale.shape if need_scale else 0),
            blocks.new_zeros(blocks.shape if need_blocks else 0),
        )
    inputs = ProductInputs(weight, row_scale, blocks)
    _, kernels = find_kernels(ProductKernels, backend, weight.device, inputs)
    return kernels.backward(grad, inputs, need_scale, need_blocks)


@_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    blocks: Tensor,
    need_scale: bool,
    need_blocks: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    return (
        row_scale.new_empty(row_scale.shape if need_scale else 0),
        blocks.new_empty(blocks.shape if need_blocks else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the backward pass needs."""
    weight, row_scale, blocks, *ctx.backend = inputs
    ctx.save_for_backward(weight, row_scale, blocks)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    weight, row_scale, blocks = ctx.saved_tensors
    need_weight, *needs = ctx.needs_input_grad[:3]
    grad_weight, found = None, [grad, grad]  # Nobody takes these if none is needed.
    if need_weight:
        # The gradient of s (W + W D) by W is s (g + g D^T).
        transposed = blocks.transpose(-1, -2)
        grad_weight = run("scaled_block_product", grad, row_scale, transposed, *ctx.backend)
    if any(needs):
        tensors = grad, weight, row_scale, blocks
        found = run("scaled_block_product_backward", *tensors, *needs, *ctx.backend)
    return grad_weight, *as_optional(found, needs), *[None] * len(ctx.backend)


def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    """One product with one more leading dimension."""
    *tensors, backend = arguments if len(arguments) > 3 else (*arguments, "auto")
    stacked = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims[:3], strict=True)
    ]
    return run("scaled_block_product", *stacked, backend), 0


_product.register_autograd(_autograd, setup_context=_setup)
_product.register_vmap(_vmap)
