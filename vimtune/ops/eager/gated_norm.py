"""The gated RMSNorm of Mamba-2 in operations of PyTorch, with an explicit backward pass.

Shape letters: E channels, g groups of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Gradients
from vimtune.ops.gated_norm import GatedNormInputs, GatedNormKernels


class EagerGatedNorm(GatedNormKernels):
    """The formula, and its gradients without a record of autograd."""

    def forward(self, inputs: GatedNormInputs, groups: int, eps: float) -> Tensor:
        return reference.gated_rms_norm(*inputs, groups, eps).contiguous()

    def backward(
        self, grad: Tensor, inputs: GatedNormInputs, groups: int, eps: float, need_weight: bool
    ) -> Gradients:
        x, gate, weight = inputs
        wide = torch.promote_types(x.dtype, torch.float32)
        high, grad = gate.to(wide), grad.to(wide)
        opened = high.sigmoid()
        silu = high * opened
        product = (x.to(wide) * silu).unflatten(-1, (groups, -1))
        inverse = product.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = product.mul_(inverse)
        grad_weight = None
        if need_weight:
            grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype)
        own = (grad * weight.to(wide)).unflatten(-1, (groups, -1))
        along = (own * normed).mean(-1, keepdim=True)
        grad_product = own.sub_(normed.mul_(along)).mul_(inverse).flatten(-2)
        grad_gate = opened.addcmul_(silu, 1 - opened).mul_(grad_product).mul_(x)
        return grad_product.mul_(silu).to(x.dtype), grad_gate.to(gate.dtype), grad_weight
