"""Two scaled activations added to tokens in one pass, forward and backward.

A program handles BW columns, the second index of the program says which, of ROWS tokens at a time.

Shape letters: M tokens of all samples, L tokens of one, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu_pair_kernel(
    x, first, first_scale, second, second_scale, result, rows, tokens, columns, skipped,
    ROWS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`result` (M, D)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    place = row * columns + column[None, :]
    mask = (row < rows) & (column < columns)[None, :]
    scale = tl.load(first_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    other_scale = tl.load(second_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + place, mask=mask, other=0.0)
    a = tl.load(first + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(second + place, mask=mask, other=0.0).to(tl.float32)
    added = scale * a * tl.sigmoid(a) + other_scale * b * tl.sigmoid(b)
    total = (value.to(tl.float32) + added).to(value.dtype)
    tl.store(result + place, tl.where(row % tokens == skipped, value, total), mask=mask)


@triton.jit
def silu_pair_backward_kernel(
    grad, first, first_scale, second, second_scale, grad_first, grad_second, partial, rows, tokens, columns,
    skipped,
    ROWS: tl.constexpr, BW: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients for TILES tiles of ROWS tokens; of those of the scales parts, `partial` (2, programs, D)."""
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    scale = tl.load(first_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    other_scale = tl.load(second_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BW], tl.float32)
    other_sums = tl.zeros([BW], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        place = row * columns + column[None, :]
        mask = (row < rows) & (column < columns)[None, :]
        counts = mask & (row % tokens != skipped)
        own = tl.load(grad + place, mask=counts, other=0.0).to(tl.float32)
        a = tl.load(first + place, mask=mask, other=0.0).to(tl.float32)
        opened = tl.sigmoid(a)
        sums += tl.sum(own * a * opened, axis=0)
        slope = own * scale * opened * (1.0 + a * (1.0 - opened))
        tl.store(grad_first + place, slope.to(grad_first.dtype.element_ty), mask=mask)
        b = tl.load(second + place, mask=mask, other=0.0).to(tl.float32)
        opened = tl.sigmoid(b)
        other_sums += tl.sum(own * b * opened, axis=0)
        slope = own * other_scale * opened * (1.0 + b * (1.0 - opened))
        tl.store(grad_second + place, slope.to(grad_second.dtype.element_ty), mask=mask)
    part = partial + tl.program_id(0) * columns + column
    tl.store(part, sums, mask=column < columns)
    tl.store(part + tl.num_programs(0) * columns, other_sums, mask=column < columns)
