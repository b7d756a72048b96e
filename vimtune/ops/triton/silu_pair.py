"""Launches of the kernels of silu_pair_kernels.py.

Shape letters: M tokens of all samples, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import Gradients, device_of
from vimtune.ops.silu_pair import SiluPair
from vimtune.ops.triton.common import next_power_of_2
from vimtune.ops.triton.norm import PARTIAL_PROGRAMS
from vimtune.ops.triton.silu_pair_kernels import silu_pair_backward_kernel, silu_pair_kernel

WIDEST = 512
"""Most columns of a program."""
NUMBERS = 2048
"""Numbers of each tensor that a program holds at once."""


def _tile(columns: int) -> tuple[int, int]:
    """Tokens and columns of a tile."""
    width = min(next_power_of_2(columns), WIDEST)
    return NUMBERS // width, width


def forward(x: Tensor, pair: SiluPair, skipped: int) -> Tensor:
    """The sum, (B, L, D) in the dtype of `x`."""
    samples, tokens, columns = x.shape
    rows, width = _tile(columns)
    result = torch.empty_like(x)
    grid = -(-samples * tokens // rows), -(-columns // width)
    with device_of(x):
        silu_pair_kernel[grid](
            x, *pair, result, samples * tokens, tokens, columns, skipped, ROWS=rows, BW=width
        )
    return result


def backward(grad: Tensor, pair: SiluPair, skipped: int) -> Gradients:
    """Gradients of the pair."""
    samples, tokens, columns = grad.shape
    rows, width = _tile(columns)
    tiles = max(1, -(-samples * tokens // (rows * PARTIAL_PROGRAMS)))
    programs = -(-samples * tokens // (rows * tiles))
    grad_first, grad_second = torch.empty_like(pair.first), torch.empty_like(pair.second)
    partial = grad.new_empty((2, programs, columns), dtype=torch.float32)
    with device_of(grad):
        silu_pair_backward_kernel[programs, -(-columns // width)](
            grad, *pair, grad_first, grad_second, partial, samples * tokens, tokens, columns, skipped,
            ROWS=rows, BW=width, TILES=tiles,
        )  # fmt: skip
    return grad_first, partial[0].sum(0), grad_second, partial[1].sum(0)
