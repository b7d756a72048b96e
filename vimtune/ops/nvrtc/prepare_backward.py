"""Launches of the kernels of project_gradients.cu and prepare_backward.cu, which say what they do.

Shape letters: d directions, B batch, L tokens, E inner width (W rounded up to 64), NP padded number of
states, K filter width, P columns of B | C | dt_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime
from vimtune.ops.nvrtc.prepare import PackedWeights, columns, padded_width

PROJECT = "project_gradients.cu"
"""File with the kernel of gradients of B | C | dt_r."""
CONVOLVE = "prepare_backward.cu"
"""File with the kernel that goes on from those to x, filters and biases."""
ROWS_FROZEN, ROWS_TRAINED = 32, 64
"""Rows of a block without and with gradients of weights. More rows mean that fewer are computed twice and
fewer gradients of filters are left to add up, but also fewer warps on a multiprocessor."""
MAX_WARPS = 6
"""Most warps of a block."""
CHANNELS, PADDING = 64, 8
"""Channels of a warp, and numbers between rows in shared memory."""


def refusals(directions: int, rank: int, num_states: int, device: torch.device) -> list[str]:
    """Reasons why there are no kernels for this dt rank on this device, whatever `prepare` takes."""
    if _most_warps(directions, ROWS_TRAINED, columns(rank, num_states), device) > 0:
        return []
    return [f"dt rank {rank} needs more shared memory than the device has"]


def prepare_backward(
    grad_u: Tensor,
    grad_delta: Tensor,
    partial_BC: Tensor,
    x: Tensor,
    weights: PackedWeights,
    grad_x: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of `x` into `grad_x`; both are the first half of a contiguous (B, L, 2 E).

    Args:
        grad_u: gradient of the convolved inputs (d, B, L, E).
        grad_delta: gradient of the time steps before softplus (d, B, L, E).
        partial_BC: gradient of B | C in parts to be added up, (d, blocks, B, L, 2 NP).
        x: input of the convolutions.
        weights: see `prepare.pack_weights`.
        grad_x: written.
        need_weights: whether the following is wanted.

    Returns:
        Gradients of B | C | dt_r (d, B, L, P) and, fp32, of filters and convolution bias (d, K + 1, E); empty
        if not wanted.
    """
    directions, batch, tokens, inner = grad_u.shape
    num_columns, width, padded = weights.proj.shape[1], weights.filters.shape[1], padded_width(inner)
    rows = ROWS_TRAINED if need_weights else ROWS_FROZEN
    tiles = -(-tokens // (rows - width + 1))
    tokens_of_tile = -(-tokens // tiles)
    tiles = -(-tokens // tokens_of_tile)
    blocks = -(-padded // (CHANNELS * _most_warps(directions, rows, num_columns, grad_u.device)))
    warps = -(-padded // (CHANNELS * blocks))
    grad_projections = grad_u.new_empty((directions, batch, tokens, num_columns))
    shape = batch * tiles if need_weights else 0, directions, width + 1, padded
    partial_filters = torch.empty(shape, dtype=torch.float32, device=grad_u.device)
    common = (
        ("STATES", weights.padded_states()),
        ("WIDTH", inner),
        ("COLUMNS", num_columns),
        ("WARPS", warps),
        ("FP16", int(grad_u.dtype == torch.float16)),
    )
    project = (*common, ("BLOCKS", partial_BC.shape[1]))
    convolve = (
        *common,
        ("DIRECTIONS", directions),
        ("FILTER", width),
        ("ROWS", rows),
        ("TRAINED", int(need_weights)),
    )
    with device_of(grad_u):
        kernel = runtime.load_kernel(PROJECT, "project_gradients", project, grad_u.device.index)
        kernel(
            (-(-batch * tokens // (16 * warps)), directions, 1),
            32 * warps,
            [grad_delta, partial_BC, weights.dt_t, grad_projections, batch * tokens],
        )
        kernel = runtime.load_kernel(CONVOLVE, "prepare_backward", convolve, grad_u.device.index)
        kernel(
            (blocks, tiles, batch),
            32 * warps,
            [
                *(grad_u, grad_projections, x, weights.filters, weights.conv_bias, weights.proj_t),
                *(grad_x, partial_filters, batch, tokens, tokens_of_tile),
            ],
            _shared_bytes(directions, rows, warps, num_columns),
        )
    if not need_weights:
        return grad_projections[:, :0], partial_filters.new_empty((directions, width + 1, 0))
    return grad_projections, partial_filters.sum(0)[..., :inner]


def _most_warps(directions: int, rows: int, num_columns: int, device: torch.device) -> int:
    """How many warps a block can have; 0 if shared memory does not suffice for one."""
    numbers = runtime.shared_memory(device) // (2 * directions * rows)  # Of a row; see `_shared_bytes`.
    return max(0, min(MAX_WARPS, (numbers - num_columns - PADDING) // CHANNELS))


def _shared_bytes(directions: int, rows: int, warps: int, num_columns: int) -> int:
    """Shared memory for all directions: the channels of each warp, and B | C | dt_r with padding."""
    return 2 * directions * rows * (warps * CHANNELS + num_columns + PADDING)
