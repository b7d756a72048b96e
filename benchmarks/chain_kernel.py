"""A Triton kernel that does nothing but chain exp2 or FMA, to measure how fast those are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chain_kernel(x, steps, BLOCK: tl.constexpr, EXPONENTIAL: tl.constexpr):
    """`steps` dependent operations on each number of `x`, in place; BLOCK numbers a program."""
    place = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(place)
    for _ in range(steps):
        value = tl.exp2(-value) if EXPONENTIAL else value * 0.75 + 0.125  # both chains converge
    tl.store(place, value)
