"""Launches of the kernels of gated_norm_kernels.py.

Shape letters: M rows, E channels, g groups of them, W channels of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import Gradients, device_of
from vimtune.ops.gated_norm import GatedNormInputs
from vimtune.ops.triton.common import in_units, next_power_of_2
from vimtune.ops.triton.gated_norm_kernels import gated_norm_backward_kernel, gated_norm_kernel
from vimtune.ops.triton.norm import PARTIAL_PROGRAMS

LONGEST_GROUP = 8192
"""Most channels of a group, all of which a program holds at once."""
NUMBERS = 2048
"""Numbers of each tensor that a program holds at once, if one group is not larger."""


def _tile(width: int) -> tuple[int, int, int]:
    """Groups and padded width of a tile, and the warps for it."""
    padded = next_power_of_2(width)
    return max(1, NUMBERS // padded), padded, 4 if padded <= NUMBERS else 8


def _stride(gate: Tensor) -> tuple[int, ...]:
    """The distance of the rows of the gate, and its unit; of a single row it does not matter."""
    return in_units(gate.stride(-2) if gate.dim() > 1 else 0)


def forward(inputs: GatedNormInputs, groups: int, eps: float) -> Tensor:
    """The norm, (..., E) in the dtype of the gate."""
    x, gate, weight = inputs
    width = x.shape[-1] // groups
    num_groups = x.numel() // width
    rows, padded, warps = _tile(width)
    stride, unit = _stride(gate)
    normed = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    with device_of(x):
        gated_norm_kernel[(-(-num_groups // rows),)](
            x, gate, weight, normed, num_groups, groups, width, stride, eps,
            ROWS=rows, BW=padded, UNIT=unit, num_warps=warps,
        )  # fmt: skip
    return normed


def backward(grad: Tensor, inputs: GatedNormInputs, groups: int, eps: float, need_weight: bool) -> Gradients:
    """Gradients of x, the gate and, if it is needed, the weight."""
    x, gate, weight = inputs
    channels = x.shape[-1]
    width, num_rows = channels // groups, x.numel() // channels
    rows, padded, warps = _tile(width)
    tiles = max(1, -(-num_rows // (rows * PARTIAL_PROGRAMS))) if need_weight else 1
    programs = -(-num_rows // (rows * tiles))
    stride, unit = _stride(gate)
    grad_x = torch.empty_like(x)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    partial = x.new_empty((programs, channels) if need_weight else (0,), dtype=torch.float32)
    with device_of(x):
        gated_norm_backward_kernel[(programs, groups)](
            grad, x, gate, weight, grad_x, grad_gate, partial, num_rows, groups, width, stride, eps,
            ROWS=rows, BW=padded, NEED_WEIGHT=need_weight, TILES=tiles, UNIT=unit, num_warps=warps,
        )  # fmt: skip
    return grad_x, grad_gate, partial.sum(0).to(weight.dtype) if need_weight else None
