"""The operation `selective_scan`: its kernels' interface, and its registration with torch.

Being a custom operation with a fake implementation it is opaque to torch.compile, torch.export, torch.fx and
TorchScript, and differentiable everywhere. Gradients nobody asks for are not computed.

Shape letters: B batch, L tokens, E inner width, N states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.backends import REFERENCE
from vimtune.ops import reference
from vimtune.ops.backend import Gradients, Kernels
from vimtune.ops.dispatch import chosen_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    unit_stride,
    zero_gradients,
)

NUM_INPUTS = 8
"""Number of tensors that a scan has gradients of."""


class ScanInputs(NamedTuple):
    """Tensors of a selective scan, in the order of their gradients.

    In kernels they have unit stride in the last dimension and any stride elsewhere. Activations (`u`,
    `delta`, `B`, `C`, `z`) may be fp32, bf16, fp16 or fp64.
    """

    u: Tensor
    """(B, L, E)"""
    delta: Tensor
    """(B, L, E)"""
    A: Tensor
    """(E, N)"""
    B: Tensor
    """(B, L, N)"""
    C: Tensor
    """(B, L, N)"""
    D: Tensor | None = None
    """(E,)"""
    z: Tensor | None = None
    """(B, L, E)"""
    delta_bias: Tensor | None = None
    """(E,)"""


class ScanOptions(NamedTuple):
    """The other arguments of a selective scan, see `selective_scan`."""

    delta_softplus: bool
    """Whether time steps are softplus of `delta`, or `delta` itself."""
    reverse: bool
    """Whether the scan runs from the last token to the first."""


class ScanKernels(Kernels[ScanInputs]):
    """Kernels of the selective scan. The state is fp32, for fp64 activations fp64.

    Results may have any strides: the operation makes them contiguous. Inputs are never empty.
    """

    operation = "selective_scan"

    @abstractmethod
    def states_shape(self, batch: int, tokens: int, inner: int, states: int) -> tuple[int, ...]:
        """Shape of the tensor, in the dtype of the state, that `forward` saves for `backward`."""

    @abstractmethod
    def forward(self, inputs: ScanInputs, options: ScanOptions, save_states: bool) -> tuple[Tensor, Tensor]:
        """Return the result (B, L, E) in the dtype of `u`, and the saved states (empty if not wanted)."""

    @abstractmethod
    def backward(
        self, grad: Tensor, states: Tensor, inputs: ScanInputs, options: ScanOptions, needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of the inputs, None where `needs` is False.

        Args:
            grad: gradient of the result (B, L, E), with unit stride in the last dimension.
            states: what `forward` has saved.
            inputs: those of `forward`.
            options: those of `forward`.
            needs: for each input whether its gradient is wanted.
        """


# torch.library reads these annotations at run time and TorchScript compiles the public function, hence the
# spelled-out Optional. TorchScript drops a branch only if its condition is `not torch.jit.is_scripting()`.


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,  # noqa: UP045
    z: Optional[Tensor] = None,  # noqa: UP045
    delta_bias: Optional[Tensor] = None,  # noqa: UP045
    delta_softplus: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of Mamba; formula and shapes as in `vimtune.ops.reference.selective_scan`.

    `u`, `delta`, `z`: (B, L, E); `A`: (E, N); `B`, `C`: (B, L, N); `D`, `delta_bias`: (E,).
    Returns (B, L, E) in the dtype of `u`. B and L may be 0.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    if not torch.jit.is_scripting():
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check(u, delta, A, B, C, D, z, delta_bias)
            return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    result: Tensor = torch.ops.vimtune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, torch.is_grad_enabled()
    )[0]
    return result


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if u.dim() != 3 or A.dim() != 2 or A.shape[1] < 1:
        raise ValueError(f"u must be (B, L, E) and A (E, N); got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, tokens, inner = u.shape
    states = A.shape[1]
    check_inputs(
        u.device,
        u=(u, (batch, tokens, inner)),
        delta=(delta, (batch, tokens, inner)),
        A=(A, (inner, states)),
        B=(B, (batch, tokens, states)),
        C=(C, (batch, tokens, states)),
        D=(D, (inner,)),
        z=(z, (batch, tokens, inner)),
        delta_bias=(delta_bias, (inner,)),
    )


def _adjacent(*tensors: Tensor | None) -> ScanInputs:
    """The tensors with unit stride in the last dimension."""
    return ScanInputs(*(None if tensor is None else unit_stride(tensor) for tensor in tensors))  # type: ignore[arg-type]


@operation("selective_scan")
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    save_states: bool,
) -> tuple[Tensor, Tensor]:
    """The result and the saved states."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    inputs = _adjacent(u, delta, A, B, C, D, z, delta_bias)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        return _empty_results(kernels, inputs, save_states)
    out, kept = kernels.forward(inputs, ScanOptions(delta_softplus, reverse), save_states)
    return out.contiguous(), kept.contiguous()


@_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, _delta_softplus, _reverse, backend, save_states = arguments
    inputs = ScanInputs(*tensors)
    return _empty_results(find_kernels(ScanKernels, backend, inputs.u.device, inputs)[1], inputs, save_states)


def _empty_results(kernels: ScanKernels, inputs: ScanInputs, save_states: bool) -> tuple[Tensor, Tensor]:
    """Tensors like those that the kernels return."""
    u = inputs.u
    batch, tokens, inner = u.shape
    shape = kernels.states_shape(batch, tokens, inner, inputs.A.shape[1]) if save_states else (0,)
    return u.new_empty(u.shape), u.new_empty(shape, dtype=torch.promote_types(u.dtype, torch.float32))


@operation("selective_scan_backward")
def _scan_backward(
    grad: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    z: Optional[Tensor],  # noqa: UP045
    delta_bias: Optional[Tensor],  # noqa: UP045
    delta_softplus: bool,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors from `u` on."""
    inputs = _adjacent(u, delta, A, B, C, D, z, delta_bias)
    _, kernels = find_kernels(ScanKernels, backend, u.device, inputs)
    if u.numel() == 0:
        return zero_gradients(inputs, needs, grad)
    options = ScanOptions(delta_softplus, reverse)
    return as_list(kernels.backward(unit_stride(grad), states, inputs, options, needs), grad)


@_scan_backward.register_fake
def _(grad: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, _delta_softplus, _reverse, _backend, needs = arguments
    return fake_gradients(tensors, needs, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward pass needs."""
    *tensors, delta_softplus, reverse, backend, save_states = inputs
    if not save_states:
        raise RuntimeError("selective_scan was called without saved states but needs a gradient")
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    # The backend by its own name: the backward pass may run in another thread, or after another choice, and
    # has to read what the forward pass has saved.
    name, _ = find_kernels(ScanKernels, backend, tensors[0].device, ScanInputs(*tensors))
    ctx.options = (delta_softplus, reverse, name)


def _autograd(ctx: Any, grad: Tensor, _grad_states: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    states, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:NUM_INPUTS])
    gradients = torch.ops.vimtune.selective_scan_backward(grad, states, *tensors, *ctx.options, needs)
    return *as_optional(gradients, needs), None, None, None, None


_scan.register_autograd(_autograd, setup_context=_setup)
