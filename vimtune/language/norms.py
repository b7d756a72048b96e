"""The norms of Mamba and Mamba-2 models, in one pass over the tokens where a backend has kernels.

transformers computes them in half a dozen operations, each of which reads and writes the residual stream in
fp32: beside fast mixers they would take a large part of a training step on a GPU.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm

from vimtune.ops import add_rms_norm, has_add_rms_norm


class FastNorm(nn.Module):
    """What both classes of norms have in common: RMSNorm of tokens (..., D).

    The result has the dtype of autocast where that is on, in which the following projection would read it
    anyway, and that of the weight elsewhere.
    """

    backend = "auto"
    """Backend of the norm, see `vimtune.ops`."""
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalised tokens, of the shape of `hidden_states`."""
        if has_add_rms_norm(self.backend, hidden_states.device):
            return add_rms_norm(None, hidden_states, self.weight, self.variance_epsilon, self.backend)[0]
        normed: Tensor = super().forward(hidden_states)
        return normed


class FastMambaNorm(FastNorm, MambaRMSNorm):  # type: ignore[misc]  # transformers is untyped
    """The norm before a Mamba layer and behind the last one."""


class FastMamba2Norm(FastNorm, Mamba2RMSNorm):  # type: ignore[misc]  # transformers is untyped
    """The norm before a Mamba-2 layer and behind the last one."""
