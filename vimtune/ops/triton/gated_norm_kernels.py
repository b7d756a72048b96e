"""The gated RMSNorm in one pass, forward and backward. A program handles ROWS groups of channels at a time.

The stride of the gate's rows is given in units of UNIT numbers (`in_units`).

Shape letters: M rows, g groups of a row, W channels of a group (padded BW).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated_norm_kernel(
    x, gate, weight, normed, num_groups, groups, width, gate_stride, eps,
    ROWS: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`normed` = u / rms(u) weight for u = x SiLU(gate), of `num_groups` = M g groups."""
    gate_stride = gate_stride * UNIT
    part = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.arange(0, BW)
    mask = (part < num_groups)[:, None] & (w < width)[None, :]
    place = part[:, None] * width + w[None, :]
    channel = (part % groups)[:, None] * width + w[None, :]
    z = tl.load(gate + (part // groups)[:, None] * gate_stride + channel, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * z * tl.sigmoid(z)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / width + eps)
    factor = tl.load(weight + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, (u * scale[:, None] * factor).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward_kernel(
    grad, x, gate, weight, grad_x, grad_gate, partial, num_rows, groups, width, gate_stride, eps,
    ROWS: tl.constexpr, BW: tl.constexpr, NEED_WEIGHT: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients for TILES tiles of ROWS rows of one group, which is the second index of the program.

    Of the weight's gradient it makes a part, `partial` (programs, g W).
    """
    gate_stride = gate_stride * UNIT
    group = tl.program_id(1)
    w = tl.arange(0, BW)
    channel = group * width + w
    factor = tl.load(weight + channel, mask=w < width, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BW], tl.float32)
    for tile in range(TILES):
        row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (w < width)[None, :]
        place = row[:, None] * groups * width + channel[None, :]
        z = tl.load(gate + row[:, None] * gate_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        opened = tl.sigmoid(z)
        silu = z * opened
        u = value * silu
        scale = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / width + eps)
        unit = u * scale[:, None]
        own = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            sum_weight += tl.sum(own * unit, axis=0)
        own *= factor[None, :]
        own = (own - unit * (tl.sum(own * unit, axis=1) / width)[:, None]) * scale[:, None]
        tl.store(grad_x + place, (own * silu).to(grad_x.dtype.element_ty), mask=mask)
        slope = opened + silu * (1.0 - opened)
        tl.store(grad_gate + place, (own * value * slope).to(grad_gate.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        tl.store(partial + tl.program_id(0) * groups * width + channel, sum_weight, mask=w < width)
