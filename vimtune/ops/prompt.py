"""The operation `causal_prompt`: the inside of Mamba's mixer over a prompt, with the state behind it.

A language model that writes text reads its prompt once, and from then on hands a state from token to token.
No gradient is asked for there, so this has none.

Shape letters: B batch, L tokens, E inner width, N states.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Optional

import torch
from torch import Tensor

from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.mixer import DirectionWeights, MixerInputs, is_trained
from vimtune.ops.operation import operation, run


class PromptKernels(Kernels[MixerInputs]):
    """Kernels of a mixer with one direction, which give the last state; inputs are never empty."""

    operation = "causal_prompt"

    @abstractmethod
    def forward(self, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        """The gated result (B, L, E) in the dtype of `xz`, and the state behind it (B, E, N) in fp32."""


def causal_prompt(
    xz: Tensor, weights: DirectionWeights, backend: str = "auto"
) -> tuple[Tensor, Tensor] | None:
    """What `causal_mixer` computes, and the state behind the last token, where a backend has kernels for it.

    Args:
        xz: the output of in_proj, (B, L, 2 E).
        weights: those of the mixer.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, L, E) and the state (B, E, N) in fp32. None where it has to be composed of the
        convolution and `stateful_scan`: without kernels, for empty tensors, and where gradients are wanted.

    Raises:
        BackendUnavailable: `backend` names one that cannot run here.
    """
    if xz.numel() == 0 or is_trained(xz, *weights):
        return None
    name = find_backend(PromptKernels, backend, xz.device, MixerInputs(xz, (weights,)))
    if not name:
        return None
    out, last = run("causal_prompt", xz, *weights, name)
    return out, last


# torch.library reads the annotations at run time, hence Optional.


@operation("causal_prompt")
def _prompt(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],  # noqa: UP045
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result and the last state."""
    weights = (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, offset)
    own = DirectionWeights(*(None if weight is None else weight.contiguous() for weight in weights))  # type: ignore[arg-type]
    inputs = MixerInputs(xz.contiguous(), (own,))
    return find_kernels(PromptKernels, backend, xz.device, inputs)[1].forward(inputs)


@_prompt.register_fake
def _(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    offset: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, twice = xz.shape
    return (
        xz.new_empty((batch, tokens, twice // 2)),
        xz.new_empty((batch, *A_log.shape), dtype=torch.float32),
    )
