"""Launches of the kernels of norm_kernels.py.

Shape letters: M rows (B * L), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.triton.common import next_power_of_2
from vimtune.ops.triton.norm_kernels import add_norm_backward_kernel, add_norm_kernel

PARTIAL_PROGRAMS = 264
"""Programs over which the weight gradient is spread: two for each multiprocessor of the largest cards."""


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and padded width of a tile, and the warps for it."""
    padded = next_power_of_2(width)
    return max(1, 2048 // padded), padded, 4


def forward(
    branch: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """normed (.., D) in `dtype`, residual + branch in the dtype of `residual`, 1 / rms (M,).

    Inputs are contiguous. Without a branch the second result is empty.
    """
    width = residual.shape[-1]
    num_rows = residual.numel() // width
    rows, padded, warps = _tile(width)
    normed = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    total = torch.empty_like(residual) if branch is not None else residual.new_empty(0)
    inverse = torch.empty(num_rows, dtype=torch.float32, device=residual.device)
    with device_of(residual):
        add_norm_kernel[(-(-num_rows // rows),)](
            residual if branch is None else branch, residual, weight, total, normed, inverse,
            num_rows, width, eps,
            ROWS=rows, BD=padded, HAS_BRANCH=branch is not None, num_warps=warps,
        )  # fmt: skip
    return normed, total, inverse


def backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    branch_dtype: torch.dtype | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of (residual, branch, weight)."""
    width = total.shape[-1]
    num_rows = total.numel() // width
    rows, padded, warps = _tile(width)
    tiles = max(1, -(-num_rows // (rows * PARTIAL_PROGRAMS))) if need_weight else 1
    programs = -(-num_rows // (rows * tiles))
    grad_residual = torch.empty_like(total)
    grad_branch = None if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    partial = torch.empty(
        (programs, width) if need_weight else (0,), dtype=torch.float32, device=total.device
    )
    with device_of(total):
        add_norm_backward_kernel[(programs,)](
            grad_normed, total if grad_total is None else grad_total, total, weight, inverse, grad_residual,
            grad_residual if grad_branch is None else grad_branch, partial, num_rows, width,
            ROWS=rows, BD=padded, HAS_TOTAL=grad_total is not None, HAS_BRANCH=grad_branch is not None,
            NEED_WEIGHT=need_weight, TILES=tiles, num_warps=warps,
        )  # fmt: skip
    return grad_residual, grad_branch, partial.sum(0).to(weight.dtype) if need_weight else None
