"""Launches of the kernels of ssd_step.cu, one token of Mamba-2's mixer.

Shape letters: B batch, H heads of width P, E = H P inner width, N states, F channels of the convolution, K
filter width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.nvrtc import runtime, step
from vimtune.ops.ssd_mixer import SsdWeights
from vimtune.ops.ssd_mixer_step import SsdStepInputs

SOURCE = "ssd_step.cu"
"""File with the kernels."""
THREADS = 256
"""Number of threads of a block."""


def refusals(inputs: SsdStepInputs) -> list[str]:
    """Reasons why the kernels do not take these tensors."""
    named = zip(SsdWeights._fields, inputs.weights, strict=True)
    return step.dtype_refusals(inputs.projected.dtype, inputs.recent.dtype, inputs.state.dtype, named)


def mixer_step(inputs: SsdStepInputs) -> Tensor:
    """The result (B, E); `recent` and `state` are brought up to date in place."""
    projected, recent, state, weights, options = inputs
    batch, heads, width, states = state.shape
    conv, conv_bias, dt_bias, A_log, D, norm = own = step.for_kernels(weights)
    constants = (
        ("HEADS", heads),
        ("HEAD", width),
        ("STATES", states),
        ("GROUPS", options.groups),
        ("NORM_GROUPS", options.norm_groups),
        ("FILTER", recent.shape[2]),
        ("THREADS", THREADS),
        ("FP16", int(projected.dtype == torch.float16)),
        ("HALVES", step.halves(own)),
    )
    convolved = projected.new_empty(recent.shape[:2])
    gated = projected.new_empty((batch, heads * width), dtype=torch.float32)
    out = projected.new_empty((batch, heads * width))
    has_bias = int(weights.conv_bias is not None)
    with device_of(projected):
        index = projected.device.index
        convolve, scan, normalise = (
            runtime.load_kernel(SOURCE, name, constants, index)
            for name in ("convolve_token", "scan_token", "norm_token")
        )
        blocks = -(-recent.shape[1] // THREADS), batch, 1
        convolve(blocks, THREADS, [projected, recent, convolved, conv, conv_bias, has_bias])
        limits = options.lowest, options.highest
        scan((heads, batch, 1), THREADS, [projected, convolved, state, gated, dt_bias, A_log, D, *limits])
        shared = 4 * (THREADS // 32)
        normalise((options.norm_groups, batch, 1), THREADS, [gated, out, norm, options.eps], shared)
    return out
