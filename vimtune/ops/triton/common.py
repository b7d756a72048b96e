"""Device functions shared by the Triton kernels. Everything here works on fp32 registers."""

from __future__ import annotations

import math
import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton reads the variable when a kernel is defined; so do we, to know what `refusals` may promise."""

LOG2E = tl.constexpr(1.4426950408889634)
"""log2(e): e^x is exp2(x LOG2E), and exp2 is what GPUs have."""


KNOWN_FACTOR = 16
"""Triton's compiler notices whether integers that a kernel is called with are multiples of it."""


def in_units(*strides: int) -> tuple[int, ...]:
    """Strides in units of so many numbers, which is the last result.

    Where a stride is no multiple of `KNOWN_FACTOR`, the compiler would load the numbers of a row one by one,
    even if all rows begin where a wider load can. A kernel that multiplies the strides by the unit, which
    is a constant for the compiler, shows it that they do.
    """
    unit = math.gcd(*strides, KNOWN_FACTOR)
    return *(stride // unit for stride in strides), unit


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


@triton.jit
def sigmoid(x):
    """The logistic function, 1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def silu(x):
    """SiLU, x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """Derivative of `silu` at x."""
    gate = sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def softplus(x):
    """Softplus, log(1 + e^x), accurate in fp32 also where e^x is small, where trained time steps live."""
    power = tl.exp2(x * LOG2E)
    series = power * (1.0 - power * (0.5 - power * (0.33333334 - power * 0.25)))
    return tl.where(x > 20.0, x, tl.where(power < 0.015, series, tl.log(1.0 + power)))


@triton.jit
def token(step, num_tokens, REVERSE: tl.constexpr):
    """Token that the scan visits at `step`."""
    return num_tokens - 1 - step if REVERSE else step


@triton.jit
def load_transposed(base, n, e, live, WIDTH: tl.constexpr, OTHER: tl.constexpr):
    """An (E, WIDTH) matrix as (n, E) in fp32, padded with OTHER.

    Column by column: one two-dimensional load would see that n is contiguous and spread the states
    over the lanes to load them in vectors, and every later reduction over n would pay for that.
    """
    matrix = tl.full([n.shape[0], e.shape[0]], OTHER, tl.float32)
    for k in tl.static_range(WIDTH):
        column = tl.load(base + e * WIDTH + k, mask=live, other=OTHER).to(tl.float32)
        matrix = tl.where(n[:, None] == k, column[None, :], matrix)
    return matrix


@triton.jit
def load_decay(A, n, e, live, N: tl.constexpr, FROM_LOG: tl.constexpr):
    """A * log2(e) as (N, E): one exp2 per state and step. Padded states get 0, which leaves them at 0."""
    if FROM_LOG:
        return tl.exp2(load_transposed(A, n, e, live, N, float("-inf")) * LOG2E) * -LOG2E
    else:
        return load_transposed(A, n, e, live, N, 0.0) * LOG2E


@triton.jit
def below(index, limit, ALWAYS: tl.constexpr):
    """Whether index < limit; with ALWAYS a constant, which lets the compiler drop the masks."""
    if ALWAYS:
        return tl.full([index.shape[0]], 1, tl.int1)
    else:
        return index < limit


@triton.jit
def exists(step, num_tokens, like):
    """Whether 0 <= step < num_tokens, as a mask of the shape of `like` (the interpreter broadcasts badly)."""
    steps = step + tl.zeros(like.shape, tl.int32)
    return (steps >= 0) & (steps < num_tokens)


@triton.jit
def group_rows(base, e, start, num_tokens, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """Addresses of the row of step `start`; `step_row` reaches its neighbours by a constant offset."""
    return base + token(start, num_tokens, REVERSE) * STRIDE + e


@triton.jit
def step_row(group, k: tl.constexpr, STRIDE: tl.constexpr, REVERSE: tl.constexpr):
    """Addresses of the row `k` steps after that of `group_rows`."""
    return group - k * STRIDE if REVERSE else group + k * STRIDE


@triton.jit
def load_rows(
    base, e, live, start, num_tokens,
    STRIDE: tl.constexpr, BEFORE: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Rows of steps start-BEFORE .. start+STEPS-1 as a tuple of fp32 vectors, 0 outside the sequence."""
    group = group_rows(base, e, start, num_tokens, STRIDE, REVERSE)
    rows = ()
    for k in tl.static_range(-BEFORE, STEPS):
        mask = live & exists(start + k, num_tokens, live)
        row = tl.load(step_row(group, k, STRIDE, REVERSE), mask=mask, other=0.0)
        rows = rows + (row.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@triton.jit
def load_vectors(
    base, n, used, start, num_tokens, STRIDE: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr
):
    """The short vectors B_t, C_t and the low-rank time step, one tuple entry a step.

    Past the last step the last one is repeated: a mask would cost more than the load, and such steps
    have dt = 0 and no gradient.
    """
    vectors = ()
    for k in tl.static_range(STEPS):
        t = token(tl.minimum(start + k, num_tokens - 1), num_tokens, REVERSE)
        vectors = vectors + (tl.load(base + t * STRIDE + n, mask=used, other=0.0).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return vectors
