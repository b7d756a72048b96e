"""Launches of the kernels of blocks.cu, which says what they do.

Shape letters: M matrices (any leading dimensions), O rows, C columns, n blocks of b columns, C = n b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime

SOURCE = "blocks.cu"
"""File with the kernels."""
THREADS, BLOCKS = 128, 16
"""Threads of a CUDA block, and blocks of columns that it handles; both as in blocks.cu."""
ROWS_AT_ONCE = THREADS // BLOCKS
"""Rows that a CUDA block handles at once."""
ENOUGH = 400
"""Number of CUDA blocks that keep the largest GPUs busy. More leave more partial gradients to add up."""


MAX_BLOCK = 8
"""Columns of the largest blocks that the kernels take; their threads have such blocks in registers."""
MAX_ROWS = 2_000_000
"""Rows of the largest matrix that the kernels take."""


def refusals(weight: Tensor, row_scale: Tensor, blocks: Tensor) -> list[str]:
    """Reasons why there are no kernels for such tensors."""
    rows, size = weight.shape[-2], blocks.shape[-1]
    reasons = [
        f"{name} is {tensor.dtype}, the kernels have float32"
        for name, tensor in (("weight", weight), ("row_scale", row_scale), ("blocks", blocks))
        if tensor.dtype != torch.float32
    ]
    if size > MAX_BLOCK:
        reasons.append(f"blocks of {size} columns are above {MAX_BLOCK}")
    if rows > MAX_ROWS:
        reasons.append(f"{rows} rows are above {MAX_ROWS}")
    return reasons


def scaled_block_product(weight: Tensor, row_scale: Tensor, blocks: Tensor) -> Tensor:
    """s (W + W D) of `weight` (M, O, C), `row_scale` (M, O) and `blocks` (M, n, b, b), fp32 and not empty."""
    weight, row_scale, blocks = map(_readable, (weight, row_scale, blocks))
    matrices, rows, num_blocks, size = _sizes(weight, blocks)
    out = torch.empty_like(weight)
    ahead = _rows_ahead(size)
    with device_of(weight):
        kernel = _kernel("scaled_block_product", size, ahead, False, False, weight.device)
        grid = (matrices * -(-num_blocks // BLOCKS), -(-rows // (ROWS_AT_ONCE * ahead)), 1)
        kernel(grid, THREADS, [weight, row_scale, blocks, out, rows, num_blocks])
    return out


def scaled_block_product_backward(
    grad: Tensor, weight: Tensor, row_scale: Tensor, blocks: Tensor, need_scale: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `row_scale` and `blocks` from that of the product; empty if not needed."""
    grad, weight, row_scale, blocks = map(_readable, (grad, weight, row_scale, blocks))
    matrices, rows, num_blocks, size = _sizes(weight, blocks)
    columns = -(-num_blocks // BLOCKS)
    ahead = _rows_ahead(size) // 2  # The rows are on their way in each of two tensors.
    tile_rows, row_tiles = row_tiling(rows, ROWS_AT_ONCE * ahead, matrices * columns)
    partial_scale = weight.new_empty((columns, *row_scale.shape) if need_scale else 0)
    partial_blocks = weight.new_empty((row_tiles, *blocks.shape) if need_blocks else 0)
    with device_of(weight):
        name = "scaled_block_product_backward"
        kernel = _kernel(name, size, ahead, need_scale, need_blocks, weight.device)
        kernel(
            (matrices * columns, row_tiles, 1),
            THREADS,
            [
                *(grad, weight, row_scale, blocks, partial_scale, partial_blocks),
                *(matrices, rows, num_blocks, tile_rows),
            ],
            THREADS // 32 * size**2 * (BLOCKS + 1) * 4 if need_blocks else 0,
        )
    return (
        partial_scale.sum(0) if need_scale else partial_scale,
        partial_blocks.sum(0) if need_blocks else partial_blocks,
    )


def row_tiling(rows: int, step: int, others: int) -> tuple[int, int]:
    """Rows of a tile, a multiple of `step`, and the number of tiles, if `others` parts are cut alike."""
    tile_rows = -(-rows // max(1, ENOUGH // others))
    tile_rows = -(-tile_rows // step) * step
    return tile_rows, -(-rows // tile_rows)


def _rows_ahead(size: int) -> int:
    """Number of rows that a thread loads ahead, as many as its registers allow."""
    return 8 if size <= 4 else 4


def _kernel(
    name: str, size: int, ahead: int, want_scale: bool, want_blocks: bool, device: torch.device
) -> runtime.Kernel:
    """A kernel of blocks.cu for blocks of `size` columns, with the gradients that it shall find."""
    constants = (
        ("SIZE", size),
        ("AHEAD", ahead),
        ("WANT_SCALE", int(want_scale)),
        ("WANT_BLOCKS", int(want_blocks)),
    )
    return runtime.load_kernel(SOURCE, name, constants, device.index)


def _sizes(weight: Tensor, blocks: Tensor) -> tuple[int, int, int, int]:
    """M, O, n and b."""
    num_blocks, size, _ = blocks.shape[-3:]
    return weight.shape[:-2].numel(), weight.shape[-2], num_blocks, size


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on, as no slice has to begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
