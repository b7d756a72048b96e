"""Two scaled activations added to tokens in operations of PyTorch, with an explicit backward pass.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Gradients
from vimtune.ops.silu_pair import SiluPair, SiluPairKernels


class EagerSiluPair(SiluPairKernels):
    """The formula, and its gradients without a record of autograd."""

    def forward(self, x: Tensor, pair: SiluPair, skipped: int) -> Tensor:
        return reference.add_silu_pair(x, *pair, skipped)

    def backward(self, grad: Tensor, pair: SiluPair, skipped: int) -> Gradients:
        wide = torch.promote_types(grad.dtype, torch.float32)
        own = grad.to(wide, copy=True)
        own[:, skipped] = 0
        return *_gradients(own, *pair[:2]), *_gradients(own, *pair[2:])


def _gradients(grad: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `values` (B, L, D) and `scale` (D,) from that of scale SiLU(values)."""
    high = values.to(grad.dtype)
    opened = high.sigmoid()
    silu = high * opened
    grad_scale = torch.einsum("bld,bld->d", grad, silu)
    slope = opened.addcmul_(silu, 1 - opened)
    return slope.mul_(grad).mul_(scale), grad_scale
