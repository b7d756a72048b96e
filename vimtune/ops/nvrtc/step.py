"""Launches of the kernel of step.cu, one token of Mamba's mixer.

Shape letters: B batch, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.mixer import DirectionWeights, offset_refusals
from vimtune.ops.nvrtc import runtime
from vimtune.ops.step import StepInputs

SOURCE = "step.cu"
"""File with the kernel."""
THREADS = 512
"""Number of threads of a block."""


def refusals(inputs: StepInputs) -> list[str]:
    """Reasons why the kernel does not take these tensors."""
    named = zip(DirectionWeights._fields, inputs.weights, strict=True)
    reasons = offset_refusals(inputs.weights)
    reasons += dtype_refusals(inputs.xz.dtype, inputs.recent.dtype, inputs.state.dtype, named)
    needed, available = _shared_memory(inputs.weights), runtime.shared_memory(inputs.xz.device)
    if needed > available:
        reasons.append(f"inner width {len(inputs.weights.D)} needs {needed} of {available} bytes")
    return reasons


def dtype_refusals(
    activations: torch.dtype,
    recent: torch.dtype,
    state: torch.dtype,
    weights: Iterable[tuple[str, Tensor | None]],
) -> list[str]:
    """Reasons why no kernel for a token takes tensors of these dtypes; weights come with their names."""
    reasons = []
    if activations not in (torch.bfloat16, torch.float16):
        reasons.append(f"activations are {activations}, the kernel has bf16 and fp16")
    if recent != activations:
        reasons.append(f"inputs of the convolution are {recent}, and activations {activations}")
    if state != torch.float32:
        reasons.append(f"the state is {state}, the kernel has fp32")
    for name, weight in weights:
        if weight is not None and weight.dtype not in (torch.float32, activations):
            reasons.append(f"{name} is {weight.dtype}, the kernel has fp32 and the dtype of activations")
    return reasons


def for_kernels(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """Weights as the kernels take them; the first, that of the convolution, stands for a bias that is not
    there."""
    first = weights[0]
    assert first is not None
    return [(first if weight is None else weight).contiguous() for weight in weights]


def halves(weights: Sequence[Tensor]) -> int:
    """The constant HALVES of step.cuh."""
    return sum(1 << index for index, weight in enumerate(weights) if weight.dtype != torch.float32)


def mixer_step(inputs: StepInputs) -> Tensor:
    """The gated result (B, E); `recent` and `state` are brought up to date in place."""
    xz, recent, state, weights = inputs
    inner, num_states = weights.A_log.shape
    own = for_kernels(weights[:-1])  # There is no offset.
    constants = (
        ("WIDTH", inner),
        ("STATES", num_states),
        ("RANK", weights.dt_proj.shape[1]),
        ("FILTER", weights.conv_weight.shape[1]),
        ("THREADS", THREADS),
        ("FP16", int(xz.dtype == torch.float16)),
        ("HALVES", halves(own)),
    )
    out, has_bias = xz.new_empty((len(xz), inner)), int(weights.conv_bias is not None)
    with device_of(xz):
        kernel = runtime.load_kernel(SOURCE, "mixer_step", constants, xz.device.index)
        arguments: list[runtime.Argument] = [xz, recent, state, out, *own, has_bias]
        kernel((len(xz), 1, 1), THREADS, arguments, _shared_memory(weights))
    return out


def _shared_memory(weights: DirectionWeights) -> int:
    """Bytes of shared memory that a block needs: for u, and for the rows of the projection."""
    rows, inner = weights.x_proj.shape
    return 4 * (inner + rows)
