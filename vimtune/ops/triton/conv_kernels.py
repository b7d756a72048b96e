"""Depthwise causal convolution and the small projections around it, in Triton.

Rows are the B * L tokens of the batch, one after the other; a filter tap that would cross the border
of an image reads 0. Direction 0 looks back, direction 1 looks ahead.

Shape letters: B batch, L tokens, E inner width, N states (NP padded), R dt rank (RP padded), K filter
width, P = 2 NP + RP columns of the projected B | C | dt.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimtune.ops.triton.common import silu, silu_slope


@triton.jit
def _tap(
    x, image, t, e, ok, stride_image, stride_token, num_tokens, SHIFT: tl.constexpr, AHEAD: tl.constexpr
):
    """Tile of rows SHIFT tokens before (or ahead of) each row, fp32."""
    source = t + SHIFT if AHEAD else t - SHIFT
    inside = (source >= 0) & (source < num_tokens)
    place = image * stride_image + source * stride_token
    return tl.load(x + place[:, None] + e[None, :], mask=ok & inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _filtered(
    x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """bias + sum over taps; the last filter column belongs to the row itself."""
    for j in tl.static_range(K):
        w = tl.load(weight + e * K + K - 1 - j, mask=live, other=0.0).to(tl.float32)
        product = w[None, :] * _tap(x, image, t, e, ok, stride_image, stride_token, num_tokens, j, AHEAD)
        if j == 0:
            total = product
        else:
            total += product
    if HAS_BIAS:
        total += tl.load(bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _rows(num_rows, num_tokens, BM: tl.constexpr, AXIS: tl.constexpr):
    row = tl.program_id(AXIS).to(tl.int64) * BM + tl.arange(0, BM)
    return row, row // num_tokens, row % num_tokens, row < num_rows


@triton.jit
def conv_kernel(
    x, weight, bias, out, stride_image, stride_token, stride_out_image, stride_out_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, AHEAD: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    _row, image, t, ok_row = _rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    y = _filtered(
        x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, AHEAD
    )
    if SILU:
        y = silu(y)
    place = image * stride_out_image + t * stride_out_token
    tl.store(out + place[:, None] + e[None, :], y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_slope_kernel(
    grad, x, weight, bias, out, stride_grad_image, stride_grad_token, stride_image, stride_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU: grad * silu'(conv(x)), (B, L, E) contiguous."""
    row, image, t, ok_row = _rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    y = _filtered(
        x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, AHEAD
    )
    place = (image * stride_grad_image + t * stride_grad_token)[:, None] + e[None, :]
    value = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32) * silu_slope(y)
    tl.store(out + row[:, None] * num_inner + e[None, :], value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_adjoint_kernel(
    grad0, grad1, weight0, weight1, out, stride_grad_image, stride_grad_token, stride_out_image, stride_out_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, USE0: tl.constexpr, USE1: tl.constexpr,
):  # fmt: skip
    """Gradient of the filter's input, both directions added: the adjoint looks the other way."""
    _row, image, t, ok_row = _rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    live = e < num_inner
    ok = ok_row[:, None] & live[None, :]
    total = tl.zeros([BM, BE], tl.float32)
    if USE0:
        total += _filtered(
            grad0, weight0, weight0, image, t, e, ok, live, stride_grad_image, stride_grad_token, num_tokens,
            K, False, True,
        )  # fmt: skip
    if USE1:
        total += _filtered(
            grad1, weight1, weight1, image, t, e, ok, live, stride_grad_image, stride_grad_token, num_tokens,
            K, False, False,
        )  # fmt: skip
    place = image * stride_out_image + t * stride_out_token
    tl.store(out + place[:, None] + e[None, :], total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def conv_weight_kernel(
    grad, x, partial, stride_grad_image, stride_grad_token, stride_image, stride_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Filter and bias gradients of TILES tiles of rows: `partial` (programs, K + 1, E)."""
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
            value = _tap(grad, image, t, e, ok, stride_grad_image, stride_grad_token, num_tokens, 0, False)
            if j < K:
                value *= _tap(x, image, t, e, ok, stride_image, stride_token, num_tokens, K - 1 - j, AHEAD)
            total += tl.sum(value, axis=0)
        tl.store(base + j * num_inner + e, total, mask=live)


@triton.jit
def _weight_rows(p, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr):
    """Row of x_proj's weight (dt | B | C) behind column p of B | C | dt, and whether there is one."""
    is_B = p < NP
    is_C = (p >= NP) & (p < 2 * NP)
    place = tl.where(is_B, p + R, tl.where(is_C, p - NP + R + N, p - 2 * NP))
    used = tl.where(is_B, p < N, tl.where(is_C, p - NP < N, p - 2 * NP < R))
    return place, used


@triton.jit
def conv_project_kernel(
    x, weight0, weight1, bias0, bias1, proj0, proj1, out, stride_image, stride_token,
    num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """x_proj(SiLU(conv(x))) of both directions as fp32 (2, B, L, P); the convolved x stays on chip.

    LOW multiplies in the dtype of `x` (bf16, fp16), as autocast would.
    """
    row, image, t, ok_row = _rows(num_rows, num_tokens, BM, 0)
    p = tl.arange(0, PP)
    place, used = _weight_rows(p, N, NP, R)
    total0 = tl.zeros([BM, PP], tl.float32)
    total1 = tl.zeros([BM, PP], tl.float32)
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        ok = ok_row[:, None] & live[None, :]
        offset = place[None, :] * num_inner + e[:, None]
        inside = used[None, :] & live[:, None]
        u0 = silu(_filtered(
            x, weight0, bias0, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, False
        ))  # fmt: skip
        w0 = tl.load(proj0 + offset, mask=inside, other=0.0)
        u1 = silu(_filtered(
            x, weight1, bias1, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, True
        ))  # fmt: skip
        w1 = tl.load(proj1 + offset, mask=inside, other=0.0)
        if LOW:
            total0 = tl.dot(u0.to(x.dtype.element_ty), w0.to(x.dtype.element_ty), total0)
            total1 = tl.dot(u1.to(x.dtype.element_ty), w1.to(x.dtype.element_ty), total1)
        else:
            total0 = tl.dot(u0, w0.to(tl.float32), total0, input_precision="ieee")
            total1 = tl.dot(u1, w1.to(tl.float32), total1, input_precision="ieee")
    mask = ok_row[:, None] & (p < P)[None, :]
    tl.store(out + row[:, None] * P + p[None, :], total0, mask=mask)
    tl.store(out + (num_rows + row)[:, None] * P + p[None, :], total1, mask=mask)


@triton.jit
def project_backward_kernel(
    x, weight0, weight1, bias0, bias1, proj0, proj1, dt_weight0, dt_weight1, grad_u, grad_delta, partial_BC,
    grad_proj, stride_image, stride_token, num_rows, num_tokens, num_inner, num_blocks,
    BM: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, P: tl.constexpr,
    LOW: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """From the scan's gradients to those before SiLU, written over `grad_u` (2, B, L, E).

    Adds the channel blocks' dB and dC, pulls d(delta) through dt_proj and all three through x_proj.
    With KEEP the gradient of B | C | dt goes to `grad_proj` (2, B, L, P) for the weight gradients.
    """
    direction = tl.program_id(1)
    row, image, t, ok_row = _rows(num_rows, num_tokens, BM, 0)
    dtype = x.dtype.element_ty if LOW else tl.float32
    here_row = direction * num_rows + row
    proj = proj1 if direction == 1 else proj0
    weight = weight1 if direction == 1 else weight0
    bias = bias1 if direction == 1 else bias0
    dt_weight = dt_weight1 if direction == 1 else dt_weight0

    c = tl.arange(0, 2 * NP)
    r = tl.arange(0, RP)
    grad_BC = tl.zeros([BM, 2 * NP], tl.float32)
    for block in range(num_blocks):
        place = (direction * num_blocks + block) * num_rows + row
        grad_BC += tl.load(partial_BC + place[:, None] * 2 * NP + c[None, :], mask=ok_row[:, None], other=0.0)
    grad_dt = tl.zeros([BM, RP], tl.float32)
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        ok = ok_row[:, None] & live[None, :]
        values = tl.load(grad_delta + here_row[:, None] * num_inner + e[None, :], mask=ok, other=0.0).to(dtype)
        w = tl.load(dt_weight + e[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        if LOW:
            grad_dt = tl.dot(values, w.to(dtype), grad_dt)
        else:
            grad_dt = tl.dot(values, w.to(tl.float32), grad_dt, input_precision="ieee")
    if KEEP:
        kept = grad_proj + here_row[:, None] * P
        tl.store(kept + c[None, :], grad_BC.to(grad_proj.dtype.element_ty), mask=ok_row[:, None])
        tl.store(kept + 2 * NP + r[None, :], grad_dt.to(grad_proj.dtype.element_ty), mask=ok_row[:, None])

    place, used = _weight_rows(c, N, NP, R)
    low_BC = grad_BC.to(dtype)
    low_dt = grad_dt.to(dtype)
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        ok = ok_row[:, None] & live[None, :]
        here = grad_u + here_row[:, None] * num_inner + e[None, :]
        total = tl.load(here, mask=ok, other=0.0).to(tl.float32)
        w_BC = tl.load(
            proj + place[:, None] * num_inner + e[None, :], mask=used[:, None] & live[None, :], other=0.0
        )
        w_dt = tl.load(
            proj + r[:, None] * num_inner + e[None, :], mask=(r < R)[:, None] & live[None, :], other=0.0
        )
        if LOW:
            total = tl.dot(low_BC, w_BC.to(dtype), total)
            total = tl.dot(low_dt, w_dt.to(dtype), total)
        else:
            total = tl.dot(low_BC, w_BC.to(tl.float32), total, input_precision="ieee")
            total = tl.dot(low_dt, w_dt.to(tl.float32), total, input_precision="ieee")
        if direction == 1:
            y = _filtered(
                x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, True
            )  # fmt: skip
        else:
            y = _filtered(
                x, weight, bias, image, t, e, ok, live, stride_image, stride_token, num_tokens, K, HAS_BIAS, False
            )  # fmt: skip
        tl.store(here, (total * silu_slope(y)).to(grad_u.dtype.element_ty), mask=ok)
