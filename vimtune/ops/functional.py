"""`selective_scan` and `causal_conv1d` as torch custom ops over the backends of `dispatch.py`.

Being custom ops with fake implementations they are opaque to torch.compile, torch.export,
torch.fx and TorchScript, and differentiable everywhere. Gradients nobody asks for are not computed.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.dispatch import REFERENCE, Backend, ScanOptions, chosen_backend, resolve_backend
from vimtune.ops.operation import check_inputs, operation

# torch.library reads these annotations at run time and TorchScript compiles the two public
# functions, hence the spelled-out Optional.


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
    if not torch.jit.is_scripting():  # TorchScript drops this branch only in this form
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check_scan(u, delta, A, B, C, D, z, delta_bias)
            return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return torch.ops.vimtune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, torch.is_grad_enabled()
    )[0]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    silu: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution of `x` (B, L, E) with `weight` (E, K), optionally through SiLU.

    With `reverse` the filter runs from the last token to the first. Returns (B, L, E). Errors are those of
    `selective_scan`.
    """
    if not torch.jit.is_scripting():
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check_conv(x, weight, bias)
            return reference.causal_conv1d(x, weight, bias, silu, reverse)
    return torch.ops.vimtune.causal_conv1d(x, weight, bias, silu, reverse, backend)


def _used_backend(backend: str, tensor: Tensor) -> str:
    """The backend of the forward pass by its own name: the backward pass may run in another thread, or after
    another choice, and must read what the forward pass has saved."""
    return resolve_backend(backend, tensor.device).name


def _unit_stride(tensor: Tensor) -> Tensor:
    """Kernels want adjacent channels; views of a wider row pass as they are."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _unit_strides(*tensors: Tensor | None) -> Any:
    return [None if tensor is None else _unit_stride(tensor) for tensor in tensors]


def _check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
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


def _check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"x must be (B, L, E) and weight (E, K); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    inner = x.shape[2]
    check_inputs(
        x.device, x=(x, tuple(x.shape)), weight=(weight, (inner, weight.shape[1])), bias=(bias, (inner,))
    )


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
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    u, delta, A, B, C, D, z, delta_bias = _unit_strides(u, delta, A, B, C, D, z, delta_bias)
    kernels = resolve_backend(backend, u.device)
    if u.numel() == 0:
        return _empty_results(kernels, u, A, save_states)
    options = ScanOptions(delta_softplus, reverse)
    out, kept = kernels.scan_forward(u, delta, A, B, C, D, z, delta_bias, options, save_states)
    return out.contiguous(), kept.contiguous()


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, save_states):
    return _empty_results(resolve_backend(backend, u.device), u, A, save_states)


def _empty_results(kernels: Backend, u: Tensor, A: Tensor, save_states: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, inner = u.shape
    shape = kernels.states_shape(batch, tokens, inner, A.shape[1]) if save_states else (0,)
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
    grad, u, delta, A, B, C, D, z, delta_bias = _unit_strides(grad, u, delta, A, B, C, D, z, delta_bias)
    kernels = resolve_backend(backend, u.device)
    if u.numel() == 0:
        return _zero_gradients([u, delta, A, B, C, D, z, delta_bias], needs, grad)
    options = ScanOptions(delta_softplus, reverse)
    gradients = kernels.scan_backward(grad, states, u, delta, A, B, C, D, z, delta_bias, options, needs)
    return _as_list(gradients, grad)


@_scan_backward.register_fake
def _(
    grad, states, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, backend, needs
):  # fmt: skip
    return _fake_gradients([u, delta, A, B, C, D, z, delta_bias], needs, grad)


def _scan_setup(ctx, inputs, output) -> None:
    *tensors, delta_softplus, reverse, backend, save_states = inputs
    if not save_states:
        raise RuntimeError("selective_scan was called without saved states but needs a gradient")
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.options = (delta_softplus, reverse, _used_backend(backend, tensors[0]))


def _scan_autograd(ctx, grad, _grad_states):
    states, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:8])
    gradients = torch.ops.vimtune.selective_scan_backward(grad, states, *tensors, *ctx.options, needs)
    return *_as_optional(gradients, needs), None, None, None, None


_scan.register_autograd(_scan_autograd, setup_context=_scan_setup)


@operation("causal_conv1d")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    silu: bool,
    reverse: bool,
    backend: str,
) -> Tensor:
    _check_conv(x, weight, bias)
    kernels = resolve_backend(backend, x.device)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    x, weight, bias = _unit_strides(x, weight, bias)
    return kernels.conv_forward(x, weight, bias, silu, reverse).contiguous()


@_conv.register_fake
def _(x, weight, bias, silu, reverse, backend):
    return x.new_empty(x.shape)


@operation("causal_conv1d_backward")
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    silu: bool,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    grad, x, weight, bias = _unit_strides(grad, x, weight, bias)
    kernels = resolve_backend(backend, x.device)
    if x.numel() == 0:
        return _zero_gradients([x, weight, bias], needs, grad)
    return _as_list(kernels.conv_backward(grad, x, weight, bias, silu, reverse, needs), grad)


@_conv_backward.register_fake
def _(grad, x, weight, bias, silu, reverse, backend, needs):
    return _fake_gradients([x, weight, bias], needs, grad)


def _conv_setup(ctx, inputs, output) -> None:
    x, weight, bias, silu, reverse, backend = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.options = (silu, reverse, _used_backend(backend, x))


def _conv_autograd(ctx, grad):
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.vimtune.causal_conv1d_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *_as_optional(gradients, needs), None, None, None


_conv.register_autograd(_conv_autograd, setup_context=_conv_setup)


# A custom op returns a list of tensors, never None: gradients that were not asked for travel as
# empty tensors and become None again on the autograd side. All results are contiguous, whatever the
# backend makes of them: torch.compile relies on the strides of the fake ones.


def _as_list(gradients, like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if gradient is None else gradient.contiguous() for gradient in gradients]


def _as_optional(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


def _zero_gradients(inputs, needs: list[bool], like: Tensor) -> list[Tensor]:
    """The gradients where there is no token: zeros."""
    return [gradient.zero_() for gradient in _fake_gradients(inputs, needs, like)]


def _fake_gradients(inputs, needs: list[bool], like: Tensor) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if needed else like.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]
