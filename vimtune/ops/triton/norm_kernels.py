"""Residual add and RMSNorm in one pass, forward and backward. A program handles ROWS rows at a time.

Shape letters: M rows (B * L), D width (padded BD).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    branch, residual, weight, total, normed, inverse, num_rows, width, eps,
    ROWS: tl.constexpr, BD: tl.constexpr, HAS_BRANCH: tl.constexpr,
):  # fmt: skip
    """`total` = residual + branch, `inverse` = 1 / rms (M,), `normed` = total inverse weight; ROWS rows."""
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
def add_norm_backward_kernel(
    grad_normed, grad_total, total, weight, inverse, grad_residual, grad_branch, partial, num_rows, width,
    ROWS: tl.constexpr, BD: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_BRANCH: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients for TILES tiles of ROWS rows; of the weight's gradient a part, `partial` (programs, D)."""
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
