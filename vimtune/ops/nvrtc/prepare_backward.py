"""Launch of the kernel of prepare_backward.cu, which has the method and the shapes.

Shape letters: B batch, L tokens, E inner width (W rounded up to 64), K filter width, P columns of
B | C | dt_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.nvrtc import runtime
from vimtune.ops.nvrtc.prepare import PackedWeights, columns, padded_width, sizes_exist

SOURCE = "prepare_backward.cu"


def covers(inner: int, rank: int, width: int, device: torch.device) -> bool:
    """Whether the kernel exists for these sizes, with filters of `width`, on this device."""
    return sizes_exist(inner, width) and _rows(inner, columns(rank), device) > 0


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
        grad_u: gradient of the convolved inputs (2, B, L, E).
        grad_delta: gradient of the time steps before softplus (2, B, L, E).
        partial_BC: gradient of B | C in parts to be added up, (2, blocks, B, L, 32), fp32.
        x: input of the convolutions.
        weights: see `prepare.pack_weights`.
        grad_x: written.
        need_weights: whether the following is wanted.

    Returns:
        Gradients of B | C | dt_r (2, B, L, P) and, fp32, of filters and convolution bias (2, K + 1, E); empty
        if not wanted.
    """
    _, batch, tokens, inner = grad_u.shape
    num_columns, width = weights.proj_t.shape[2], weights.filters.shape[1]
    rows = _rows(inner, num_columns, x.device)
    tiles = -(-tokens // (rows - width + 1))
    tokens_of_block = -(-tokens // tiles)
    tiles = -(-tokens // tokens_of_block)
    padded = padded_width(inner)
    grad_projections = grad_u.new_empty((2, batch if need_weights else 0, tokens, num_columns))
    blocks = batch * tiles if need_weights else 0
    partial_filters = torch.empty((blocks, 2, width + 1, padded), dtype=torch.float32, device=grad_u.device)
    constants = (
        ("WIDTH", inner),
        ("COLUMNS", num_columns),
        ("FILTER", width),
        ("BLOCKS", partial_BC.shape[1]),
        ("ROWS", rows),
        ("FP16", int(grad_u.dtype == torch.float16)),
        ("TRAINED", int(need_weights)),
    )
    with torch.cuda.device_of(grad_u):
        kernel = runtime.load_kernel(SOURCE, "prepare_backward", constants, grad_u.device.index)
        kernel(
            (tiles, batch, 1),
            padded // 2,
            [
                *(grad_u, grad_delta, partial_BC, x, weights.filters, weights.conv_bias, weights.proj_t),
                *(weights.dt_t, grad_x, grad_projections, partial_filters, batch, tokens, tokens_of_block),
            ],
            _shared_bytes(rows, inner, num_columns),
        )
    if not need_weights:
        return grad_projections, partial_filters.new_empty((2, width + 1, 0))
    return grad_projections, partial_filters.sum(0)[..., :inner]


def _rows(inner: int, num_columns: int, device: torch.device) -> int:
    """Rows of a block: the more, the fewer are computed twice. 0 if shared memory does not suffice."""
    limit = runtime.shared_memory(device)
    return next((rows for rows in (32, 16) if _shared_bytes(rows, inner, num_columns) <= limit), 0)


def _shared_bytes(rows: int, inner: int, num_columns: int) -> int:
    """Of both directions, all channels and B | C | dt_r."""
    return 2 * rows * (padded_width(inner) + num_columns) * 2
