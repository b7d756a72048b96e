"""Launches of the scan kernels: shapes, strides, buffers and sums of partial results.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vimtune.ops.triton.backend import CHUNK
from vimtune.ops.triton.common import INTERPRETED, next_power_of_2
from vimtune.ops.triton.scan_backward import scan_backward_kernel
from vimtune.ops.triton.scan_kernels import scan_forward_kernel


@dataclass(frozen=True)
class Tiling:
    """How the scan is cut. Found by benchmarks/gpu_kernels.py on an H200, see benchmarks/LOG.md."""

    forward_channels: int = 32
    forward_steps: int = 8
    forward_warps: int = 1
    backward_channels: int = 32
    backward_steps: int = 4
    backward_warps: int = 1
    chunk: int = CHUNK


TILING = Tiling()

# The interpreter multiplies bf16 matrices as if they were integers.
DOT_TYPE = tl.float32 if INTERPRETED else tl.bfloat16


@dataclass(frozen=True)
class Direction:
    """Parameters of one direction. The last three are None where `u` and `delta` are given."""

    A: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    conv_weight: Tensor | None = None
    conv_bias: Tensor | None = None
    dt_weight: Tensor | None = None


@dataclass(frozen=True)
class ScanNeeds:
    u: bool
    delta: bool
    A: bool
    BC: bool
    D: bool
    z: bool
    bias: bool


@dataclass(frozen=True)
class ScanGradients:
    """u, delta (directions, B, L, E); BC (directions, blocks, B, L, 2 NP); A (directions, E, N); D, bias
    (directions, E). Empty where not asked for."""

    u: Tensor
    delta: Tensor
    BC: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor


def padded_states(num_states: int, low: bool) -> int:
    """States as the kernels hold them: the matrix units, mostly used below fp32, have a least size."""
    return max(next_power_of_2(num_states), 16 if low else 8)


def num_chunks(num_tokens: int) -> int:
    return -(-num_tokens // TILING.chunk)


def is_low(tensor: Tensor) -> bool:
    """Whether sums over channels may go through the matrix units, which round products to bf16."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def scan_forward(
    x: Tensor,
    z: Tensor | None,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    directions: Sequence[Direction],
    out: Tensor,
    *,
    first: int,
    rank: int,
    softplus: bool,
    from_log: bool,
    scale: float,
    direction_stride: int,
    save_states: bool,
) -> Tensor:
    """Run the directions first, first+1, .. into `out` (B, L, E); returns the states before each chunk."""
    batch, tokens, inner = x.shape
    head, last = directions[0], directions[-1]
    num_states = head.A.shape[1]
    width = 0 if head.conv_weight is None else head.conv_weight.shape[1]
    chunks = num_chunks(tokens)
    shape = (len(directions), batch, chunks, num_states, inner) if save_states else (0,)
    states = torch.empty(shape, dtype=torch.float32, device=x.device)
    tiling = TILING
    channels = tiling.forward_channels
    grid = (-(-inner // channels), batch)
    with torch.cuda.device_of(x):
        scan_forward_kernel[grid](
            x, x if z is None else z, out, states, delta, B, C, *_pairs(head, last, x),
            x.stride(0), 0 if z is None else z.stride(0), out.stride(0), delta.stride(0), B.stride(0), C.stride(0),
            direction_stride, batch, tokens, inner, chunks, 0, scale,
            STRIDE_X=x.stride(1), STRIDE_Z=0 if z is None else z.stride(1), STRIDE_OUT=out.stride(1),
            STRIDE_DELTA=delta.stride(1), STRIDE_B=B.stride(1), STRIDE_C=C.stride(1),
            N=num_states, NP=padded_states(num_states, is_low(x)), R=rank, RP=max(next_power_of_2(rank), 16), K=width,
            BE=channels, EVEN=inner % channels == 0, STEPS=tiling.forward_steps, CHUNK=tiling.chunk,
            FIRST=first, LAST=first + len(directions) - 1, SOFTPLUS=softplus, FROM_LOG=from_log,
            HAS_D=head.D is not None, HAS_Z=z is not None, HAS_DT_BIAS=head.dt_bias is not None,
            HAS_CONV_BIAS=head.conv_bias is not None, SAVE=save_states, num_warps=tiling.forward_warps,
        )  # fmt: skip
    return states


def scan_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    states: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    directions: Sequence[Direction],
    grad_z: Tensor | None,
    needs: ScanNeeds,
    *,
    first: int,
    rank: int,
    softplus: bool,
    from_log: bool,
    scale: float,
    direction_stride: int,
) -> ScanGradients:
    """Gradients of `scan_forward`; writes d(z) into `grad_z`. Gradient of A is that of A_log if `from_log`."""
    batch, tokens, inner = x.shape
    head, last = directions[0], directions[-1]
    num_states = head.A.shape[1]
    padded = padded_states(num_states, is_low(x))
    width = 0 if head.conv_weight is None else head.conv_weight.shape[1]
    tiling = TILING
    channels = tiling.backward_channels
    blocks = -(-inner // channels)
    count = len(directions)

    def buffer(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=x.device)

    subs = tiling.chunk // tiling.backward_steps
    scratch = buffer(subs > 1, torch.float32, batch * blocks, subs, padded, channels)
    grad_u = buffer(needs.u, x.dtype, count, batch, tokens, inner)
    grad_delta = buffer(needs.delta, x.dtype, count, batch, tokens, inner)
    partial_BC = buffer(needs.BC, torch.float32, count, blocks, batch, tokens, 2 * padded)
    partial_A = buffer(needs.A, torch.float32, count, batch, num_states, inner)
    partial_D = buffer(needs.D, torch.float32, count, batch, inner)
    partial_bias = buffer(needs.bias, torch.float32, count, batch, inner)
    with torch.cuda.device_of(x):
        scan_backward_kernel[(blocks, batch)](
            grad, x, x if z is None else z, states, scratch, delta, B, C, *_pairs(head, last, x),
            grad_u, grad_delta, x if grad_z is None else grad_z, partial_BC, partial_A, partial_D, partial_bias,
            grad.stride(0), x.stride(0), 0 if z is None else z.stride(0), delta.stride(0), B.stride(0), C.stride(0),
            direction_stride, 0 if grad_z is None else grad_z.stride(0),
            batch, tokens, inner, num_chunks(tokens), 0, scale,
            STRIDE_GRAD=grad.stride(1), STRIDE_X=x.stride(1), STRIDE_Z=0 if z is None else z.stride(1),
            STRIDE_DELTA=delta.stride(1), STRIDE_B=B.stride(1), STRIDE_C=C.stride(1),
            STRIDE_GRAD_Z=0 if grad_z is None else grad_z.stride(1), STRIDE_INNER=inner,
            N=num_states, NP=padded, R=rank, RP=max(next_power_of_2(rank), 16), K=width,
            BE=channels, EVEN=inner % channels == 0, SUB=tiling.backward_steps, CHUNK=tiling.chunk,
            FIRST=first, LAST=first + count - 1, SOFTPLUS=softplus, FROM_LOG=from_log,
            HAS_D=head.D is not None, HAS_Z=z is not None, HAS_DT_BIAS=head.dt_bias is not None,
            HAS_CONV_BIAS=head.conv_bias is not None,
            NEED_U=needs.u, NEED_DELTA=needs.delta, NEED_A=needs.A, NEED_BC=needs.BC, NEED_D=needs.D,
            NEED_Z=needs.z, NEED_BIAS=needs.bias, DOT=is_low(x), DOT_TYPE=DOT_TYPE,
            num_warps=tiling.backward_warps, num_stages=1,
        )  # fmt: skip
    grad_A = partial_A
    if needs.A:
        grad_A = partial_A.sum(1).transpose(1, 2)
        if from_log:  # A = -exp(A_log)
            grad_A = grad_A * torch.stack([-torch.exp(d.A.float()) for d in directions])
    return ScanGradients(
        grad_u,
        grad_delta,
        partial_BC,
        grad_A,
        partial_D.sum(1) if needs.D else partial_D,
        partial_bias.sum(1) if needs.bias else partial_bias,
    )


def _pairs(head: Direction, last: Direction, absent: Tensor) -> list[Tensor]:
    """The kernels' parameter list: forward and reverse copy of each, `absent` where there is none."""
    names = ("A", "D", "dt_bias", "conv_weight", "conv_bias", "dt_weight")
    pairs = [getattr(direction, name) for name in names for direction in (head, last)]
    return [absent if tensor is None else tensor for tensor in pairs]
