"""Backward of the selective scan in Triton; see `scan_kernels.py` for the plan and the two forms.

With s_t = a_t s_{t-1} + dt_t u_t B_t, y_t = <C_t, s_t> and a_t = exp(dt_t A) the adjoint runs backwards:

    h_t = dy_t C_t + a_{t+1} h_{t+1}        dB_t = sum_e dt_t u_t h_t       dC_t = sum_e dy_t s_t
    q_t = <h_t, B_t>                        du_t = dt_t q_t + D dy_t
    ddt_t = u_t q_t + <a_t h_t s_{t-1}, A>  dA = sum_t a_t h_t s_{t-1} dt_t

Shape letters: B batch, L tokens, E inner width, N states (NP padded), R dt rank (RP padded), K filter width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimtune.ops.triton.common import (
    LOG2E,
    below,
    exists,
    group_rows,
    load_decay,
    load_rows,
    load_vectors,
    sigmoid,
    silu_slope,
    step_row,
    token,
)
from vimtune.ops.triton.scan_kernels import _inputs, _parameters, _time_rows


@triton.jit
def _backward_direction(
    grad, x, z, states, scratch, delta, B, C, A, D, dt_bias, conv_weight, conv_bias, dt_weight,
    grad_u, grad_delta, grad_z, partial_BC, partial_A, partial_D, partial_bias,
    num_tokens, num_inner, num_chunks, e, live, zero, scale,
    STRIDE_GRAD: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_GRAD_Z: tl.constexpr, STRIDE_INNER: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    BE: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, NEED_U: tl.constexpr, NEED_DELTA: tl.constexpr, NEED_A: tl.constexpr,
    NEED_BC: tl.constexpr, NEED_D: tl.constexpr, NEED_Z: tl.constexpr, NEED_BIAS: tl.constexpr,
    ADD: tl.constexpr, FINISH: tl.constexpr, DOT: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, NP)
    used = below(n, N, N == NP)
    BEFORE: tl.constexpr = K - 1 if K > 0 else 0
    NUM_SUBS: tl.constexpr = CHUNK // SUB
    ROWS: tl.constexpr = 16 if 2 * SUB < 16 else 2 * SUB
    in_state = used[:, None] & live[None, :]
    place = n[:, None] * num_inner + e[None, :]
    scratch_place = n[:, None] * BE + (tl.arange(0, BE) + zero)[None, :]
    decay = load_decay(A, n, e, live, N, FROM_LOG)
    columns, conv_b, dt_w, dt_b = _parameters(
        conv_weight, conv_bias, dt_weight, dt_bias, e, live, R, RP, K, HAS_DT_BIAS, HAS_CONV_BIAS
    )
    skip = tl.load(D + e, mask=live, other=0.0).to(tl.float32) if HAS_D else tl.where(live, 0.0, 0.0)
    carry = tl.zeros([NP, BE], tl.float32)
    if NEED_A:
        sum_A = tl.zeros([NP, BE], tl.float32)
    sum_D = tl.zeros([BE], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    selector = tl.arange(0, ROWS)[:, None] - (tl.arange(0, 2 * BE) % 2)[None, :] * SUB

    for back in range(num_chunks):
        chunk = num_chunks - 1 - back
        state = tl.load(states + chunk * N * num_inner + place, mask=in_state, other=0.0)
        if NUM_SUBS > 1:
            for sub in range(NUM_SUBS - 1):
                start = chunk * CHUNK + sub * SUB
                rows = load_rows(x, e, live, start, num_tokens, STRIDE_X, BEFORE, SUB, REVERSE)
                times = _time_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, R, RP, K, SUB, REVERSE)
                Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, SUB, REVERSE)
                tl.store(scratch + sub * NP * BE + scratch_place, state)
                for k in tl.static_range(SUB):
                    u, _raw, dt = _inputs(
                        rows, times, columns, conv_b, dt_w, dt_b, exists(start + k, num_tokens, live), k, K, SOFTPLUS
                    )
                    state = tl.exp2(dt[None, :] * decay) * state + (dt * u)[None, :] * Bs[k][:, None]
        for sub_back in range(NUM_SUBS):
            sub = NUM_SUBS - 1 - sub_back
            start = chunk * CHUNK + sub * SUB
            if NUM_SUBS > 1:
                if sub_back > 0:
                    state = tl.load(scratch + sub * NP * BE + scratch_place)
            rows = load_rows(x, e, live, start, num_tokens, STRIDE_X, BEFORE, SUB, REVERSE)
            times = _time_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, R, RP, K, SUB, REVERSE)
            Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, SUB, REVERSE)
            Cs = load_vectors(C, n, used, start, num_tokens, STRIDE_C, SUB, REVERSE)
            grads = load_rows(grad, e, live, start, num_tokens, STRIDE_GRAD, 0, SUB, REVERSE)
            grad_z_group = group_rows(grad_z, e, start, num_tokens, STRIDE_GRAD_Z, REVERSE)
            grad_u_group = group_rows(grad_u, e, start, num_tokens, STRIDE_INNER, REVERSE)
            grad_delta_group = group_rows(grad_delta, e, start, num_tokens, STRIDE_INNER, REVERSE)
            if HAS_Z:
                gates = load_rows(z, e, live, start, num_tokens, STRIDE_Z, 0, SUB, REVERSE)
            if ADD and NEED_Z:
                others = load_rows(grad_z, e, live, start, num_tokens, STRIDE_GRAD_Z, 0, SUB, REVERSE)

            kept = (state,)
            us = ()
            dts = ()
            slopes = ()
            for k in tl.static_range(SUB):
                inside = exists(start + k, num_tokens, live)
                u, raw, dt = _inputs(rows, times, columns, conv_b, dt_w, dt_b, inside, k, K, SOFTPLUS)
                state = tl.exp2(dt[None, :] * decay) * state + (dt * u)[None, :] * Bs[k][:, None]
                kept = kept + (state,)  # noqa: RUF005
                us = us + (u,)  # noqa: RUF005
                dts = dts + (dt,)  # noqa: RUF005
                slopes = slopes + (sigmoid(raw) if SOFTPLUS else tl.where(live, 1.0, 1.0),)  # noqa: RUF005

            sums = tl.zeros([ROWS, NP], tl.float32)
            for k in tl.static_range(SUB - 1, -1, -1):
                inside = exists(start + k, num_tokens, live)
                u = us[k]
                dt = dts[k]
                grad_y = grads[k] * scale
                if HAS_Z:
                    if NEED_Z:
                        y = tl.sum(kept[k + 1] * Cs[k][:, None], axis=0) + skip * u
                        if ADD:
                            y += others[k]
                        if FINISH:
                            y *= grad_y * silu_slope(gates[k])
                        row = step_row(grad_z_group, k, STRIDE_GRAD_Z, REVERSE)
                        tl.store(row, y.to(grad_z.dtype.element_ty), mask=live & inside)
                    grad_y *= gates[k] * sigmoid(gates[k])
                adjoint = grad_y[None, :] * Cs[k][:, None] + carry
                carry = tl.exp2(dt[None, :] * decay) * adjoint
                through = tl.sum(adjoint * Bs[k][:, None], axis=0)
                if NEED_BC:
                    part_B = adjoint * (dt * u)[None, :]
                    part_C = kept[k + 1] * grad_y[None, :]
                    if DOT:
                        # The matrix units add over channels: a row of the first factor picks the even
                        # (dB) or odd (dC) columns and the row of `sums` that this step owns.
                        pair = tl.join(part_B.to(DOT_TYPE), part_C.to(DOT_TYPE)).reshape([NP, 2 * BE])
                        pick = (selector == k).to(DOT_TYPE)
                        sums = tl.dot(pick, tl.trans(pair), sums)
                    else:
                        row = partial_BC + token(start + k, num_tokens, REVERSE) * 2 * NP + n
                        tl.store(row, tl.sum(part_B, axis=1), mask=exists(start + k, num_tokens, n))
                        tl.store(row + NP, tl.sum(part_C, axis=1), mask=exists(start + k, num_tokens, n))
                if NEED_DELTA or NEED_A or NEED_BIAS:
                    exponent = carry * kept[k]
                    grad_raw = (tl.sum(exponent * decay, axis=0) * (1.0 / LOG2E) + through * u) * slopes[k]
                    grad_raw = tl.where(inside, grad_raw, 0.0)
                    if NEED_A:
                        sum_A += exponent * dt[None, :]
                    if NEED_BIAS:
                        sum_bias += grad_raw
                    if NEED_DELTA:
                        row = step_row(grad_delta_group, k, STRIDE_INNER, REVERSE)
                        tl.store(row, grad_raw.to(grad_delta.dtype.element_ty), mask=live & inside)
                if NEED_D:
                    sum_D += grad_y * u
                if NEED_U:
                    row = step_row(grad_u_group, k, STRIDE_INNER, REVERSE)
                    value = through * dt + skip * grad_y
                    tl.store(row, value.to(grad_u.dtype.element_ty), mask=live & inside)
            if NEED_BC and DOT:
                index = tl.arange(0, ROWS)
                step = start + index % SUB
                t = token(step, num_tokens, REVERSE)
                row = partial_BC + t[:, None] * 2 * NP + (index // SUB)[:, None] * NP + n[None, :]
                tl.store(row, sums, mask=((index < 2 * SUB) & (step < num_tokens))[:, None])
    if NEED_A:
        tl.store(partial_A + place, sum_A, mask=in_state)
    if NEED_D:
        tl.store(partial_D + e, sum_D, mask=live)
    if NEED_BIAS:
        tl.store(partial_bias + e, sum_bias, mask=live)


@triton.jit(do_not_specialize=["zero"])
def scan_backward_kernel(
    grad, x, z, states, scratch, delta, B, C,
    A0, A1, D0, D1, dt_bias0, dt_bias1, conv_weight0, conv_weight1, conv_bias0, conv_bias1, dt_weight0, dt_weight1,
    grad_u, grad_delta, grad_z, partial_BC, partial_A, partial_D, partial_bias,
    stride_grad_image, stride_x_image, stride_z_image, stride_delta_image, stride_B_image, stride_C_image,
    stride_direction, stride_grad_z_image, batch, num_tokens, num_inner, num_chunks, zero, scale,
    STRIDE_GRAD: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_GRAD_Z: tl.constexpr, STRIDE_INNER: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    BE: tl.constexpr, EVEN: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr, FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, NEED_U: tl.constexpr, NEED_DELTA: tl.constexpr,
    NEED_A: tl.constexpr, NEED_BC: tl.constexpr, NEED_D: tl.constexpr, NEED_Z: tl.constexpr,
    NEED_BIAS: tl.constexpr, DOT: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of one image and BE channels. `grad_u`, `grad_delta`: (directions, B, L, E) contiguous;
    `partial_BC`: (directions, channel blocks, B, L, 2 NP); `partial_A` (directions, B, N, E),
    `partial_D`, `partial_bias` (directions, B, E)."""
    block = tl.program_id(0)
    e = block * BE + tl.arange(0, BE) + zero  # see scan_forward_kernel
    live = below(e, num_inner, EVEN)
    image = tl.program_id(1).to(tl.int64)
    num_blocks = tl.num_programs(0)
    own_scratch = scratch + (image * num_blocks + block) * (CHUNK // SUB) * NP * BE
    for d in tl.static_range(FIRST, LAST + 1):
        if d > FIRST:
            tl.debug_barrier()  # the second direction reads what the first one wrote
        slot = (d - FIRST) * batch + image
        _backward_direction(
            grad + image * stride_grad_image, x + image * stride_x_image, z + image * stride_z_image,
            states + slot * num_chunks * N * num_inner, own_scratch,
            delta + (d - FIRST) * stride_direction + image * stride_delta_image,
            B + (d - FIRST) * stride_direction + image * stride_B_image,
            C + (d - FIRST) * stride_direction + image * stride_C_image,
            A1 if d else A0, D1 if d else D0, dt_bias1 if d else dt_bias0,
            conv_weight1 if d else conv_weight0, conv_bias1 if d else conv_bias0, dt_weight1 if d else dt_weight0,
            grad_u + slot * num_tokens * num_inner, grad_delta + slot * num_tokens * num_inner,
            grad_z + image * stride_grad_z_image,
            partial_BC + (((d - FIRST) * num_blocks + block) * batch + image) * num_tokens * 2 * NP,
            partial_A + slot * N * num_inner, partial_D + slot * num_inner, partial_bias + slot * num_inner,
            num_tokens, num_inner, num_chunks, e, live, zero, scale,
            STRIDE_GRAD, STRIDE_X, STRIDE_Z, STRIDE_DELTA, STRIDE_B, STRIDE_C, STRIDE_GRAD_Z, STRIDE_INNER,
            N, NP, R, RP, K, BE, SUB, CHUNK, d == 1, SOFTPLUS, FROM_LOG, HAS_D, HAS_Z, HAS_DT_BIAS, HAS_CONV_BIAS,
            NEED_U, NEED_DELTA, NEED_A, NEED_BC, NEED_D, NEED_Z, NEED_BIAS, d > FIRST, d == LAST, DOT, DOT_TYPE,
        )  # fmt: skip
