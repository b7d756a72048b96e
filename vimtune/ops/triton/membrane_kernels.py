"""The membranes of Memba in one pass, forward and backward.

A program handles BW columns of ROWS places, a place being token k of every chunk of one sample: it goes
through the chunks one by one. Columns that are no gates are copied on the way.

Shape letters: B batch, L tokens, W columns, of which those from `first` to `end` are gates, c tokens of a
chunk. A sample has max(c, 1) places.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRED = tl.constexpr(-2147483648)
"""The bits of -0.0, which stands where a membrane has fired."""


@triton.jit
def places_of_program(
    samples, columns, first, end, places, in_chunks, ROWS: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """What a program handles: `sample` and place `k` (ROWS, 1), `column` (1, BW), and (ROWS, BW) each: what
    exists, which of it are gates, where those are in a tensor (B, c, E), and which of them are in it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BW + tl.arange(0, BW)[None, :]
    sample, k = row // places, row % places
    live = (sample < samples) & (column < columns)
    is_gate = live & (column >= first) & (column < end)
    own = row * (end - first) + column - first
    has_chunk = is_gate & (k < in_chunks)
    return sample, k, column, live, is_gate, own, has_chunk


@triton.jit
def membrane_kernel(
    x, start, result, mean, samples, tokens, columns, first, end, places, in_chunks, chunks, tau, threshold,
    HAS_START: tl.constexpr, HAS_MEAN: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`result` (B, L, W) and `mean` (B, c, E), from `x` and the membrane before the first chunk, `start`."""
    sample, k, column, live, is_gate, own, has_chunk = places_of_program(
        samples, columns, first, end, places, in_chunks, ROWS, BW
    )
    before = tl.zeros([ROWS, BW], tl.float32)
    if HAS_START:
        before = tl.load(start + own, mask=has_chunk, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BW], tl.float32)
    negative_zero = tl.full([ROWS, BW], FIRED, tl.int32).to(tl.float32, bitcast=True)
    for begin in range(0, tokens, places):
        token = begin + k
        here = live & (token < tokens)
        place = (sample * tokens + token) * columns + column
        value = tl.load(x + place, mask=here, other=0.0)
        u = value.to(tl.float32) + tl.where(token < in_chunks, tau * before, 0.0)
        u = u.to(value.dtype).to(tl.float32)
        u = tl.where(u > threshold, negative_zero, tl.where(u == 0.0, 0.0, u))
        tl.store(result + place, tl.where(is_gate, u.to(value.dtype), value), mask=here)
        total += tl.where(token < in_chunks, u, 0.0)
        before = u
    if HAS_MEAN:
        tl.store(mean + own, (total / chunks).to(mean.dtype.element_ty), mask=has_chunk)


@triton.jit
def membrane_backward_kernel(
    grad, grad_mean, result, grad_x, grad_start, samples, tokens, columns, first, end, places, in_chunks,
    chunks, tau,
    HAS_MEAN: tl.constexpr, NEED_START: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`grad_x` (B, L, W) and `grad_start` (B, c, E), from the gradients of both results."""
    sample, k, column, live, is_gate, own, has_chunk = places_of_program(
        samples, columns, first, end, places, in_chunks, ROWS, BW
    )
    shared = tl.zeros([ROWS, BW], tl.float32)
    if HAS_MEAN:
        shared = tl.load(grad_mean + own, mask=has_chunk, other=0.0).to(tl.float32) / chunks
    behind = tl.zeros([ROWS, BW], tl.float32)
    rounds = tl.cdiv(tokens, places)
    for i in range(rounds):
        token = (rounds - 1 - i) * places + k
        here = live & (token < tokens)
        place = (sample * tokens + token) * columns + column
        value = tl.load(grad + place, mask=here, other=0.0)
        u = tl.load(result + place, mask=here & is_gate, other=0.0).to(tl.float32)
        chained = here & (token < in_chunks)
        found = value.to(tl.float32) + tl.where(chained, shared, 0.0) + behind
        found = tl.where(u.to(tl.int32, bitcast=True) == FIRED, 0.0, found)
        tl.store(grad_x + place, tl.where(is_gate, found.to(value.dtype), value), mask=here)
        behind = tl.where(chained, tau * found, 0.0)
    if NEED_START:
        tl.store(grad_start + own, behind.to(grad_start.dtype.element_ty), mask=has_chunk)
