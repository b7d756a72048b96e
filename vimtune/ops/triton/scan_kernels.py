"""Selective scan in Triton, forward and backward, one or both directions in a launch.

A program owns one image and BE channels; a thread owns whole channels with their N states in
registers, so reductions over the states need no communication. Steps are visited in groups whose
rows are loaded first, which hides the latency of the loads behind the recurrence.

The kernels run in two forms. Plain (`K == 0`): `u` and `delta` are given, as the backend protocol
wants. Fused (`K > 0`): `u = silu(conv(x))` and `delta = dt_r @ W_dt^T` are computed on the way, so
neither ever reaches memory, and both directions are averaged and gated in place.

The forward keeps the state before every CHUNK steps. The backward walks the chunks from the last to
the first; inside a chunk it first notes the state before every SUB steps in scratch memory, then
recomputes SUB states at a time into registers. Sums over channels leave as one partial result per
channel block, added later in a fixed order: no atomics.

Shape letters: B batch, L tokens, E inner width, N states (NP padded), R dt rank (RP padded), K filter width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimtune.ops.triton.common import (
    below,
    exists,
    group_rows,
    load_columns,
    load_decay,
    load_rows,
    load_transposed,
    load_vectors,
    silu,
    softplus,
    step_row,
)


@triton.jit
def _conv_step(rows, columns, conv_bias, k: tl.constexpr, K: tl.constexpr):
    total = conv_bias
    for j in tl.static_range(K):
        total += columns[j] * rows[k + j]
    return silu(total)


@triton.jit
def _inputs(
    rows, times, columns, conv_bias, dt_weight, dt_bias, inside,
    k: tl.constexpr, K: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """u, the time step before and after softplus. Steps past the end get dt = 0: they change nothing."""
    if K > 0:
        u = _conv_step(rows, columns, conv_bias, k, K)
        raw = tl.sum(times[k][:, None] * dt_weight, axis=0) + dt_bias
    else:
        u = rows[k]
        raw = times[k] + dt_bias
    dt = softplus(raw) if SOFTPLUS else raw
    return u, raw, tl.where(inside, dt, 0.0)


@triton.jit
def _parameters(
    conv_weight, conv_bias, dt_weight, dt_bias, e, live,
    R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """What a thread keeps in registers for its channels: filter, dt projection and the biases."""
    nothing = tl.where(live, 0.0, 0.0)
    columns = load_columns(conv_weight, e, live, K)
    conv_b = tl.load(conv_bias + e, mask=live, other=0.0).to(tl.float32) if HAS_CONV_BIAS else nothing
    dt_b = tl.load(dt_bias + e, mask=live, other=0.0).to(tl.float32) if HAS_DT_BIAS else nothing
    if K > 0:
        r = tl.arange(0, RP)
        dt_w = load_transposed(dt_weight, r, e, live, R, 0.0)
    else:
        dt_w = nothing
    return columns, conv_b, dt_w, dt_b


@triton.jit
def _time_rows(
    delta, e, live, start, num_tokens,
    STRIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    if K > 0:
        r = tl.arange(0, RP)
        return load_vectors(delta, r, below(r, R, R == RP), start, num_tokens, STRIDE, STEPS, REVERSE)
    else:
        return load_rows(delta, e, live, start, num_tokens, STRIDE, 0, STEPS, REVERSE)


@triton.jit
def _forward_direction(
    x, z, out, states, delta, B, C, A, D, dt_bias, conv_weight, conv_bias, dt_weight,
    num_tokens, num_inner, e, live, zero, scale,
    STRIDE_X: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_OUT: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, SAVE: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, NP)
    used = below(n, N, N == NP)
    BEFORE: tl.constexpr = K - 1 if K > 0 else 0
    decay = load_decay(A, n, e, live, N, FROM_LOG)
    columns, conv_b, dt_w, dt_b = _parameters(
        conv_weight, conv_bias, dt_weight, dt_bias, e, live, R, RP, K, HAS_DT_BIAS, HAS_CONV_BIAS
    )
    if HAS_D:
        skip = tl.load(D + e, mask=live, other=0.0).to(tl.float32)
    state = tl.zeros([NP, e.shape[0]], tl.float32)
    for start in range(0, num_tokens, STEPS):
        if SAVE:
            if start % CHUNK == 0:
                place = states + (start // CHUNK) * N * num_inner + n[:, None] * num_inner + e[None, :]
                tl.store(place, state, mask=used[:, None] & live[None, :])
        rows = load_rows(x, e, live, start, num_tokens, STRIDE_X, BEFORE, STEPS, REVERSE)
        times = _time_rows(delta, e, live, start, num_tokens, STRIDE_DELTA, R, RP, K, STEPS, REVERSE)
        Bs = load_vectors(B, n, used, start, num_tokens, STRIDE_B, STEPS, REVERSE)
        Cs = load_vectors(C, n, used, start, num_tokens, STRIDE_C, STEPS, REVERSE)
        out_group = group_rows(out, e, start, num_tokens, STRIDE_OUT, REVERSE)
        if FINISH and HAS_Z:
            gates = load_rows(z, e, live, start, num_tokens, STRIDE_Z, 0, STEPS, REVERSE)
        if ADD:
            others = load_rows(out, e, live, start, num_tokens, STRIDE_OUT, 0, STEPS, REVERSE)
        for k in tl.static_range(STEPS):
            inside = exists(start + k, num_tokens, live)
            u, _raw, dt = _inputs(rows, times, columns, conv_b, dt_w, dt_b, inside, k, K, SOFTPLUS)
            state = tl.exp2(dt[None, :] * decay) * state + (dt * u)[None, :] * Bs[k][:, None]
            y = tl.sum(state * Cs[k][:, None], axis=0)
            if HAS_D:
                y += skip * u
            if ADD:
                y += others[k]
            if FINISH:
                y *= scale
                if HAS_Z:
                    y *= silu(gates[k])
            row = step_row(out_group, k, STRIDE_OUT, REVERSE)
            tl.store(row, y.to(out.dtype.element_ty), mask=live & inside)


@triton.jit(do_not_specialize=["zero"])
def scan_forward_kernel(
    x, z, out, states, delta, B, C,
    A0, A1, D0, D1, dt_bias0, dt_bias1, conv_weight0, conv_weight1, conv_bias0, conv_bias1, dt_weight0, dt_weight1,
    stride_x_image, stride_z_image, stride_out_image, stride_delta_image, stride_B_image, stride_C_image,
    stride_direction, batch, num_tokens, num_inner, num_chunks, zero, scale,
    STRIDE_X: tl.constexpr, STRIDE_Z: tl.constexpr, STRIDE_OUT: tl.constexpr, STRIDE_DELTA: tl.constexpr,
    STRIDE_B: tl.constexpr, STRIDE_C: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
    BE: tl.constexpr, EVEN: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr, FROM_LOG: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Directions FIRST..LAST (0 forward, 1 reverse) of one image and BE channels, one after the other."""
    # `zero` hides from the compiler that rows are aligned: vectors of channels would cost a thread the
    # states of all of them, and the layouts of rows and states would differ.
    e = tl.program_id(0) * BE + tl.arange(0, BE) + zero
    live = below(e, num_inner, EVEN)
    image = tl.program_id(1).to(tl.int64)
    for d in tl.static_range(FIRST, LAST + 1):
        if d > FIRST:
            tl.debug_barrier()  # the second direction reads what the first one wrote
        slot = (d - FIRST) * batch + image
        _forward_direction(
            x + image * stride_x_image, z + image * stride_z_image, out + image * stride_out_image,
            states + slot * num_chunks * N * num_inner,
            delta + (d - FIRST) * stride_direction + image * stride_delta_image,
            B + (d - FIRST) * stride_direction + image * stride_B_image,
            C + (d - FIRST) * stride_direction + image * stride_C_image,
            A1 if d else A0, D1 if d else D0, dt_bias1 if d else dt_bias0,
            conv_weight1 if d else conv_weight0, conv_bias1 if d else conv_bias0, dt_weight1 if d else dt_weight0,
            num_tokens, num_inner, e, live, zero, scale,
            STRIDE_X, STRIDE_Z, STRIDE_OUT, STRIDE_DELTA, STRIDE_B, STRIDE_C,
            N, NP, R, RP, K, STEPS, CHUNK, d == 1, SOFTPLUS, FROM_LOG, HAS_D, HAS_Z, HAS_DT_BIAS, HAS_CONV_BIAS,
            SAVE, d > FIRST, d == LAST,
        )  # fmt: skip
