"""One token of Mamba's mixer, which is what decoding runs again and again.

It is composed of some forty small operations, whose launches take longer than their work. Where a backend
has a kernel for the whole, `causal_step` uses it. It changes the states of a sequence in place, and is no
operation of torch.library: a compiler makes kernels of its own of the small operations.

Shape letters: B batch, E inner width, N states, K filter width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_offered
from vimtune.ops.mixer import DirectionWeights, is_trained


class StepInputs(NamedTuple):
    """Tensors of a step; all are contiguous in kernels."""

    xz: Tensor
    """(B, 2 E), the output of in_proj."""
    recent: Tensor
    """(B, E, K), the last inputs of the convolution, the latest one at the end."""
    state: Tensor
    """(B, E, N), that of the scan."""
    weights: DirectionWeights
    """Those of the mixer."""


class StepKernels(Kernels[StepInputs]):
    """Kernels of one token of a mixer. The batch is never empty."""

    operation = "causal_step"

    @abstractmethod
    def forward(self, inputs: StepInputs) -> Tensor:
        """The gated result (B, E) in the dtype of `xz`; `recent` and `state` are changed in place."""


def causal_step(
    xz: Tensor, recent: Tensor, state: Tensor, weights: DirectionWeights, backend: str = "auto"
) -> Tensor | None:
    """One token of `causal_mixer` behind others, in one kernel where a backend has it.

    Args:
        xz: the output of in_proj, (B, 2 E).
        recent: the last inputs of the convolution, (B, E, K); brought up to date in place.
        state: that of the scan, (B, E, N); brought up to date in place.
        weights: those of the mixer.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, E). None, with nothing changed, where the step has to be composed of the convolution
        and `scan_step`: without a kernel, under a compiler, where gradients are wanted, and for states that
        are not contiguous.

    Raises:
        BackendUnavailable: `backend` names one that cannot run here.
    """
    if is_composed(xz, recent, state, *weights):
        return None
    inputs = StepInputs(xz.contiguous(), recent, state, weights)
    kernels = find_offered(StepKernels, backend, xz.device, inputs)
    return None if kernels is None else kernels.forward(inputs)


def is_composed(projected: Tensor, recent: Tensor, state: Tensor, *weights: Tensor | None) -> bool:
    """Whether a token has to be computed by small operations, whatever kernels there are; the arguments are
    those of `causal_step`."""
    if torch.compiler.is_compiling() or is_trained(projected, recent, state, *weights):
        return True
    return projected.numel() == 0 or not (recent.is_contiguous() and state.is_contiguous())
