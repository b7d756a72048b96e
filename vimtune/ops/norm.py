"""The operation `add_rms_norm`, the sum of a residual block followed by the RMSNorm of the next one.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import candidates, chosen_backend, find_backend, find_kernels
from vimtune.ops.operation import check_inputs, operation, run


class NormInputs(NamedTuple):
    """Tensors of a sum with its norm; contiguous in kernels."""

    branch: Tensor | None
    """(..., D), what is added; None for a norm alone."""
    residual: Tensor
    """(..., D)"""
    weight: Tensor
    """(D,)"""


class NormKernels(Kernels[NormInputs]):
    """Kernels of the sum with its norm. Results are contiguous and new tensors; inputs are never empty."""

    operation = "add_rms_norm"

    @abstractmethod
    def forward(self, inputs: NormInputs, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Add and normalise.

        Returns:
            The norm (..., D) in `dtype`; the sum (..., D) in the dtype of `residual`, empty without a branch;
            and 1 / sqrt(mean(x^2) + eps) of every row, in fp32 and in one dimension.
        """

    @abstractmethod
    def backward(
        self,
        grad_normed: Tensor,
        grad_total: Tensor | None,
        total: Tensor,
        weight: Tensor,
        inverse: Tensor,
        branch_dtype: torch.dtype | None,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of residual, branch and weight.

        Args:
            grad_normed: gradient of the norm (..., D), contiguous.
            grad_total: gradient of the sum, contiguous; None if the sum has no further use.
            total: the sum.
            weight: (D,).
            inverse: third result of `forward`.
            branch_dtype: dtype of the branch, or None if its gradient is not wanted.
            need_weight: whether the gradient of the weight is wanted.
        """


def has_add_rms_norm(backend: str, device: torch.device) -> bool:
    """Whether a backend has kernels for `add_rms_norm` on a device, so that it is worth while to use it.

    Raises:
        BackendUnavailable: `backend` is not "auto", and cannot run there.
    """
    return bool(candidates(NormKernels.operation, chosen_backend(backend), device, backend != "auto"))


def add_rms_norm(
    branch: Tensor | None, residual: Tensor, weight: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + branch) * weight, residual + branch); without `branch` the residual itself.

    `branch`, `residual` (B, L, D), `weight` (D,). The sum keeps the dtype of `residual`, statistics are
    fp32, the norm comes in the dtype of autocast where it is on and of `weight` elsewhere. B and L may be 0.
    The formula is that of `vimtune.ops.reference.add_rms_norm`.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    shape, device = residual.shape, residual.device
    check_inputs(device, branch=(branch, shape), residual=(residual, shape), weight=(weight, shape[-1:]))
    dtype = weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    name = find_backend(NormKernels, backend, device, NormInputs(branch, residual, weight))
    if not name:
        return reference.add_rms_norm(branch, residual, weight, eps, dtype)
    normed, total, _ = run("add_rms_norm", branch, residual, weight, eps, dtype, name)
    return normed, residual if branch is None else total


# torch.library reads the annotations at run time, hence Optional. Programs exported before there was an
# argument `backend` call without it, hence the default.


@operation("add_rms_norm")
def _norm(
    branch: Optional[Tensor],  # noqa: UP045
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum (empty without a branch), and the inverse of every row's root mean square."""
    if residual.numel() == 0:
        return _empty_results(branch, residual, dtype)
    inputs = NormInputs(None if branch is None else branch.contiguous(), residual.contiguous(), weight)
    return find_kernels(NormKernels, backend, residual.device, inputs)[1].forward(inputs, eps, dtype)


@_norm.register_fake
def _(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(branch, residual, dtype)


def _empty_results(
    branch: Tensor | None, residual: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that the kernels return."""
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of residual, branch and weight, the last two empty where they are not wanted."""
    if total.numel() == 0:
        nothing, of_branch, of_weight = _fake_gradients(total, weight, branch_dtype, need_weight)
        return nothing, of_branch, of_weight.zero_()
    _, kernels = find_kernels(NormKernels, backend, total.device, NormInputs(None, total, weight))
    residual, branch, own = kernels.backward(
        grad_normed.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total.contiguous(),
        weight,
        inverse,
        branch_dtype,
        need_weight,
    )
    return (
        residual,
        residual.new_empty(0) if branch is None else branch,
        residual.new_empty(0) if own is None else own,
    )


@_norm_backward.register_fake
def _(grad_normed: Tensor, grad_total: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    total, weight, _inverse, branch_dtype, need_weight, *_backend = arguments
    return _fake_gradients(total, weight, branch_dtype, need_weight)


def _fake_gradients(
    total: Tensor, weight: Tensor, branch_dtype: torch.dtype | None, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that the backward pass returns."""
    return (
        total.new_empty(total.shape),
        total.new_empty((0,) if branch_dtype is None else total.shape, dtype=branch_dtype or total.dtype),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what the backward pass needs."""
    branch, residual, weight, _eps, _dtype, *backend = inputs
    ctx.save_for_backward(residual if branch is None else output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2], *([output[1]] if branch is None else []))
    ctx.set_materialize_grads(False)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.backend = backend


def _autograd(
    ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None, _grad_inverse: None
) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    total, weight, inverse = ctx.saved_tensors
    need_branch, need_residual, need_weight = ctx.needs_input_grad[:3]
    others = [None] * (len(ctx.needs_input_grad) - 3)
    if grad_normed is None:
        branch = grad_total.to(ctx.branch_dtype) if need_branch and grad_total is not None else None
        return (
            branch,
            grad_total if need_residual else None,
            torch.zeros_like(weight) if need_weight else None,
            *others,
        )
    residual, branch, own = run(
        "add_rms_norm_backward",
        grad_normed,
        grad_total,
        total,
        weight,
        inverse,
        ctx.branch_dtype if need_branch else None,
        need_weight,
        *ctx.backend,
    )
    return (
        branch if need_branch else None,
        residual if need_residual else None,
        own if need_weight else None,
        *others,
    )


_norm.register_autograd(_autograd, setup_context=_setup)
