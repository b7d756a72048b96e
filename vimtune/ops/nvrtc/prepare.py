"""Launches of the kernels of prepare.cu: convolution, x_proj and time steps of both directions.

Shape letters: B batch, L tokens, E inner width (W rounded up to 64), R dt rank (padded), K filter width,
P = 2 N + R columns of `projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime
from vimtune.ops.nvrtc.scan import NUM_STATES

SOURCE = "prepare.cu"
"""File with the kernels."""
ROWS = 16
"""Number of tokens of a warp."""
MAX_WIDTH = 2048
"""Largest padded inner width that the kernels take."""
MAX_FILTER = 8
"""Widest filter that the kernels take."""


class PackedWeights(NamedTuple):
    """The mixer's small weights of both directions (first index) as the kernels read them, padded with zeros.

    fp32: filters (2, K, W) and conv_bias (2, W), both times -log2(e), and dt_bias (2, W). In the dtype of the
    activations and the order in which the matrix units take them, of x_proj (2, P, W) for products with u and
    with gradients of its result, and of dt_proj (2, R, W) for products with dt_r and with gradients of time
    steps.
    """

    filters: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    proj: Tensor
    proj_t: Tensor
    dt: Tensor
    dt_t: Tensor


def padded_width(inner: int) -> int:
    """W, the inner width rounded up to what a block handles at a time."""
    return -(-inner // 64) * 64


def columns(rank: int) -> int:
    """P, given dt_proj's rank."""
    return 2 * NUM_STATES + max(16, 1 << (rank - 1).bit_length())


def refusals(inner: int, width: int) -> list[str]:
    """Reasons why there are no kernels for this inner width, a multiple of 8, and filters of `width`."""
    reasons = []
    if padded_width(inner) > MAX_WIDTH:
        reasons.append(f"inner width {inner} is above {MAX_WIDTH}")
    if width > MAX_FILTER:
        reasons.append(f"filter width {width} is above {MAX_FILTER}")
    return reasons


def packed_size(inner: int, rank: int, width: int) -> int:
    """How many fp32 numbers packed weights take."""
    return sum(_part_sizes(inner, columns(rank), width))


def packed_in(buffer: Tensor, inner: int, rank: int, width: int, dtype: torch.dtype) -> PackedWeights:
    """Packed weights that lie in `buffer`, of `packed_size` fp32 numbers."""
    num_columns, padded = columns(rank), padded_width(inner)
    low_rank = num_columns - 2 * NUM_STATES
    filters, *vectors, proj, proj_t, dt, dt_t = torch.split(buffer, _part_sizes(inner, num_columns, width))
    return PackedWeights(
        filters.view(2, width, padded),
        *(vector.view(2, padded) for vector in vectors),
        *(matrix.view(dtype).view(2, num_columns, padded) for matrix in (proj, proj_t)),
        *(matrix.view(dtype).view(2, low_rank, padded) for matrix in (dt, dt_t)),
    )


def _part_sizes(inner: int, num_columns: int, width: int) -> list[int]:
    """How many fp32 numbers each part of packed weights takes, in the order of the buffer."""
    padded = padded_width(inner)
    low_rank = num_columns - 2 * NUM_STATES  # Two numbers of a matrix take the place of one in fp32.
    return [2 * width * padded, *[2 * padded] * 2, *[num_columns * padded] * 2, *[low_rank * padded] * 2]


def pack_weights(
    conv_weight: Sequence[Tensor],
    conv_bias: Sequence[Tensor | None],
    x_proj: Sequence[Tensor],
    dt_proj: Sequence[Tensor],
    dt_bias: Sequence[Tensor],
    dtype: torch.dtype,
    buffer: Tensor | None = None,
) -> PackedWeights:
    """Pack filters (E, K), biases (E,), x_proj (R + 2 N, E) and dt_proj (E, R) of both directions.

    They lie in `buffer`, see `packed_in`, or in a new one.
    """
    inner, width = conv_weight[0].shape
    rank, device = dt_proj[0].shape[1], x_proj[0].device
    if buffer is None:
        buffer = torch.empty(packed_size(inner, rank, width), dtype=torch.float32, device=device)
    packed, num_columns = packed_in(buffer, inner, rank, width, dtype), columns(rank)
    biases = [conv_weight[0] if bias is None else bias for bias in conv_bias]
    inputs = [w.float().contiguous() for w in (*conv_weight, *biases, *x_proj, *dt_proj, *dt_bias)]
    outputs = [
        *(packed.filters, packed.conv_bias, packed.proj, packed.proj_t),
        *(packed.dt, packed.dt_t, packed.dt_bias),
    ]
    with device_of(inputs[0]):
        kernel = _kernel("pack_weights", inner, num_columns, width, dtype, False, device)
        grid = (padded_width(inner) // 64, 2 * num_columns, 1)
        kernel(grid, 64, [*inputs, *outputs, rank, int(conv_bias[0] is not None)])
    return packed


def prepare(
    x: Tensor, weights: PackedWeights, projections: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved inputs (2, B, L, E), time steps (2, B, L, E) in fp16 and projections (2, B, L, P).

    Args:
        x: first half of a contiguous (B, L, 2 E).
        weights: see `pack_weights`.
        projections: what an earlier call found, to be used instead of computed.
    """
    batch, tokens, inner = x.shape
    num_columns, width = weights.proj.shape[1], weights.filters.shape[1]
    project = projections is None
    u = torch.empty((2, batch, tokens, inner), dtype=x.dtype, device=x.device)
    delta = torch.empty_like(u, dtype=torch.float16)
    if projections is None:
        projections = torch.empty((2, batch, tokens, num_columns), dtype=x.dtype, device=x.device)
    with device_of(x):
        kernel = _kernel("prepare", inner, num_columns, width, x.dtype, project, x.device)
        kernel(
            (2, -(-tokens // ROWS), batch),
            32,
            [
                *(x, weights.filters, weights.conv_bias, weights.proj, weights.dt, weights.dt_bias),
                *(u, projections, delta, batch, tokens),
            ],
        )
    return u, delta, projections


def _kernel(
    name: str,
    inner: int,
    num_columns: int,
    width: int,
    dtype: torch.dtype,
    project: bool,
    device: torch.device,
) -> runtime.Kernel:
    """A kernel of prepare.cu for these sizes; with `project` it computes B | C | dt_r, else it reads them."""
    constants = (
        ("WIDTH", inner),
        ("COLUMNS", num_columns),
        ("FILTER", width),
        ("FP16", int(dtype == torch.float16)),
        ("PROJECT", int(project)),
    )
    return runtime.load_kernel(SOURCE, name, constants, device.index)
