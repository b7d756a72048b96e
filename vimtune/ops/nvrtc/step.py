"""Launches of the kernel of step.cu, one token of Mamba's mixer.

Shape letters: B batch, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.mixer import DirectionWeights
from vimtune.ops.nvrtc import runtime
from vimtune.ops.step import StepInputs

SOURCE = "step.cu"
"""File with the kernel."""
THREADS = 512
"""Number of threads of a block."""


def refusals(inputs: StepInputs) -> list[str]:
    """Reasons why the kernel does not take these tensors."""
    dtype, reasons = inputs.xz.dtype, []
    if dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"activations are {dtype}, the kernel has bf16 and fp16")
    if inputs.recent.dtype != dtype:
        reasons.append(f"inputs of the convolution are {inputs.recent.dtype}, and activations {dtype}")
    if inputs.state.dtype != torch.float32:
        reasons.append(f"the state is {inputs.state.dtype}, the kernel has fp32")
    for name, weight in zip(DirectionWeights._fields, inputs.weights, strict=True):
        if weight is not None and weight.dtype not in (torch.float32, dtype):
            reasons.append(f"{name} is {weight.dtype}, the kernel has fp32 and the dtype of activations")
    needed, available = _shared_memory(inputs.weights), runtime.shared_memory(inputs.xz.device)
    if needed > available:
        reasons.append(f"inner width {len(inputs.weights.D)} needs {needed} of {available} bytes")
    return reasons


def mixer_step(inputs: StepInputs) -> Tensor:
    """The gated result (B, E); `recent` and `state` are brought up to date in place."""
    xz, recent, state, weights = inputs
    inner, num_states = weights.A_log.shape
    own = [weights.conv_weight if weight is None else weight.contiguous() for weight in weights]
    halves = sum(1 << index for index, weight in enumerate(own) if weight.dtype != torch.float32)
    constants = (
        ("WIDTH", inner),
        ("STATES", num_states),
        ("RANK", weights.dt_proj.shape[1]),
        ("FILTER", weights.conv_weight.shape[1]),
        ("THREADS", THREADS),
        ("FP16", int(xz.dtype == torch.float16)),
        ("HALVES", halves),
    )
    out, has_bias = xz.new_empty((len(xz), inner)), int(weights.conv_bias is not None)
    with device_of(xz):
        kernel = runtime.load_kernel(SOURCE, "mixer_step", constants, xz.device.index)
        arguments: list[Tensor | int] = [xz, recent, state, out, *own, has_bias]
        kernel((len(xz), 1, 1), THREADS, arguments, _shared_memory(weights))
    return out


def _shared_memory(weights: DirectionWeights) -> int:
    """Bytes of shared memory that a block needs: for u, and for the rows of the projection."""
    rows, inner = weights.x_proj.shape
    return 4 * (inner + rows)
