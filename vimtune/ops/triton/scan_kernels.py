"""Selective scan in Triton, forward and backward.

A program owns one image and BE channels; a thread owns whole channels with their N states in
registers, so sums over the states need no communication. Steps are visited in groups whose rows are
loaded first. The loops are kept lean, because few threads run them: u and dt arrive ready-made (but for
the softplus of the plain form), gates and their gradients are applied outside the backward.

The forward keeps the state before every CHUNK steps but the first. The backward walks the chunks from
the last to the first; inside a chunk it first notes the state before every SUB steps in scratch memory,
then recomputes SUB states at a time into registers. Sums over channels leave as one partial result per
channel block, added later in a fixed order: no atomics. With s_t = a_t s_{t-1} + dt_t u_t B_t,
y_t = <C_t, s_t> + D u_t and a_t = exp(dt_t A), the adjoint runs backwards:

    h_t = dy_t C_t + a_{t+1} h_{t+1}        dB_t = sum_e dt_t u_t h_t       dC_t = sum_e dy_t s_t
    q_t = <h_t, B_t>                        du_t = dt_t q_t + D dy_t
    ddt_t = u_t q_t + <a_t h_t s_{t-1}, A>  dA = sum_t a_t h_t s_{t-1} dt_t

Shape letters: B batch, L tokens, E inner width, N states (NP padded).
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
    silu,
    softplus,
    step_row,
    token,
)


@triton.jit
def _time_step(raw, bias, inside, SOFTPLUS: tl.constexpr):
    """dt of a step. Steps past the end get 0: they change nothing."""
    dt = raw + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(inside, dt, 0.0)


@triton.jit
def _optional(base, e, live, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(base + e, mask=live, other=0.0).to(tl.float32)
    else:
        return tl.where(live, 0.0, 0.0)


@triton.jit
def _forward_direction(
    u, z, out, states, first, last, delta, B, C, A, D, dt_bias, num_tokens, num_inner, e, live, scale,
    STRIDE_U: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_OUT: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_INNER: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, STEPS: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, FROM_LOG: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, SAVE: tl.constexpr,
    HAS_FIRST: tl.constexpr, NEED_LAST: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, NP)
    used = below(n, N, N == NP)
    decay = load_decay(A, n, e, live, N, FROM_LOG)
    skip = _optional(D, e, live, HAS_D)
    bias = _optional(dt_bias, e, live, HAS_DT_BIAS)
    in_state = used[:, None] & live[None, :]
    state = tl.zeros([NP, e.shape[0]], tl.float32)
    if HAS_FIRST:
        state = tl.load((first + e)[None, :] + n[:, None] * STRIDE_INNER, mask=in_state, other=0.0)
    for start in range(0, num_tokens, STEPS):
        if SAVE:  # noqa: SIM102  (the outer condition is known to the compiler)
            if (start % CHUNK == 0) & (start > 0):
                place = group_rows(states, e, (start // CHUNK - 1) * N, 0, STRIDE_INNER, False)
                tl.store(place[None, :] + n[:, None] * STRIDE_INNER, state, mask=in_state)
        us = load_rows(u, e, live, start, num_tokens, STRIDE_U, 0, STEPS, REVERSE)
        raws = load_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, 0, STEPS, REVERSE)
        Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, STEPS, REVERSE)
        Cs = load_vectors(C, n, used, start, num_tokens, STRIDE_C, STEPS, REVERSE)
        out_group = group_rows(out, e, start, num_tokens, STRIDE_OUT, REVERSE)
        if FINISH and HAS_Z:
            gates = load_rows(z, e, live, start, num_tokens, STRIDE_Z, 0, STEPS, REVERSE)
        if ADD:
            others = load_rows(out, e, live, start, num_tokens, STRIDE_OUT, 0, STEPS, REVERSE)
        for k in tl.static_range(STEPS):
            inside = exists(start + k, num_tokens, live)
            dt = _time_step(raws[k], bias, inside, SOFTPLUS)
            state = tl.exp2(dt[None, :] * decay) * state + (dt * us[k])[None, :] * Bs[k][:, None]
            y = tl.sum(state * Cs[k][:, None], axis=0) + skip * us[k]
            if ADD:
                y += others[k]
            if FINISH:
                y *= scale
                if HAS_Z:
                    y *= silu(gates[k])
            row = step_row(out_group, k, STRIDE_OUT, REVERSE)
            tl.store(row, y.to(out.dtype.element_ty), mask=live & inside)
    if NEED_LAST:
        tl.store((last + e)[None, :] + n[:, None] * STRIDE_INNER, state, mask=in_state)


@triton.jit(do_not_specialize=["zero"])
def scan_forward_kernel(
    u, z, out, states, first, last, delta, B, C, A0, A1, D0, D1, dt_bias0, dt_bias1,
    stride_u_image, stride_z_image, stride_out_image, stride_delta_image, stride_B_image, stride_C_image,
    stride_u_direction, stride_delta_direction, stride_BC_direction,
    stride_first_image, stride_first_direction,
    batch, num_tokens, num_inner, num_chunks, zero, scale,
    STRIDE_U: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_OUT: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_INNER: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SOFTPLUS: tl.constexpr, FROM_LOG: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr, SAVE: tl.constexpr,
    HAS_FIRST: tl.constexpr, NEED_LAST: tl.constexpr,
):  # fmt: skip
    """Directions FIRST..LAST (0 forward, 1 reverse) of one image and BE channels, one after the other.

    If HAS_FIRST, each begins with a state of `first`, which has them for each image or for each direction. If
    NEED_LAST, there is one direction, which leaves `last` (B, N, E).
    """
    # `zero` hides from the compiler that rows are aligned: loading vectors of channels would give a
    # thread the states of all of them, and the layouts of rows and states would differ.
    e = tl.program_id(0) * BE + tl.arange(0, BE) + zero
    live = below(e, num_inner, EVEN)
    image = tl.program_id(1).to(tl.int64)
    for d in tl.static_range(FIRST, LAST + 1):
        if d > FIRST:
            tl.debug_barrier()  # The second direction reads what the first one wrote.
        _forward_direction(
            u + (d - FIRST) * stride_u_direction + image * stride_u_image,
            z + image * stride_z_image,
            out + image * stride_out_image,
            states + ((d - FIRST) * batch + image) * (num_chunks - 1) * N * num_inner,
            first + image * stride_first_image + (d - FIRST) * stride_first_direction,
            last + image * N * num_inner,
            delta + (d - FIRST) * stride_delta_direction + image * stride_delta_image,
            B + (d - FIRST) * stride_BC_direction + image * stride_B_image,
            C + (d - FIRST) * stride_BC_direction + image * stride_C_image,
            A1 if d else A0, D1 if d else D0, dt_bias1 if d else dt_bias0,
            num_tokens, num_inner, e, live, scale,
            STRIDE_U, STRIDE_Z, STRIDE_OUT, STRIDE_DELTA, STRIDE_B, STRIDE_C, STRIDE_INNER,
            N, NP, STEPS, CHUNK,
            d == 1, SOFTPLUS, FROM_LOG, HAS_D, HAS_Z, HAS_DT_BIAS, SAVE, HAS_FIRST, NEED_LAST,
            d > FIRST, d == LAST,
        )  # fmt: skip


@triton.jit
def _backward_direction(
    grad, u, states, first, grad_last, grad_first, scratch, delta, B, C, A, D, dt_bias,
    grad_u, grad_delta, y_out, partial_BC, partial_A, partial_D, partial_bias,
    num_tokens, num_inner, num_chunks, e, e_local, live,
    STRIDE_GRAD: tl.constexpr, STRIDE_U: tl.constexpr, STRIDE_DELTA: tl.constexpr, STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_INNER: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BE: tl.constexpr,
    SUB: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    SLOPE: tl.constexpr, FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_DELTA: tl.constexpr, NEED_A: tl.constexpr, NEED_BC: tl.constexpr, NEED_D: tl.constexpr,
    NEED_Y: tl.constexpr, NEED_BIAS: tl.constexpr, DOT: tl.constexpr, DOT_TYPE: tl.constexpr,
    HAS_STATE: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, NP)
    used = below(n, N, N == NP)
    NUM_SUBS: tl.constexpr = CHUNK // SUB
    ROWS: tl.constexpr = 16 if 2 * SUB < 16 else 2 * SUB
    in_state = used[:, None] & live[None, :]
    # Addresses of one row plus constants: a register pair instead of one for each state.
    scratch_row = scratch + e_local
    decay = load_decay(A, n, e, live, N, FROM_LOG)
    skip = _optional(D, e, live, HAS_D)
    bias = _optional(dt_bias, e, live, HAS_DT_BIAS)
    carry = tl.zeros([NP, BE], tl.float32)
    if HAS_STATE:
        carry = tl.load((grad_last + e)[None, :] + n[:, None] * STRIDE_INNER, mask=in_state, other=0.0)
    if NEED_A:
        sum_A = tl.zeros([NP, BE], tl.float32)
    sum_D = tl.zeros([BE], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    selector = tl.arange(0, ROWS)[:, None] - (tl.arange(0, 2 * BE) % 2)[None, :] * SUB

    for back in range(num_chunks):
        chunk = num_chunks - 1 - back
        place = group_rows(states, e, (chunk - 1) * N, 0, STRIDE_INNER, False)
        saved = in_state & exists(chunk - 1, num_chunks, live)[None, :]
        state = tl.load(place[None, :] + n[:, None] * STRIDE_INNER, mask=saved, other=0.0)
        if HAS_STATE:  # noqa: SIM102
            if chunk == 0:
                state = tl.load((first + e)[None, :] + n[:, None] * STRIDE_INNER, mask=in_state, other=0.0)
        if NUM_SUBS > 1:
            for sub in range(NUM_SUBS - 1):
                start = chunk * CHUNK + sub * SUB
                us = load_rows(u, e, live, start, num_tokens, STRIDE_U, 0, SUB, REVERSE)
                raws = load_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, 0, SUB, REVERSE)
                Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, SUB, REVERSE)
                tl.store((scratch_row + sub * NP * BE)[None, :] + n[:, None] * BE, state)
                for k in tl.static_range(SUB):
                    dt = _time_step(raws[k], bias, exists(start + k, num_tokens, live), SOFTPLUS)
                    state = tl.exp2(dt[None, :] * decay) * state + (dt * us[k])[None, :] * Bs[k][:, None]
        for sub_back in range(NUM_SUBS):
            sub = NUM_SUBS - 1 - sub_back
            start = chunk * CHUNK + sub * SUB
            if NUM_SUBS > 1:  # noqa: SIM102
                if sub_back > 0:
                    state = tl.load((scratch_row + sub * NP * BE)[None, :] + n[:, None] * BE)
            us = load_rows(u, e, live, start, num_tokens, STRIDE_U, 0, SUB, REVERSE)
            raws = load_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, 0, SUB, REVERSE)
            Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, SUB, REVERSE)
            grads = load_rows(grad, e, live, start, num_tokens, STRIDE_GRAD, 0, SUB, REVERSE)
            grad_u_group = group_rows(grad_u, e, start, num_tokens, STRIDE_INNER, REVERSE)
            grad_delta_group = group_rows(grad_delta, e, start, num_tokens, STRIDE_INNER, REVERSE)
            y_group = group_rows(y_out, e, start, num_tokens, STRIDE_INNER, REVERSE)
            kept = (state,)
            for k in tl.static_range(SUB):
                dt = _time_step(raws[k], bias, exists(start + k, num_tokens, live), SOFTPLUS)
                state = tl.exp2(dt[None, :] * decay) * state + (dt * us[k])[None, :] * Bs[k][:, None]
                kept = kept + (state,)  # type: ignore[assignment]  # noqa: RUF005
            # Loaded anew: were they the same values the compiler would keep every decay in registers.
            raws = load_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, 0, SUB, REVERSE)
            Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, SUB, REVERSE)
            Cs = load_vectors(C, n, used, start, num_tokens, STRIDE_C, SUB, REVERSE)
            sums = tl.zeros([ROWS, NP], tl.float32)
            for k in tl.static_range(SUB - 1, -1, -1):
                inside = exists(start + k, num_tokens, live)
                grad_y = grads[k]
                if NEED_Y:
                    y = tl.sum(kept[k + 1] * Cs[k][:, None], axis=0) + skip * us[k]
                    row = step_row(y_group, k, STRIDE_INNER, REVERSE)
                    tl.store(row, y.to(y_out.dtype.element_ty), mask=live & inside)
                dt = _time_step(raws[k], bias, inside, SOFTPLUS)
                adjoint = grad_y[None, :] * Cs[k][:, None] + carry
                carry = tl.exp2(dt[None, :] * decay) * adjoint
                through = tl.sum(adjoint * Bs[k][:, None], axis=0)
                if NEED_BC:
                    part_B = adjoint * (dt * us[k])[None, :]
                    part_C = kept[k + 1] * grad_y[None, :]
                    if DOT:
                        # The matrix units add over channels: a row of the first factor picks the even
                        # (dB) or odd (dC) columns and the row of `sums` that this step owns.
                        pair = tl.join(part_B.to(DOT_TYPE), part_C.to(DOT_TYPE)).reshape([NP, 2 * BE])
                        sums = tl.dot((selector == k).to(DOT_TYPE), tl.trans(pair), sums)
                    else:
                        row = partial_BC + token(start + k, num_tokens, REVERSE) * 2 * NP + n
                        in_sequence = exists(start + k, num_tokens, n)
                        tl.store(row, tl.sum(part_B, axis=1), mask=in_sequence)
                        tl.store(row + NP, tl.sum(part_C, axis=1), mask=in_sequence)
                if NEED_DELTA or NEED_A or NEED_BIAS:
                    exponent = carry * kept[k]
                    if NEED_A:
                        sum_A += exponent * dt[None, :]
                    if NEED_DELTA or NEED_BIAS:
                        grad_dt = tl.sum(exponent * decay, axis=0) * (1.0 / LOG2E) + through * us[k]
                        if SLOPE:  # The slope of softplus is 1 - e^-dt, where dt is its result.
                            grad_dt *= 1.0 - tl.exp2(dt * -LOG2E)
                        if NEED_BIAS:
                            sum_bias += tl.where(inside, grad_dt, 0.0)
                        if NEED_DELTA:
                            row = step_row(grad_delta_group, k, STRIDE_INNER, REVERSE)
                            tl.store(row, grad_dt.to(grad_delta.dtype.element_ty), mask=live & inside)
                if NEED_D:
                    sum_D += grad_y * us[k]
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
    if HAS_STATE:
        tl.store((grad_first + e)[None, :] + n[:, None] * STRIDE_INNER, carry, mask=in_state)
    if NEED_A:
        tl.store((partial_A + e)[None, :] + n[:, None] * STRIDE_INNER, sum_A, mask=in_state)
    if NEED_D:
        tl.store(partial_D + e, sum_D, mask=live)
    if NEED_BIAS:
        tl.store(partial_bias + e, sum_bias, mask=live)


@triton.jit(do_not_specialize=["zero"])
def scan_backward_kernel(
    grad, u, states, first, grad_last, grad_first, scratch, delta, B, C, A0, A1, D0, D1, dt_bias0, dt_bias1,
    grad_u, grad_delta, y_out, partial_BC, partial_A, partial_D, partial_bias,
    stride_grad_image, stride_u_image, stride_delta_image, stride_B_image, stride_C_image,
    stride_u_direction, stride_delta_direction, stride_BC_direction,
    batch, num_tokens, num_inner, num_chunks, zero,
    STRIDE_GRAD: tl.constexpr, STRIDE_U: tl.constexpr, STRIDE_DELTA: tl.constexpr, STRIDE_B: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_INNER: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    BE: tl.constexpr, EVEN: tl.constexpr, SUB: tl.constexpr, CHUNK: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SOFTPLUS: tl.constexpr, SLOPE: tl.constexpr,
    FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_DT_BIAS: tl.constexpr, NEED_U: tl.constexpr,
    NEED_DELTA: tl.constexpr,
    NEED_A: tl.constexpr, NEED_BC: tl.constexpr, NEED_D: tl.constexpr, NEED_Y: tl.constexpr,
    NEED_BIAS: tl.constexpr, DOT: tl.constexpr, DOT_TYPE: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """One image, BE channels and one direction. `grad` is that of y, before the gate. `grad_u`, `grad_delta`,
    `y_out`: (directions, B, L, E) contiguous; `partial_BC`: (directions, channel blocks, B, L, 2 NP);
    `partial_A` (directions, B, N, E), `partial_D`, `partial_bias` (directions, B, E). If HAS_STATE, there is
    one direction, which begins with `first`; `grad_last`, `grad_first` are gradients of states (B, N, E)."""
    block = tl.program_id(0)
    e_local = tl.arange(0, BE) + zero  # `scan_forward_kernel` says why zero is added.
    e = block * BE + e_local
    live = below(e, num_inner, EVEN)
    image = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2)
    num_blocks = tl.num_programs(0)
    slot = d * batch + image
    flat = slot * num_blocks + block
    grad += image * stride_grad_image
    u += d * stride_u_direction + image * stride_u_image
    delta += d * stride_delta_direction + image * stride_delta_image
    B += d * stride_BC_direction + image * stride_B_image
    C += d * stride_BC_direction + image * stride_C_image
    states += slot * (num_chunks - 1) * N * num_inner
    scratch += flat * (CHUNK // SUB) * NP * BE
    grad_u += slot * num_tokens * num_inner
    grad_delta += slot * num_tokens * num_inner
    y_out += slot * num_tokens * num_inner
    partial_BC += ((d * num_blocks + block) * batch + image) * num_tokens * 2 * NP
    partial_A += slot * N * num_inner
    partial_D += slot * num_inner
    partial_bias += slot * num_inner
    for direction in tl.static_range(FIRST, LAST + 1):
        if d + FIRST == direction:
            _backward_direction(
                grad, u, states, first + image * N * num_inner, grad_last + image * N * num_inner,
                grad_first + image * N * num_inner, scratch, delta, B, C,
                A1 if direction else A0, D1 if direction else D0, dt_bias1 if direction else dt_bias0,
                grad_u, grad_delta, y_out, partial_BC, partial_A, partial_D, partial_bias,
                num_tokens, num_inner, num_chunks, e, e_local, live,
                STRIDE_GRAD, STRIDE_U, STRIDE_DELTA, STRIDE_B, STRIDE_C, STRIDE_INNER, N, NP, BE, SUB, CHUNK,
                direction == 1, SOFTPLUS, SLOPE, FROM_LOG, HAS_D, HAS_DT_BIAS, NEED_U, NEED_DELTA, NEED_A,
                NEED_BC, NEED_D, NEED_Y, NEED_BIAS, DOT, DOT_TYPE, HAS_STATE,
            )  # fmt: skip
