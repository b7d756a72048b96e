"""Residual add followed by RMSNorm as one differentiable operation.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.fused import has_bidirectional_scan
from vimtune.ops.operation import check_inputs, operation


def add_rms_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + branch) * weight, residual + branch); without `branch` the residual itself.

    `branch`, `residual` (B, L, D), `weight` (D,). The sum keeps the dtype of `residual`, statistics are
    fp32, the norm comes in the dtype of autocast where it is on and of `weight` elsewhere. B and L may be 0.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    shape = residual.shape
    check_inputs(
        residual.device, branch=(branch, shape), residual=(residual, shape), weight=(weight, shape[-1:])
    )
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


@operation("add_rms_norm")
def _norm(
    branch: Optional[Tensor],  # noqa: UP045
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from vimtune.ops.triton import norm

    if residual.numel() == 0:
        return _empty_results(branch, residual, dtype)
    return norm.forward(
        None if branch is None else branch.contiguous(), residual.contiguous(), weight, eps, dtype
    )


@_norm.register_fake
def _(branch, residual, weight, eps, dtype):
    return _empty_results(branch, residual, dtype)


def _empty_results(
    branch: Tensor | None, residual: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = residual.numel() // residual.shape[-1]
    return (
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty((0,) if branch is None else residual.shape),
        residual.new_empty(rows, dtype=torch.float32),
    )


@operation("add_rms_norm_backward")
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

    if total.numel() == 0:
        nothing, of_branch, of_weight = _fake_gradients(total, weight, branch_dtype, need_weight)
        return nothing, of_branch, of_weight.zero_()
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
    return _fake_gradients(total, weight, branch_dtype, need_weight)


def _fake_gradients(
    total: Tensor, weight: Tensor, branch_dtype: torch.dtype | None, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
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
