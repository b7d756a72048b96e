"""Residual add and RMSNorm in one pass, forward and backward. A program handles ROWS rows at a time.

Shape letters: M rows (B * L), D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimtune.ops.triton.common import next_power_of_2

PARTIAL_PROGRAMS = 264
"""Programs over which the weight gradient is spread: two for each multiprocessor of the largest cards."""


@triton.jit
def _add_norm_kernel(
    branch, residual, weight, total, normed, inverse, num_rows, width, eps,
    ROWS: tl.constexpr, BD: tl.constexpr, HAS_BRANCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    mask = (row < num_rows)[:, None] & (d < width)[None, :]
    place = row[:, None] * width + d[None, :]
    value = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        value += tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(normed + place, (value * scale[:, None] * w[None, :]).to(normed.dtype.element_ty), mask=mask)
    tl.store(inverse + row, scale, mask=row < num_rows)


@triton.jit
def _add_norm_backward_kernel(
    grad_normed, grad_total, total, weight, inverse, grad_residual, grad_branch, partial, num_rows, width,
    ROWS: tl.constexpr, BD: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_BRANCH: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    w = tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BD], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (d < width)[None, :]
        place = row[:, None] * width + d[None, :]
        scale = tl.load(inverse + row, mask=row < num_rows, other=0.0)
        unit = tl.load(total + place, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        grad = tl.load(grad_normed + place, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            sum_weight += tl.sum(grad * unit, axis=0)
        grad *= w[None, :]
        grad = (grad - unit * (tl.sum(grad * unit, axis=1) / width)[:, None]) * scale[:, None]
        if HAS_TOTAL:
            grad += tl.load(grad_total + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_residual + place, grad.to(grad_residual.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            tl.store(grad_branch + place, grad.to(grad_branch.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        tl.store(partial + tl.program_id(0) * width + d, sum_weight, mask=d < width)


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
    with torch.cuda.device_of(residual):
        _add_norm_kernel[(-(-num_rows // rows),)](
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
    with torch.cuda.device_of(total):
        _add_norm_backward_kernel[(programs,)](
            grad_normed, total if grad_total is None else grad_total, total, weight, inverse, grad_residual,
            grad_residual if grad_branch is None else grad_branch, partial, num_rows, width,
            ROWS=rows, BD=padded, HAS_TOTAL=grad_total is not None, HAS_BRANCH=grad_branch is not None,
            NEED_WEIGHT=need_weight, TILES=tiles, num_warps=warps,
        )  # fmt: skip
    return grad_residual, grad_branch, partial.sum(0).to(weight.dtype) if need_weight else None
