"""Residual add followed by RMSNorm as one differentiable operation.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.fused import has_bidirectional_scan


def add_rms_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + branch) * weight, residual + branch); without `branch` the residual itself.

    `branch`, `residual` (B, L, D), `weight` (D,). The sum keeps the dtype of `residual`, statistics are
    fp32, the norm comes in the dtype of autocast where it is on and of `weight` elsewhere.
    """
    dtype = weight.dtype
    if torch.is_autocast_enabled(residual.device.type):
        dtype = torch.get_autocast_dtype(residual.device.type)
    if has_bidirectional_scan(backend, str(residual.device)):
        normed, total, _ = torch.ops.vimtune.add_rms_norm(branch, residual, weight, eps, dtype)
        return normed, residual if branch is None else total
    total = residual if branch is None else residual + branch
    wide = torch.promote_types(total.dtype, torch.float32)
    with torch.autocast(residual.device.type, enabled=False):
        normed = F.rms_norm(total.to(wide), weight.shape, weight.to(wide), eps)
    return normed.to(dtype), total


@torch.library.custom_op("vimtune::add_rms_norm", mutates_args=())
def _norm(
    branch: Optional[Tensor],  # noqa: UP045
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from vimtune.ops.triton import norm

    return norm.forward(
        None if branch is None else branch.contiguous(), residual.contiguous(), weight, eps, dtype
    )


@_norm.register_fake
def _(branch, residual, weight, eps, dtype):
    rows = residual.numel() // residual.shape[-1]
    return (
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty((0,) if branch is None else residual.shape),
        residual.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("vimtune::add_rms_norm_backward", mutates_args=())
def _norm_backward(
    grad_normed: Tensor,
    grad_total: Optional[Tensor],  # noqa: UP045
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    branch_dtype: Optional[torch.dtype],  # noqa: UP045
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from vimtune.ops.triton import norm

    grad_total = None if grad_total is None else grad_total.contiguous()
    residual, branch, own = norm.backward(
        grad_normed.contiguous(), grad_total, total.contiguous(), weight, inverse, branch_dtype, need_weight
    )
    return (
        residual,
        residual.new_empty(0) if branch is None else branch,
        residual.new_empty(0) if own is None else own,
    )


@_norm_backward.register_fake
def _(grad_normed, grad_total, total, weight, inverse, branch_dtype, need_weight):
    return (
        total.new_empty(total.shape),
        total.new_empty((0,) if branch_dtype is None else total.shape, dtype=branch_dtype or total.dtype),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup(ctx, inputs, output) -> None:
    branch, residual, weight, _eps, _dtype = inputs
    ctx.save_for_backward(residual if branch is None else output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2], *([output[1]] if branch is None else []))
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype


def _autograd(ctx, grad_normed, grad_total, _grad_inverse):
    total, weight, inverse = ctx.saved_tensors
    need_branch, need_residual, need_weight = ctx.needs_input_grad[:3]
    if grad_normed is None:
        passed = grad_total if need_residual else None
        branch = grad_total.to(ctx.branch_dtype) if need_branch else None
        return branch, passed, torch.zeros_like(weight) if need_weight else None, None, None
    residual, branch, own = torch.ops.vimtune.add_rms_norm_backward(
        grad_normed,
        grad_total,
        total,
        weight,
        inverse,
        ctx.branch_dtype if need_branch else None,
        need_weight,
    )
    return (
        branch if need_branch else None,
        residual if need_residual else None,
        own if need_weight else None,
        None,
        None,
    )


_norm.register_autograd(_autograd, setup_context=_setup)
