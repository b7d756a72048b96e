"""Launches of the kernels of prepare.cu: convolution, x_proj and time steps of one direction or both.

Shape letters: d directions, B batch, L tokens, E inner width (W rounded up to 64), N states (padded NP), R dt
rank (padded), K filter width, P = 2 NP + R columns of `projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime
from vimtune.ops.nvrtc.scan import for_kernels, padded_states

SOURCE = "prepare.cu"
"""File with the kernels."""
ROWS = 16
"""Number of tokens of a warp."""
MAX_WIDTH = 4096
"""Largest padded inner width that the kernels take: the largest one that tests run."""
MAX_FILTER = 8
"""Widest filter that the kernels take."""


class PackedWeights(NamedTuple):
    """The mixer's small weights of its directions (first index) as the kernels read them, padded with zeros.

    fp32: filters (d, K, W) and conv_bias (d, W), both times -log2(e), and dt_bias (d, W). In the dtype of the
    activations and the order in which the matrix units take them, of x_proj (d, P, W) for products with u and
    with gradients of its result, and of dt_proj (d, R, W) for products with dt_r and with gradients of time
    steps. `tails` (d, K - 1, W), in the dtype of the activations and the order of tokens, are the inputs of
    the convolution before the first token; None stands for zeros.
    """

    filters: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    proj: Tensor
    proj_t: Tensor
    dt: Tensor
    dt_t: Tensor
    tails: Tensor | None = None

    def padded_states(self) -> int:
        """NP."""
        return (self.proj.shape[1] - self.dt.shape[1]) // 2


def padded_width(inner: int) -> int:
    """W, the inner width rounded up to what a block handles at a time."""
    return -(-inner // 64) * 64


def padded_rank(rank: int) -> int:
    """What dt_r has of each row, given dt_proj's rank."""
    return max(16, 1 << (rank - 1).bit_length())


def columns(rank: int, num_states: int) -> int:
    """P, given dt_proj's rank and N."""
    return 2 * padded_states(num_states) + padded_rank(rank)


def refusals(inner: int, width: int) -> list[str]:
    """Reasons why there are no kernels for this inner width, a multiple of 8, and filters of `width`."""
    reasons = []
    if padded_width(inner) > MAX_WIDTH:
        reasons.append(f"inner width {inner} is above {MAX_WIDTH}")
    if width > MAX_FILTER:
        reasons.append(f"filter width {width} is above {MAX_FILTER}")
    return reasons


class WeightSizes(NamedTuple):
    """Sizes of the weights that are packed: number of directions, E, R as it is, N, K."""

    directions: int
    inner: int
    rank: int
    num_states: int
    width: int


def packed_size(sizes: WeightSizes) -> int:
    """How many fp32 numbers packed weights take."""
    return sum(_part_sizes(sizes))


def packed_in(buffer: Tensor, sizes: WeightSizes, dtype: torch.dtype) -> PackedWeights:
    """Packed weights that lie in `buffer`, of `packed_size` fp32 numbers."""
    filters, *vectors, proj, proj_t, dt, dt_t = torch.split(buffer, _part_sizes(sizes))
    directions, padded = sizes.directions, padded_width(sizes.inner)
    return PackedWeights(
        filters.view(directions, sizes.width, padded),
        *(vector.view(directions, padded) for vector in vectors),
        *(matrix.view(dtype).view(directions, -1, padded) for matrix in (proj, proj_t, dt, dt_t)),
    )


def _part_sizes(sizes: WeightSizes) -> list[int]:
    """How many fp32 numbers each part of packed weights takes, in the order of the buffer."""
    vector, rows = sizes.directions * padded_width(sizes.inner), padded_rank(sizes.rank)
    # Two numbers of a matrix take the place of one in fp32.
    matrices = [each * vector // 2 for each in (columns(sizes.rank, sizes.num_states), rows)]
    return [sizes.width * vector, *[vector] * 2, *[matrices[0]] * 2, *[matrices[1]] * 2]


def pack_weights(
    conv_weight: Sequence[Tensor],
    conv_bias: Sequence[Tensor | None],
    x_proj: Sequence[Tensor],
    dt_proj: Sequence[Tensor],
    dt_bias: Sequence[Tensor],
    dtype: torch.dtype,
    buffer: Tensor | None = None,
    tails: Sequence[Tensor] = (),
) -> PackedWeights:
    """Pack filters (E, K), biases (E,), x_proj (R + 2 N, E) and dt_proj (E, R) of each direction.

    They lie in `buffer`, see `packed_in`, or in a new one. `tails` (E, K - 1), if there are some, are in the
    order of their direction.
    """
    inner, width = conv_weight[0].shape
    rank, device = dt_proj[0].shape[1], x_proj[0].device
    num_states = (x_proj[0].shape[0] - rank) // 2
    sizes = WeightSizes(len(conv_weight), inner, rank, num_states, width)
    if buffer is None:
        buffer = torch.empty(packed_size(sizes), dtype=torch.float32, device=device)
    packed = packed_in(buffer, sizes, dtype)
    biases = [conv_weight[0] if bias is None else bias for bias in conv_bias]
    inputs = [*chain.from_iterable(map(for_kernels, (conv_weight, biases, x_proj, dt_proj, dt_bias)))]
    outputs = [
        *(packed.filters, packed.conv_bias, packed.proj, packed.proj_t),
        *(packed.dt, packed.dt_t, packed.dt_bias),
    ]
    if tails:
        shape = sizes.directions, width - 1, padded_width(inner)
        packed = packed._replace(tails=torch.empty(shape, dtype=dtype, device=device))
        outputs += [*for_kernels(tails), cast(Tensor, packed.tails)]
    with device_of(inputs[0]):
        num_columns = packed.proj.shape[1]
        numbers = inner, num_states, num_columns, width
        kernel = _kernel("pack_weights", *numbers, dtype, False, bool(tails), device)
        grid = (padded_width(inner) // 64, sizes.directions * num_columns, 1)
        kernel(grid, 64, [*inputs, *outputs, rank, int(conv_bias[0] is not None)])
    return packed


def prepare(
    x: Tensor, weights: PackedWeights, projections: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved inputs (d, B, L, E), time steps (d, B, L, E) in fp16 and projections (d, B, L, P).

    Args:
        x: first half of a contiguous (B, L, 2 E).
        weights: see `pack_weights`.
        projections: what an earlier call found, to be used instead of computed.
    """
    batch, tokens, inner = x.shape
    directions, width, _ = weights.filters.shape
    num_columns, project = weights.proj.shape[1], projections is None
    numbers = inner, weights.padded_states(), num_columns, width
    u = torch.empty((directions, batch, tokens, inner), dtype=x.dtype, device=x.device)
    delta = torch.empty_like(u, dtype=torch.float16)
    if projections is None:
        projections = torch.empty((directions, batch, tokens, num_columns), dtype=x.dtype, device=x.device)
    with device_of(x):
        started = weights.tails is not None
        kernel = _kernel("prepare", *numbers, x.dtype, project, started, x.device)
        kernel(
            (directions, -(-tokens // ROWS), batch),
            32,
            [
                *(x, weights.filters, weights.conv_bias, weights.proj, weights.dt, weights.dt_bias),
                *(u, projections, delta),
                *(() if weights.tails is None else (weights.tails,)),
                *(batch, tokens),
            ],
        )
    return u, delta, projections


def _kernel(
    name: str,
    inner: int,
    num_states: int,
    num_columns: int,
    width: int,
    dtype: torch.dtype,
    project: bool,
    started: bool,
    device: torch.device,
) -> runtime.Kernel:
    """A kernel of prepare.cu for these sizes; with `project` it computes B | C | dt_r, else it reads them.
    If `started`, the convolution begins with given inputs. Only `pack_weights` tells states from padding."""
    constants = [
        ("STATES", num_states),
        ("WIDTH", inner),
        ("COLUMNS", num_columns),
        ("FILTER", width),
        ("FP16", int(dtype == torch.float16)),
        ("PROJECT", int(project)),
    ]
    if started:
        constants.append(("START", 1))
    return runtime.load_kernel(SOURCE, name, tuple(constants), device.index)
