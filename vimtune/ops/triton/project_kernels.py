"""What surrounds the scan in the mixer, in Triton: convolution and small projections, and the gate.

Rows are the B * L tokens, direction after direction. B | C | dt_r are kept side by side.

Shape letters: B batch, L tokens, M = B L rows, E inner width, N states (NP padded), R dt rank (RP padded),
K filter width, P = 2 NP + RP columns of B | C | dt_r.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimtune.ops.triton.common import silu, silu_slope, softplus
from vimtune.ops.triton.conv_kernels import filtered, tail_taps, tile_rows


@triton.jit
def _product(a, b, total, DOT_TYPE: tl.constexpr):
    """total + a @ b on the matrix units, in bf16 or fp16 as autocast would, or in full fp32."""
    if tl.float32 == DOT_TYPE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), total)


@triton.jit
def _weight_rows(c, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr):
    """Row of x_proj's weight (dt | B | C) behind column c of B | C, and whether there is one."""
    second = c >= NP
    state = tl.where(second, c - NP, c)
    return R + state + tl.where(second, N, 0), state < N


@triton.jit
def _store_time_steps(
    low_rank, row, ok_row, dt_weight, dt_bias, delta, num_inner,
    BK: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """delta rows = softplus(low_rank @ dt_weight^T + dt_bias), held inside the range of fp16."""
    r = tl.arange(0, RP)
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        w = tl.load(dt_weight + e[None, :] * R + r[:, None], mask=live[None, :] & (r < R)[:, None], other=0.0)
        raw = _product(low_rank, w, tl.zeros([BM, BK], tl.float32), DOT_TYPE)
        raw += tl.load(dt_bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
        dt = tl.minimum(softplus(raw), 65504.0)
        place = delta + row[:, None] * num_inner + e[None, :]
        tl.store(place, dt.to(delta.dtype.element_ty), mask=ok_row[:, None] & live[None, :])


@triton.jit
def prepare_kernel(
    x, filter0, filter1, bias0, bias1, proj0, proj1, dt_weight0, dt_weight1, dt_bias0, dt_bias1, tail0, tail1,
    u, projections, delta, stride_image, stride_token, num_rows, num_tokens, num_inner,
    BM: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    PROJECT: tl.constexpr, HAS_TAIL: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """`u` = SiLU(conv(x)) and the time steps `delta`, both (2, M, E), of one direction's BM rows.

    `projections` (2, M, P), x_proj of u, is computed if PROJECT, otherwise it is there from the forward. If
    HAS_TAIL, the convolution of each direction begins with the inputs of its tail (K - 1, E).
    """
    direction = tl.program_id(1)
    row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    row += direction * num_rows
    P: tl.constexpr = 2 * NP + RP
    c = tl.arange(0, 2 * NP)
    r = tl.arange(0, RP)
    proj = proj1 if direction == 1 else proj0
    conv_weight = filter1 if direction == 1 else filter0
    conv_bias = bias1 if direction == 1 else bias0
    place, used = _weight_rows(c, N, NP, R)
    total_BC = tl.zeros([BM, 2 * NP], tl.float32)
    total_dt = tl.zeros([BM, RP], tl.float32)
    if HAS_TAIL:
        tail = tail1 if direction == 1 else tail0
        sees_tail = tl.where(direction == 1, t + K > num_tokens, t < K - 1)
        at_start = tl.max(sees_tail.to(tl.int32), axis=0) > 0
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        ok = ok_row[:, None] & live[None, :]
        y = filtered(
            x, conv_weight, conv_bias, image, t, e, ok, live, stride_image, stride_token,
            num_tokens, num_inner, 2 * direction - 1, K, HAS_BIAS,
        )  # fmt: skip
        if HAS_TAIL:  # noqa: SIM102  (the outer condition is known to the compiler)
            if at_start:  # Only there, or the compiler would keep room in shared memory for loads ahead.
                y += tail_taps(
                    tail, conv_weight, t, e, ok, live, num_tokens, num_inner, 2 * direction - 1, K, BM, BK
                )
        tile = silu(y).to(u.dtype.element_ty)
        tl.store(u + row[:, None] * num_inner + e[None, :], tile, mask=ok)
        if PROJECT:
            w_BC = tl.load(
                proj + place[None, :] * num_inner + e[:, None], mask=used[None, :] & live[:, None], other=0.0
            )
            w_dt = tl.load(
                proj + r[None, :] * num_inner + e[:, None], mask=(r < R)[None, :] & live[:, None], other=0.0
            )
            total_BC = _product(tile, w_BC, total_BC, DOT_TYPE)
            total_dt = _product(tile, w_dt, total_dt, DOT_TYPE)
    here = projections + row[:, None] * P
    if PROJECT:
        low_rank = total_dt.to(projections.dtype.element_ty)
        tl.store(here + c[None, :], total_BC.to(projections.dtype.element_ty), mask=ok_row[:, None])
        tl.store(here + 2 * NP + r[None, :], low_rank, mask=ok_row[:, None])
    else:
        low_rank = tl.load(here + 2 * NP + r[None, :], mask=ok_row[:, None], other=0.0)
    _store_time_steps(
        low_rank, row, ok_row, dt_weight1 if direction == 1 else dt_weight0,
        dt_bias1 if direction == 1 else dt_bias0, delta, num_inner, BK, R, RP, BM, DOT_TYPE,
    )  # fmt: skip


@triton.jit
def prepare_backward_kernel(
    partial_BC, grad_delta, x, filter0, filter1, bias0, bias1, proj0, proj1, dt_weight0, dt_weight1,
    grad_projections, grad_u, stride_image, stride_token, num_rows, num_tokens, num_inner, num_blocks,
    BM: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    SPREAD: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Gradient of B | C | dt_r, `grad_projections` (2, M, P): channel blocks added, d(delta) through dt_proj.

    If SPREAD, `grad_u` (2, M, E) then becomes the gradient of conv(x) in place: plus what comes through
    x_proj, times the slope of SiLU.
    """
    direction = tl.program_id(1)
    row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    P: tl.constexpr = 2 * NP + RP
    c = tl.arange(0, 2 * NP)
    r = tl.arange(0, RP)
    dt_weight = dt_weight1 if direction == 1 else dt_weight0
    proj = proj1 if direction == 1 else proj0
    conv_weight = filter1 if direction == 1 else filter0
    conv_bias = bias1 if direction == 1 else bias0
    grad_BC = tl.zeros([BM, 2 * NP], tl.float32)
    for block in range(num_blocks):
        place = (direction * num_blocks + block) * num_rows + row
        grad_BC += tl.load(partial_BC + place[:, None] * 2 * NP + c[None, :], mask=ok_row[:, None], other=0.0)
    row += direction * num_rows
    grad_dt = tl.zeros([BM, RP], tl.float32)
    for first in range(0, num_inner, BK):
        e = first + tl.arange(0, BK)
        live = e < num_inner
        ok = ok_row[:, None] & live[None, :]
        tile = tl.load(grad_delta + row[:, None] * num_inner + e[None, :], mask=ok, other=0.0)
        w = tl.load(dt_weight + e[:, None] * R + r[None, :], mask=live[:, None] & (r < R)[None, :], other=0.0)
        grad_dt = _product(tile, w, grad_dt, DOT_TYPE)
    here = grad_projections + row[:, None] * P
    tl.store(here + c[None, :], grad_BC.to(grad_projections.dtype.element_ty), mask=ok_row[:, None])
    tl.store(here + 2 * NP + r[None, :], grad_dt.to(grad_projections.dtype.element_ty), mask=ok_row[:, None])
    if SPREAD:
        place, used = _weight_rows(c, N, NP, R)
        for first in range(0, num_inner, BK):
            e = first + tl.arange(0, BK)
            live = e < num_inner
            ok = ok_row[:, None] & live[None, :]
            w_BC = tl.load(
                proj + place[:, None] * num_inner + e[None, :], mask=used[:, None] & live[None, :], other=0.0
            )
            w_dt = tl.load(
                proj + r[:, None] * num_inner + e[None, :], mask=(r < R)[:, None] & live[None, :], other=0.0
            )
            at = grad_u + row[:, None] * num_inner + e[None, :]
            total = tl.load(at, mask=ok, other=0.0).to(tl.float32)
            total = _product(grad_BC, w_BC, total, DOT_TYPE)
            total = _product(grad_dt, w_dt, total, DOT_TYPE)
            y = filtered(
                x, conv_weight, conv_bias, image, t, e, ok, live, stride_image, stride_token,
                num_tokens, num_inner, 2 * direction - 1, K, HAS_BIAS,
            )  # fmt: skip
            tl.store(at, (total * silu_slope(y)).to(grad_u.dtype.element_ty), mask=ok)


@triton.jit
def gate_grad_kernel(
    grad, z, out, stride_grad_image, stride_grad, stride_z_image, stride_z,
    num_rows, num_tokens, num_inner, scale,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradient before the gate: grad * scale * SiLU(z), (B, L, E) contiguous."""
    row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    ok = ok_row[:, None] & (e < num_inner)[None, :]
    place = (image * stride_grad_image + t * stride_grad)[:, None] + e[None, :]
    g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    place = (image * stride_z_image + t * stride_z)[:, None] + e[None, :]
    value = g * scale * silu(tl.load(z + place, mask=ok, other=0.0).to(tl.float32))
    tl.store(out + row[:, None] * num_inner + e[None, :], value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate_finish_kernel(
    grad, z, y, out, stride_grad_image, stride_grad, stride_z_image, stride_z, stride_out_image, stride_out,
    num_rows, num_tokens, num_inner, scale,
    BM: tl.constexpr, BE: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """d(z) = grad * scale * SiLU'(z) * (sum over directions of `y` (directions, B, L, E))."""
    row, image, t, ok_row = tile_rows(num_rows, num_tokens, BM, 0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    ok = ok_row[:, None] & (e < num_inner)[None, :]
    total = tl.load(y + row[:, None] * num_inner + e[None, :], mask=ok, other=0.0).to(tl.float32)
    if DIRECTIONS == 2:
        total += tl.load(y + (num_rows + row)[:, None] * num_inner + e[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
    place = (image * stride_grad_image + t * stride_grad)[:, None] + e[None, :]
    total *= scale * tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    place = (image * stride_z_image + t * stride_z)[:, None] + e[None, :]
    total *= silu_slope(tl.load(z + place, mask=ok, other=0.0).to(tl.float32))
    place = (image * stride_out_image + t * stride_out)[:, None] + e[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=ok)
