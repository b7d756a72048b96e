"""Launches of the kernels of membrane_kernels.py.

Shape letters: B batch, L tokens, W columns of which E are gates, T chunks of c tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.membrane import MembraneInputs, MembraneOptions
from vimtune.ops.triton.membrane_kernels import membrane_backward_kernel, membrane_kernel

ROWS, COLUMNS = 8, 128
"""Places and columns of a program."""


def forward(inputs: MembraneInputs, options: MembraneOptions) -> tuple[Tensor, Tensor]:
    """`x` with membranes for its gates (B, L, W), and their mean (B, c, E) if there is one."""
    x, start = inputs
    result, mean = torch.empty_like(x), x.new_empty(options.mean_shape(x))
    grid, sizes = _launch(x, options)
    with device_of(x):
        membrane_kernel[grid](
            x, x if start is None else start, result, mean, *sizes, options.tau, options.threshold,
            HAS_START=start is not None, HAS_MEAN=mean.numel() > 0, ROWS=ROWS, BW=COLUMNS,
        )  # fmt: skip
    return result, mean


def backward(
    grad: Tensor, grad_mean: Tensor | None, result: Tensor, options: MembraneOptions, need_start: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `x` and, if it is needed, of `start`."""
    grad_x = torch.empty_like(grad)
    grad_start = grad.new_empty(options.start_shape(result) if need_start else (0,))
    grid, sizes = _launch(grad, options)
    with device_of(grad):
        membrane_backward_kernel[grid](
            grad, grad if grad_mean is None else grad_mean, result, grad_x, grad_start, *sizes, options.tau,
            HAS_MEAN=grad_mean is not None, NEED_START=grad_start.numel() > 0, ROWS=ROWS, BW=COLUMNS,
        )  # fmt: skip
    return grad_x, grad_start if need_start else None


def _launch(x: Tensor, options: MembraneOptions) -> tuple[tuple[int, int], tuple[Any, ...]]:
    """The grid of programs, and the sizes that both kernels take."""
    samples, tokens, columns = x.shape
    length, in_chunks = options.cut(tokens)
    places = max(length, 1)
    grid = -(-samples * places // ROWS), -(-columns // COLUMNS)
    end = options.first + options.width
    chunks = 1 if options.chunks is None else options.chunks
    return grid, (samples, tokens, columns, options.first, end, places, in_chunks, chunks)
