"""The gated RMSNorm of Mamba-2 in operations of PyTorch, and its gradients.

It is RMSNorm (Zhang & Sennrich 2019, eq. 4) of x SiLU(gate), of each group of channels by itself (Dao & Gu
2024, arXiv 2405.21060, section 7). Sums are fp32, fp64 for fp64 input.

Shape letters: E channels, g groups of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """u / sqrt(mean(u^2) + eps) * weight for u = x SiLU(gate), where the mean is over a group of channels.

    Args:
        x: (..., E).
        gate: (..., E).
        weight: (E,).
        groups: g, which divides E.
        eps: added to the mean.

    Returns:
        (..., E) in the dtype of `gate`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    product = (x.to(wide) * F.silu(gate.to(wide))).unflatten(-1, (groups, -1))
    normed = F.rms_norm(product, product.shape[-1:], None, eps).flatten(-2)
    return (normed * weight.to(wide)).to(gate.dtype)


def gated_norm_gradients(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and gate in their dtypes, and of the weight in that of sums.

    Args:
        grad: gradient of the result, (..., E).
        x: that of `gated_rms_norm`, as are the others.
        gate: (..., E).
        weight: (E,).
        groups: g.
        eps: added to the mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    high, grad = gate.to(wide), grad.to(wide)
    opened = high.sigmoid()
    silu = high * opened
    product = (x.to(wide) * silu).unflatten(-1, (groups, -1))
    inverse = product.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = product.mul_(inverse)
    grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0)
    own = (grad * weight.to(wide)).unflatten(-1, (groups, -1))
    along = (own * normed).mean(-1, keepdim=True)
    grad_product = own.sub_(normed.mul_(along)).mul_(inverse).flatten(-2)
    grad_gate = opened.addcmul_(silu, 1 - opened).mul_(grad_product).mul_(x)
    return grad_product.mul_(silu).to(x.dtype), grad_gate.to(gate.dtype), grad_weight
