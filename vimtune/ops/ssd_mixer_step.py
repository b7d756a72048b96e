"""One token of Mamba-2's mixer; what `vimtune.ops.step` is for that of Mamba.

Shape letters: B batch, H heads of width P, E = H P inner width, G groups, N states, F channels of the
convolution, K filter width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_offered
from vimtune.ops.ssd_mixer import SsdMixerOptions, SsdWeights
from vimtune.ops.step import is_composed


class SsdStepInputs(NamedTuple):
    """Tensors of a step; all are contiguous in kernels."""

    projected: Tensor
    """(B, 2 E + 2 G N + H), the output of in_proj."""
    recent: Tensor
    """(B, F, K), the last inputs of the convolution, the latest one at the end."""
    state: Tensor
    """(B, H, P, N), that of the scan."""
    weights: SsdWeights
    """Those of the mixer."""
    options: SsdMixerOptions
    """Its sizes and limits."""


class SsdStepKernels(Kernels[SsdStepInputs]):
    """Kernels of one token of a mixer. The batch is never empty."""

    operation = "ssd_mixer_step"

    @abstractmethod
    def forward(self, inputs: SsdStepInputs) -> Tensor:
        """The result (B, E) in the dtype of `projected`; `recent` and `state` are changed in place."""


def ssd_mixer_step(
    projected: Tensor,
    recent: Tensor,
    state: Tensor,
    weights: SsdWeights,
    options: SsdMixerOptions,
    backend: str = "auto",
) -> Tensor | None:
    """One token of `ssd_mixer` behind others, in few kernels where a backend has them.

    Args:
        projected: the output of in_proj, (B, 2 E + 2 G N + H).
        recent: the last inputs of the convolution, (B, F, K); brought up to date in place.
        state: that of the scan, (B, H, P, N); brought up to date in place.
        weights: those of the mixer.
        options: its sizes and limits.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, E). None, with nothing changed, where `vimtune.ops.causal_step` would return None.

    Raises:
        BackendUnavailable: `backend` names one that cannot run here.
    """
    if is_composed(projected, recent, state, *weights):
        return None
    inputs = SsdStepInputs(projected.contiguous(), recent, state, weights, options)
    kernels = find_offered(SsdStepKernels, backend, projected.device, inputs)
    return None if kernels is None else kernels.forward(inputs)
