"""Launches of the scan kernels: shapes, strides, buffers and sums of partial results.

Shape letters: B batch, L tokens, E inner width, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.triton.backend import CHUNK
from vimtune.ops.triton.common import INTERPRETED, next_power_of_2
from vimtune.ops.triton.convolution import CHANNELS, ROWS, conv_grid
from vimtune.ops.triton.project_kernels import gate_finish_kernel, gate_grad_kernel
from vimtune.ops.triton.scan_kernels import scan_backward_kernel, scan_forward_kernel


@dataclass(frozen=True)
class Tiling:
    """How the scan is cut. Found by benchmarks/gpu_kernels.py on an H200, see benchmarks/LOG.md."""

    forward_channels: int = 64
    forward_steps: int = 8
    forward_warps: int = 1
    backward_channels: int = 32
    backward_steps: int = 4
    backward_warps: int = 1
    chunk: int = CHUNK


TILING = Tiling()
"""The tiling that is in use; measurements put others in its place."""
WARPS_OF_A_PROCESSOR = 12
"""Number of warps of the scan that a multiprocessor is given before sequences stay whole."""
SHORTEST_SEGMENT = 128
"""Fewest tokens of a segment."""


@dataclass(frozen=True)
class Direction:
    """Parameters of one direction's scan."""

    A: Tensor
    D: Tensor | None
    dt_bias: Tensor | None


@dataclass(frozen=True)
class ScanInputs:
    """u, delta (B, L, E), B, C (B, L, N) of the first direction; the second one's lie a stride away.

    `raw`: delta is what goes through dt_bias and, if `softplus`, softplus; else it is the result.
    """

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    directions: Sequence[Direction]
    first: int
    softplus: bool
    raw: bool
    from_log: bool
    u_stride: int = 0
    delta_stride: int = 0
    BC_stride: int = 0
    state: Tensor | None = None
    """The state before the first token of the only direction (B, N, E), fp32; None for zeros."""
    starts: Tensor | None = None
    """The state before the first token of each direction (directions, N, E), fp32, the same for all images;
    None for zeros. The backward pass does not know it."""


@dataclass(frozen=True)
class ScanNeeds:
    """Which results of `scan_backward` are wanted; BC are B and C, y is the ungated result."""

    u: bool
    delta: bool
    A: bool
    BC: bool
    D: bool
    y: bool
    bias: bool


@dataclass(frozen=True)
class ScanGradients:
    """u, delta before softplus, y recomputed (directions, B, L, E); BC (directions, blocks, B, L, 2 NP);
    A (of A_log if that was given; directions, E, N); D, bias (directions, E); state (B, N, E). Empty where
    not asked for."""

    u: Tensor
    delta: Tensor
    y: Tensor
    BC: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor
    state: Tensor


def padded_states(num_states: int, low: bool) -> int:
    """States as the kernels hold them: the matrix units, mostly used below fp32, have a least size."""
    return max(next_power_of_2(num_states), 16 if low else 8)


def num_chunks(num_tokens: int) -> int:
    """Number of chunks between whose states the backward pass computes the others again."""
    return -(-num_tokens // TILING.chunk)


def num_segments(u: Tensor) -> int:
    """Into how many segments the sequences of `u` (B, L, E) are cut where no backward pass follows.

    A scan in segments does twice the work, which pays where a card would hold many times the warps that a
    scan of whole sequences has.
    """
    batch, tokens, inner = u.shape
    if u.device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(u.device).multi_processor_count
    warps = batch * -(-inner // TILING.forward_channels) * TILING.forward_warps
    return max(1, min(WARPS_OF_A_PROCESSOR * processors // max(1, warps), tokens // SHORTEST_SEGMENT))


def is_low(tensor: Tensor) -> bool:
    """Whether products may be rounded to half precision on the way through the matrix units."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def dot_type(tensor: Tensor) -> tl.dtype:
    """What the matrix units multiply in. The interpreter takes bf16 matrices for integers."""
    if INTERPRETED or not is_low(tensor):
        return tl.float32
    return tl.bfloat16 if tensor.dtype == torch.bfloat16 else tl.float16


def scan_forward(
    inputs: ScanInputs, z: Tensor | None, out: Tensor, scale: float, save_states: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the directions, times `scale` and SiLU(z), into `out` (B, L, E).

    Returns:
        The saved states, and the last one (B, N, E), which means something only if `inputs` have the first.
    """
    u, delta, B, C = inputs.u, inputs.delta, inputs.B, inputs.C
    batch, tokens, inner = u.shape
    head = inputs.directions[0]
    num_states = head.A.shape[1]
    chunks = num_chunks(tokens)
    shape = (len(inputs.directions), batch, chunks - 1, num_states, inner) if save_states else (0,)
    states = torch.empty(shape, dtype=torch.float32, device=u.device)
    channels = TILING.forward_channels
    first = next((given for given in (inputs.state, inputs.starts) if given is not None), states)
    last = torch.empty_like(first) if inputs.state is not None else states
    size = num_states * inner
    with device_of(u):
        scan_forward_kernel[(-(-inner // channels), batch)](
            u, u if z is None else z, out, states, first, last, delta, B, C, *_pairs(inputs),
            u.stride(0), 0 if z is None else z.stride(0), out.stride(0), delta.stride(0),
            B.stride(0), C.stride(0), inputs.u_stride, inputs.delta_stride, inputs.BC_stride,
            0 if inputs.state is None else size, 0 if inputs.starts is None else size,
            batch, tokens, inner, chunks, 0, scale,
            STRIDE_U=u.stride(1), STRIDE_Z=0 if z is None else z.stride(1), STRIDE_OUT=out.stride(1),
            STRIDE_DELTA=delta.stride(1), STRIDE_B=B.stride(1), STRIDE_C=C.stride(1), STRIDE_INNER=inner,
            N=num_states, NP=padded_states(num_states, is_low(u)), BE=channels, EVEN=inner % channels == 0,
            STEPS=TILING.forward_steps, CHUNK=TILING.chunk,
            FIRST=inputs.first, LAST=inputs.first + len(inputs.directions) - 1,
            SOFTPLUS=inputs.softplus and inputs.raw, FROM_LOG=inputs.from_log, HAS_D=head.D is not None,
            HAS_Z=z is not None, HAS_DT_BIAS=inputs.raw and head.dt_bias is not None, SAVE=save_states,
            HAS_FIRST=first is not states, NEED_LAST=inputs.state is not None, num_warps=TILING.forward_warps,
        )  # fmt: skip
    return states, last


def scan_backward(
    inputs: ScanInputs, grad: Tensor, states: Tensor, needs: ScanNeeds, grad_last: Tensor | None = None
) -> ScanGradients:
    """Gradients of the scan from `grad` (B, L, E), that of the ungated and unscaled sum of the directions.

    With a state in `inputs`, `grad_last` (B, N, E) is the gradient of the last one.
    """
    u, delta, B, C = inputs.u, inputs.delta, inputs.B, inputs.C
    batch, tokens, inner = u.shape
    head = inputs.directions[0]
    num_states = head.A.shape[1]
    padded = padded_states(num_states, is_low(u))
    channels = TILING.backward_channels
    blocks = -(-inner // channels)
    count = len(inputs.directions)

    def buffer(wanted: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=u.device)

    subs = TILING.chunk // TILING.backward_steps
    scratch = buffer(subs > 1, torch.float32, count, batch * blocks, subs, padded, channels)
    grad_u = buffer(needs.u, u.dtype, count, batch, tokens, inner)
    grad_delta = buffer(needs.delta, u.dtype, count, batch, tokens, inner)
    y = buffer(needs.y, u.dtype, count, batch, tokens, inner)
    partial_BC = buffer(needs.BC, torch.float32, count, blocks, batch, tokens, 2 * padded)
    partial_A = buffer(needs.A, torch.float32, count, batch, num_states, inner)
    partial_D = buffer(needs.D, torch.float32, count, batch, inner)
    partial_bias = buffer(needs.bias, torch.float32, count, batch, inner)
    grad_state = buffer(grad_last is not None, torch.float32, batch, num_states, inner)
    first = states if inputs.state is None else inputs.state
    with device_of(u):
        scan_backward_kernel[(blocks, batch, count)](
            grad, u, states, first, first if grad_last is None else grad_last, grad_state,
            scratch, delta, B, C, *_pairs(inputs),
            grad_u, grad_delta, y, partial_BC, partial_A, partial_D, partial_bias,
            grad.stride(0), u.stride(0), delta.stride(0), B.stride(0), C.stride(0),
            inputs.u_stride, inputs.delta_stride, inputs.BC_stride,
            batch, tokens, inner, num_chunks(tokens), 0,
            STRIDE_GRAD=grad.stride(1), STRIDE_U=u.stride(1), STRIDE_DELTA=delta.stride(1),
            STRIDE_B=B.stride(1), STRIDE_C=C.stride(1), STRIDE_INNER=inner, N=num_states, NP=padded,
            BE=channels, EVEN=inner % channels == 0, SUB=TILING.backward_steps, CHUNK=TILING.chunk,
            FIRST=inputs.first, LAST=inputs.first + count - 1,
            SOFTPLUS=inputs.softplus and inputs.raw, SLOPE=inputs.softplus, FROM_LOG=inputs.from_log,
            HAS_D=head.D is not None, HAS_DT_BIAS=inputs.raw and head.dt_bias is not None,
            NEED_U=needs.u, NEED_DELTA=needs.delta, NEED_A=needs.A, NEED_BC=needs.BC, NEED_D=needs.D,
            NEED_Y=needs.y, NEED_BIAS=needs.bias, DOT=is_low(u), DOT_TYPE=dot_type(u),
            HAS_STATE=grad_last is not None,
            num_warps=TILING.backward_warps, num_stages=1,
        )  # fmt: skip
    grad_A = partial_A
    if needs.A:
        grad_A = partial_A.sum(1).transpose(1, 2)
        if inputs.from_log:  # A is -exp(A_log), and so is its derivative.
            grad_A = grad_A * torch.stack([-torch.exp(d.A.float()) for d in inputs.directions])
    return ScanGradients(
        grad_u,
        grad_delta,
        y,
        partial_BC,
        grad_A,
        partial_D.sum(1) if needs.D else partial_D,
        partial_bias.sum(1) if needs.bias else partial_bias,
        grad_state,
    )


def gate_gradient(grad: Tensor, z: Tensor, scale: float) -> Tensor:
    """grad * scale * SiLU(z), (B, L, E) contiguous."""
    batch, tokens, inner = grad.shape
    out = torch.empty((batch, tokens, inner), dtype=grad.dtype, device=grad.device)
    with device_of(grad):
        gate_grad_kernel[conv_grid(batch * tokens, inner)](
            grad, z, out, grad.stride(0), grad.stride(1), z.stride(0), z.stride(1),
            batch * tokens, tokens, inner, scale, BM=ROWS, BE=CHANNELS,
        )  # fmt: skip
    return out


def gate_finish(grad: Tensor, z: Tensor, y: Tensor, out: Tensor, scale: float) -> None:
    """`out` = gradient of `z` (B, L, E), given what the gate multiplied: `y` (directions, B, L, E)."""
    batch, tokens, inner = grad.shape
    with device_of(grad):
        gate_finish_kernel[conv_grid(batch * tokens, inner)](
            grad, z, y, out, grad.stride(0), grad.stride(1), z.stride(0), z.stride(1),
            out.stride(0), out.stride(1),
            batch * tokens, tokens, inner, scale, BM=ROWS, BE=CHANNELS, DIRECTIONS=y.shape[0],
        )  # fmt: skip


def _pairs(inputs: ScanInputs) -> list[Tensor]:
    """A, D and dt_bias of the forward and the reverse direction; any tensor where there is none."""
    head, last = inputs.directions[0], inputs.directions[-1]
    pairs = [getattr(direction, name) for name in ("A", "D", "dt_bias") for direction in (head, last)]
    return [inputs.u if tensor is None else tensor for tensor in pairs]
