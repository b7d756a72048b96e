"""The operation `gated_rms_norm`, the norm between scan and out_proj of Mamba-2.

It is RMSNorm (Zhang & Sennrich 2019, eq. 4) of x SiLU(gate), of each group of channels by itself (Dao & Gu
2024, arXiv 2405.21060, section 7). The backward pass computes what lies in between once more, so that nothing
but the inputs is kept for it.

Shape letters: E channels, g groups of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from vimtune.backends import REFERENCE
from vimtune.ops import reference
from vimtune.ops.backend import Gradients, Kernels
from vimtune.ops.dispatch import chosen_backend, find_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    run,
    wanted,
    zero_gradients,
)
from vimtune.ops.ssd import PLAIN


class GatedNormInputs(NamedTuple):
    """Tensors of a gated norm, in the order of their gradients."""

    x: Tensor
    """(..., E), contiguous in kernels."""
    gate: Tensor
    """(..., E). In kernels the elements of a row lie side by side, and rows at equal distances."""
    weight: Tensor
    """(E,)"""


class GatedNormKernels(Kernels[GatedNormInputs]):
    """Kernels of the gated norm. Results are contiguous and new tensors; inputs are never empty.

    Sums are fp32, fp64 for fp64 inputs.
    """

    operation = "gated_rms_norm"

    @abstractmethod
    def forward(self, inputs: GatedNormInputs, groups: int, eps: float) -> Tensor:
        """The norm, (..., E) in the dtype of the gate."""

    @abstractmethod
    def backward(
        self, grad: Tensor, inputs: GatedNormInputs, groups: int, eps: float, need_weight: bool
    ) -> Gradients:
        """Gradients of the inputs in their dtypes, of the weight only if it is needed.

        Args:
            grad: gradient of the norm (..., E), contiguous.
            inputs: those of `forward`.
            groups: that of `forward`.
            eps: that of `forward`.
            need_weight: whether the gradient of the weight is wanted.
        """


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """u / sqrt(mean(u^2) + eps) * weight for u = x SiLU(gate), where the mean is over a group of channels.

    The formula is that of `vimtune.ops.reference.gated_rms_norm`.

    Args:
        x: (..., E).
        gate: (..., E).
        weight: (E,).
        groups: g, which divides E.
        eps: added to the mean.
        backend: see `vimtune.ops`.

    Returns:
        (..., E) in the dtype of `gate`.

    Raises:
        ValueError: shapes or devices that do not fit together, or tensors that are not of floating point
            numbers.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    shape = x.shape
    if x.dim() < 1 or groups < 1 or shape[-1] % groups:
        raise ValueError(f"x must be (..., E) where {groups} groups divide E, got {tuple(shape)}")
    check_inputs(x.device, x=(x, shape), gate=(gate, shape), weight=(weight, shape[-1:]))
    if chosen_backend(backend) == REFERENCE:
        return reference.gated_rms_norm(x, gate, weight, groups, eps)
    inputs = GatedNormInputs(x, gate, weight)
    result: Tensor = run("gated_rms_norm", *inputs, groups, eps, find_norm(backend, inputs))
    return result


def find_norm(backend: str, inputs: GatedNormInputs) -> str:
    """Name of the backend that computes a gated norm: that of PyTorch where `backend` has no kernels.

    Raises:
        ValueError: unknown name.
        BackendUnavailable: `backend` names one that cannot run here.
    """
    return find_backend(GatedNormKernels, backend, inputs.x.device, inputs) or PLAIN


def norm_gradients(
    grad: Tensor, inputs: GatedNormInputs, groups: int, eps: float, need_weight: bool, backend: str
) -> Gradients:
    """Gradients of the inputs of a gated norm by a backend; see `GatedNormKernels.backward`."""
    inputs = _laid_out(inputs)
    _, kernels = find_kernels(GatedNormKernels, backend, grad.device, inputs)
    return kernels.backward(grad.contiguous(), inputs, groups, eps, need_weight)


def _laid_out(inputs: GatedNormInputs) -> GatedNormInputs:
    """The inputs as kernels take them: a gate that is a part of wider rows stays where it is."""
    x, gate, weight = inputs
    if not _has_equal_rows(gate):
        gate = gate.contiguous()
    return GatedNormInputs(x.contiguous(), gate, weight.contiguous())


def _has_equal_rows(tensor: Tensor) -> bool:
    """Whether elements of a row lie side by side, and the rows (all dimensions before) at equal distances."""
    strides, sizes = tensor.stride(), tensor.shape
    return strides[-1] == 1 and all(
        strides[dim] == sizes[dim + 1] * strides[dim + 1] for dim in range(tensor.dim() - 2)
    )


# About the spelling of annotations see `scan.py`.


@operation("gated_rms_norm")
def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, backend: str) -> Tensor:
    """The norm."""
    if x.numel() == 0:
        return gate.new_empty(gate.shape)
    inputs = _laid_out(GatedNormInputs(x, gate, weight))
    _, kernels = find_kernels(GatedNormKernels, backend, x.device, inputs)
    return kernels.forward(inputs, groups, eps)


@_gated_norm.register_fake
def _(x: Tensor, gate: Tensor, *arguments: Any) -> Tensor:
    return gate.new_empty(gate.shape)


@operation("gated_rms_norm_backward")
def _gated_norm_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    groups: int,
    eps: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, gate and weight."""
    inputs = GatedNormInputs(x, gate, weight)
    if x.numel() == 0:
        return zero_gradients(inputs, needs, x)
    found = norm_gradients(grad, inputs, groups, eps, needs[2], backend)
    return as_list(wanted(found, inputs, needs), x)


@_gated_norm_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return fake_gradients(arguments[:3], arguments[-1], arguments[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs."""
    ctx.save_for_backward(*inputs[:3])
    ctx.others = inputs[3:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    needs = list(ctx.needs_input_grad[:3])
    found = run("gated_rms_norm_backward", grad, *ctx.saved_tensors, *ctx.others, needs)
    return *as_optional(found, needs), None, None, None


_gated_norm.register_autograd(_autograd, setup_context=_setup)
