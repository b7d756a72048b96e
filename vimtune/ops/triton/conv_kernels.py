"""Depthwise causal convolution in Triton. Filters come transposed, (K, E).

Rows are the B * L tokens of the batch, one after the other; a filter tap that would cross the border
of an image reads 0. Direction 0 looks back (`sign` -1), direction 1 looks ahead (`sign` 1). The
strides of `x` are given in units of UNIT numbers (`in_units`).

Shape letters: B batch, L tokens, E inner width, K filter width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimtune.ops.triton.common import silu, silu_slope


@triton.jit
def _tap(x, image, t, e, ok, stride_image, stride_token, num_tokens, shift):
    """Tile of rows `shift` tokens ahead of each row (before it if negative), fp32."""
    source = t + shift
    inside = (source >= 0) & (source < num_tokens)
    place = image * stride_image + source * stride_token
    return tl.load(x + place[:, None] + e[None, :], mask=ok & inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def filtered(
    x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, num_inner, sign,
    K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """bias + sum over taps. `weight` is (K, E), its last row belongs to the token itself: a column for
    each channel would make every load of the filter touch a cache line a channel."""
    for j in tl.static_range(K):
        w = tl.load(weight + (K - 1 - j) * num_inner + e, mask=live, other=0.0).to(tl.float32)
        product = w[None, :] * _tap(x, image, t, e, ok, stride_image, stride_token, num_tokens, j * sign)
        if j == 0:
            total = product
        else:
            total += product
    if HAS_BIAS:
        total += tl.load(bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def tail_taps(
    tail, weight, t, e, ok, live, num_tokens, num_inner, sign, K: tl.constexpr, BM: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """What inputs before the first token add to `filtered`. `tail` (K - 1, E) is in the order of the
    direction: its last row is the neighbour of the first token."""
    total = tl.zeros([BM, BE], tl.float32)
    for j in tl.static_range(1, K):
        source = t + j * sign
        before = tl.where(sign < 0, -source, source - num_tokens + 1)  # 0 or less for tokens that exist
        w = tl.load(weight + (K - 1 - j) * num_inner + e, mask=live, other=0.0).to(tl.float32)
        place = (K - 1 - before)[:, None] * num_inner + e[None, :]
        total += w[None, :] * tl.load(tail + place, mask=ok & (before > 0)[:, None], other=0.0).to(tl.float32)
    return total


@triton.jit
def tile_rows(num_rows, num_tokens, BM: tl.constexpr, AXIS: tl.constexpr):
    """Rows of this program's tile, the image and token of each, and whether it exists."""
    row = tl.program_id(AXIS).to(tl.int64) * BM + tl.arange(0, BM)
    return row, row // num_tokens, row % num_tokens, row < num_rows


@triton.jit
def conv_kernel(
    x, weight, bias, out, stride_image, stride_token, stride_out_image, stride_out_token,
    num_rows, num_tokens, num_inner, sign,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """The convolution of one tile of BM rows and BE channels, through SiLU if asked for."""
    stride_image, stride_token = stride_image * UNIT, stride_token * UNIT
    _row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    y = filtered(
        x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, num_inner, sign,
        K, HAS_BIAS,
    )  # fmt: skip
    if SILU:
        y = silu(y)
    place = image * stride_out_image + t * stride_out_token
    tl.store(out + place[:, None] + e[None, :], y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_slope_kernel(
    grad, x, weight, bias, out, stride_grad_image, stride_grad_token, stride_image, stride_token,
    num_rows, num_tokens, num_inner, sign,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU: grad * silu'(conv(x)), (B, L, E) contiguous."""
    stride_image, stride_token = stride_image * UNIT, stride_token * UNIT
    row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    y = filtered(
        x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, num_inner, sign,
        K, HAS_BIAS,
    )  # fmt: skip
    place = (image * stride_grad_image + t * stride_grad_token)[:, None] + e[None, :]
    value = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32) * silu_slope(y)
    tl.store(out + row[:, None] * num_inner + e[None, :], value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_adjoint_kernel(
    grad0, grad1, weight0, weight1, out,
    stride_grad_image, stride_grad_token, stride_out_image, stride_out_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, USE0: tl.constexpr, USE1: tl.constexpr,
):  # fmt: skip
    """Gradient of the filter's input, both directions added: the adjoint looks the other way."""
    _row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    total = tl.zeros([BM, BE], tl.float32)
    if USE0:
        total += filtered(
            grad0, weight0, weight0, image, t, e, ok, live, stride_grad_image, stride_grad_token,
            num_tokens, num_inner, 1, K, False,
        )  # fmt: skip
    if USE1:
        total += filtered(
            grad1, weight1, weight1, image, t, e, ok, live, stride_grad_image, stride_grad_token,
            num_tokens, num_inner, -1, K, False,
        )  # fmt: skip
    place = image * stride_out_image + t * stride_out_token
    tl.store(out + place[:, None] + e[None, :], total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_weight_kernel(
    grad, x, partial, stride_grad_image, stride_grad_token, stride_image, stride_token,
    num_rows, num_tokens, num_inner, sign,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Filter and bias gradients of TILES tiles of rows: `partial` (programs, K + 1, E)."""
    stride_image, stride_token = stride_image * UNIT, stride_token * UNIT
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    base = partial + tl.program_id(0).to(tl.int64) * (K + 1) * num_inner
    for j in tl.static_range(K + 1):
        total = tl.zeros([BE], tl.float32)
        for tile in range(TILES):
            row = (tl.program_id(0).to(tl.int64) * TILES + tile) * BM + tl.arange(0, BM)
            image = row // num_tokens
            t = row % num_tokens
            ok = (row < num_rows)[:, None] & live[None, :]
            value = _tap(grad, image, t, e, ok, stride_grad_image, stride_grad_token, num_tokens, 0)
            if j < K:
                shift = (K - 1 - j) * sign
                value *= _tap(x, image, t, e, ok, stride_image, stride_token, num_tokens, shift)
            total += tl.sum(value, axis=0)
        tl.store(base + j * num_inner + e, total, mask=live)
