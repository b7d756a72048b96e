"""Scaled products with a block diagonal matrix, the change that ProDiaL makes to a weight.

Shape letters: O rows, C columns, n blocks of b columns, C = n b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.dispatch import BackendUnavailable, chosen_backend
from vimtune.ops.fused import fused_backend
from vimtune.ops.operation import check_inputs, operation

MAX_BLOCK = 8
"""Columns of the largest blocks that the kernels take; their threads have such blocks in registers."""
MAX_ROWS = 2_000_000
"""Of a matrix that the kernels take."""


def scaled_block_product(weight: Tensor, row_scale: Tensor, blocks: Tensor, backend: str = "auto") -> Tensor:
    """s (W + W diag(D_1, ..., D_n)), where s scales rows.

    With kernels for it, which want fp32, W is read and the result written once, where matrix products of such
    small blocks are slow and want W in another order.

    Args:
        weight: W (..., O, C).
        row_scale: s (..., O).
        blocks: D_1 to D_n (..., n, b, b).
        backend: see `vimtune.ops.backend_names`. What "auto" stands for need not exist on the device of
            `weight`: chosen for scans, it does not forbid the formula.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
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
    tensors = (weight, row_scale, blocks)
    covered = size <= MAX_BLOCK and rows <= MAX_ROWS
    for tensor in tensors:
        covered = covered and tensor.dtype == torch.float32
    if covered and _has_kernels(backend, chosen_backend(backend), str(weight.device)):
        return torch.ops.vimtune.scaled_block_product(*tensors)
    if size == 1:
        return row_scale.unsqueeze(-1) * (weight + weight * blocks.flatten(-3).unsqueeze(-2))
    parts = weight.unflatten(-1, (columns // size, size))
    # The product has the blocks first; added to W as it is, and only then flattened, it needs no copy.
    changed = (parts + torch.einsum("...oni,...nij->...onj", parts, blocks)).flatten(-2)
    return row_scale.unsqueeze(-1) * changed


@torch.compiler.assume_constant_result
def _has_kernels(asked: str, chosen: str, device: str) -> bool:
    try:
        return fused_backend(chosen, device) == "nvrtc"
    except BackendUnavailable:
        if asked != "auto":
            raise
        return False


@operation("scaled_block_product")
def _product(weight: Tensor, row_scale: Tensor, blocks: Tensor) -> Tensor:
    from vimtune.ops.nvrtc import block_product as kernels

    if weight.numel() == 0:  # as under a vmap over nothing
        return torch.empty_like(weight)
    return kernels.scaled_block_product(weight, row_scale, blocks)


@_product.register_fake
def _(weight, row_scale, blocks):
    return weight.new_empty(weight.shape)


@operation("scaled_block_product_backward")
def _backward(
    grad: Tensor, weight: Tensor, row_scale: Tensor, blocks: Tensor, need_scale: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    from vimtune.ops.nvrtc import block_product as kernels

    if weight.numel() == 0:
        return (
            row_scale.new_zeros(row_scale.shape if need_scale else 0),
            blocks.new_zeros(blocks.shape if need_blocks else 0),
        )
    return kernels.scaled_block_product_backward(grad, weight, row_scale, blocks, need_scale, need_blocks)


@_backward.register_fake
def _(grad, weight, row_scale, blocks, need_scale, need_blocks):
    return (
        row_scale.new_empty(row_scale.shape if need_scale else 0),
        blocks.new_empty(blocks.shape if need_blocks else 0),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    weight, row_scale, blocks = ctx.saved_tensors
    need_weight, *needs = ctx.needs_input_grad
    grad_weight, others = None, (None, None)
    if need_weight:
        # Of s (W + W D) it is s (g + g D^T).
        grad_weight = torch.ops.vimtune.scaled_block_product(grad, row_scale, blocks.transpose(-1, -2))
    if any(needs):
        others = torch.ops.vimtune.scaled_block_product_backward(grad, weight, row_scale, blocks, *needs)
    return grad_weight, *(value if needed else None for value, needed in zip(others, needs, strict=True))


def _vmap(info, in_dims, *tensors):
    """One more leading dimension."""
    stacked = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    return torch.ops.vimtune.scaled_block_product(*stacked), 0


_product.register_autograd(_autograd, setup_context=_setup)
_product.register_vmap(_vmap)
