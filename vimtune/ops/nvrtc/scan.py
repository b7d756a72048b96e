"""Launches of the kernels of scan.cu, which has the method and the shapes.

Shape letters: B batch, L tokens, E inner width, N states, P columns of `projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.ops.nvrtc import runtime

SOURCE = "scan.cu"
NUM_STATES = 16
CHANNELS = 64  # of a block
THREADS = 64


class ScanGradients(NamedTuple):
    """Gradients of u and of the time step before softplus (2, B, L, E), of B | C in parts to be added
    up (2, blocks, B, L, 2 N), and if asked for of A_log (2, E, N), D and the time step's bias (2, E)."""

    u: Tensor
    delta: Tensor
    BC: Tensor
    A: Tensor
    D: Tensor
    bias: Tensor


def covers(dtype: torch.dtype, inner: int, num_states: int) -> bool:
    """Whether the kernels exist for activations of this dtype and these sizes."""
    return dtype in (torch.bfloat16, torch.float16) and inner % 8 == 0 and num_states == NUM_STATES


def scan_forward(
    u: Tensor, delta: Tensor, projections: Tensor, A_log: Sequence[Tensor], D: Sequence[Tensor], xz: Tensor
) -> Tensor:
    """Gated average of both directions, (B, L, E).

    Args:
        u: convolved inputs (2, B, L, E).
        delta: time steps after softplus (2, B, L, E), fp16.
        projections: B | C | anything (2, B, L, P), in the dtype of `u`.
        A_log: (E, N) of either direction.
        D: (E,) of either direction.
        xz: output of in_proj (B, L, 2 E), whose second half is the gate.
    """
    _, batch, tokens, inner = u.shape
    out = torch.empty((batch, tokens, inner), dtype=u.dtype, device=u.device)
    vectors = [*map(_parameter, A_log), *map(_parameter, D)]
    arguments = [u, delta, projections, *vectors, xz[..., inner:], out]
    _launch("scan_forward", False, u, projections, arguments)
    return out


def scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    projections: Tensor,
    A_log: Sequence[Tensor],
    D: Sequence[Tensor],
    xz: Tensor,
    grad_xz: Tensor,
    need_parameters: bool,
) -> ScanGradients:
    """Gradients from `grad` (B, L, E), that of the result; that of the gate goes into half of `grad_xz`."""
    _, batch, tokens, inner = u.shape
    blocks = -(-inner // CHANNELS)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=u.device)

    found = ScanGradients(
        scratch(*u.shape, dtype=u.dtype),
        scratch(*u.shape, dtype=u.dtype),
        scratch(2, blocks, batch, tokens, 2 * NUM_STATES),
        scratch(2, batch, inner, NUM_STATES, wanted=need_parameters),
        scratch(2, batch, inner, wanted=need_parameters),
        scratch(2, batch, inner, wanted=need_parameters),
    )
    vectors = [*map(_parameter, A_log), *map(_parameter, D)]
    terms = scratch(*u.shape)
    arguments = [
        *(grad, u, delta, projections, *vectors, xz[..., inner:]),
        *(found.u, found.delta, grad_xz[..., inner:], terms, found.BC, found.A, found.D, found.bias),
    ]
    _launch("scan_backward", need_parameters, u, projections, arguments)
    if not need_parameters:
        return found
    return found._replace(A=found.A.sum(1), D=found.D.sum(1), bias=found.bias.sum(1))


def _launch(name: str, trained: bool, u: Tensor, projections: Tensor, arguments: Sequence[Tensor]) -> None:
    _, batch, tokens, inner = u.shape
    constants = (
        ("WIDTH", inner),
        ("COLUMNS", projections.shape[-1]),
        ("FP16", int(u.dtype == torch.float16)),
        ("TRAINED", int(trained)),
    )
    with torch.cuda.device_of(u):
        kernel = runtime.load_kernel(SOURCE, name, constants, u.device.index)
        kernel((-(-inner // CHANNELS), batch), THREADS, [*arguments, batch, tokens])


def _parameter(weight: Tensor) -> Tensor:
    return weight.float().contiguous()
