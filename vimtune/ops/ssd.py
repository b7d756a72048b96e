"""The operation `ssd`, the scan of Mamba-2: its kernels' interface, and its registration with torch.

Its backward pass begins with the inputs of the forward pass, and nothing else is kept in between. The
registration is as in `scan.py`.

Shape letters: B batch, L tokens, H heads, P width of a head, G groups of heads that share B and C, N states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.backends import REFERENCE
from vimtune.ops import reference, scan
from vimtune.ops.backend import Gradients, Kernels
from vimtune.ops.dispatch import chosen_backend, find_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    run,
    unit_stride,
    zero_gradients,
)

PLAIN = "torch"
"""The backend that computes the operation where the chosen one has no kernels for it."""
NO_LIMIT = (0.0, float("inf"))
"""Limits of time steps that change nothing behind softplus."""


class SsdInputs(NamedTuple):
    """Tensors of `ssd`."""

    x: Tensor
    """(B, L, H, P)"""
    dt: Tensor
    """(B, L, H)"""
    A: Tensor
    """(H,)"""
    B: Tensor
    """(B, L, G, N)"""
    C: Tensor
    """(B, L, G, N)"""
    D: Tensor | None = None
    """(H,)"""
    dt_bias: Tensor | None = None
    """(H,)"""
    state: Tensor | None = None
    """(B, H, P, N)"""


class SsdOptions(NamedTuple):
    """The other arguments of `ssd`."""

    dt_softplus: bool
    """Whether time steps are softplus of `dt`, or `dt` itself."""
    dt_limit: tuple[float, float]
    """Time steps are held between these."""


class SsdKernels(Kernels[SsdInputs]):
    """Kernels of the scan of Mamba-2. Inputs are never empty, and results may have any strides."""

    operation = "ssd"

    @abstractmethod
    def forward(self, inputs: SsdInputs, options: SsdOptions) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return what `ssd` does, and whatever `backward` could use of what has been computed."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        grad_last: Tensor | None,
        kept: Sequence[Tensor],
        inputs: SsdInputs,
        options: SsdOptions,
        needs: Sequence[bool],
    ) -> Gradients:
        """Gradients of the inputs in their dtypes, None where `needs` is False.

        Args:
            grad: gradient of the result, (B, L, H, P).
            grad_last: gradient of the last state, (B, H, P, N); None stands for zeros.
            kept: the third result of `forward` where that has just been called; else empty.
            inputs: those of `forward`.
            options: those of `forward`.
            needs: for each input whether its gradient is wanted.
        """


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = NO_LIMIT,
    state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of Mamba-2; the formula is that of `vimtune.ops.reference.ssd`.

    A time step of 0 leaves the state alone, which is how padding is kept out of it.

    Args:
        x: what is scanned, (B, L, H, P).
        dt: time steps before `dt_bias` and softplus, (B, L, H).
        A: negative decay of each head, (H,).
        B: input matrices of each group of heads, (B, L, G, N).
        C: output matrices of each group of heads, (B, L, G, N).
        D: what of `x` is added to the result, (H,).
        dt_bias: added to `dt`, (H,).
        dt_softplus: whether time steps are softplus of `dt`, or `dt` itself.
        dt_limit: time steps are held between these.
        state: the state before the first token, (B, H, P, N); zeros if None.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, L, H, P) in the dtype of `x`, and the state after the last token (B, H, P, N), fp32
        (fp64 for fp64 input).

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, state)
    _check(inputs)
    if chosen_backend(backend) == REFERENCE:
        return reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, state)
    name = find_backend(SsdKernels, backend, x.device, inputs) or PLAIN
    out, last = run("ssd", *inputs, dt_softplus, *dt_limit, name)
    return out, last


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`, as decoding needs it.

    Args:
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B: (B, G, N).
        C: (B, G, N).
        D: (H,).
        dt_bias: (H,).
        dt_softplus: as in `ssd`.
        dt_limit: as in `ssd`.
        state: the state before the token, (B, H, P, N).

    Returns:
        The result (B, H, P) in the dtype of `x`, and the state after the token (B, H, P, N).
    """
    wide, heads = state.dtype, x.shape[1]
    step = time_steps(dt.to(wide), dt_bias, SsdOptions(dt_softplus, dt_limit))
    into, out = (tensor.to(wide).repeat_interleave(heads // B.shape[1], dim=1) for tensor in (B, C))
    values = x.to(wide)
    fed = (step.unsqueeze(-1) * values).unsqueeze(-1) * into.unsqueeze(-2)
    state = (step * A.to(wide)).exp()[..., None, None] * state + fed
    y = (state @ out.unsqueeze(-1)).squeeze(-1)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * values
    return y.to(x.dtype), state


def time_steps(dt: Tensor, dt_bias: Tensor | None, options: SsdOptions) -> Tensor:
    """Time steps (..., H) in the dtype of `dt`."""
    return scan.time_steps(dt, dt_bias, options.dt_softplus).clamp(*options.dt_limit)


def time_step_gradients(grad: Tensor, dt: Tensor, dt_bias: Tensor | None, options: SsdOptions) -> Tensor:
    """Gradient of `dt`, of which that of `dt_bias` is the sum, from the gradient of `time_steps`."""
    raw = scan.time_steps(dt, dt_bias, softplus=False)
    steps = F.softplus(raw) if options.dt_softplus else raw
    low, high = options.dt_limit
    grad = grad * ((steps >= low) & (steps <= high))
    return grad * raw.sigmoid() if options.dt_softplus else grad


def _check(inputs: SsdInputs) -> None:
    """Raise ValueError for tensors that do not fit together."""
    x, B = inputs.x, inputs.B
    if x.dim() != 4 or B.dim() != 4 or B.shape[2] < 1 or x.shape[2] % B.shape[2]:
        raise ValueError(
            "x must be (B, L, H, P) and B (B, L, G, N), where G divides H; "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    batch, tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    check_inputs(
        x.device,
        x=(x, tuple(x.shape)),
        dt=(inputs.dt, (batch, tokens, heads)),
        A=(inputs.A, (heads,)),
        B=(B, (batch, tokens, groups, states)),
        C=(inputs.C, (batch, tokens, groups, states)),
        D=(inputs.D, (heads,)),
        dt_bias=(inputs.dt_bias, (heads,)),
        state=(inputs.state, (batch, heads, width, states)),
    )


# About the spelling of annotations see `scan.py`.


@operation("ssd")
def _ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    dt_bias: Optional[Tensor],  # noqa: UP045
    state: Optional[Tensor],  # noqa: UP045
    dt_softplus: bool,
    lowest: float,
    highest: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The result and the last state."""
    inputs = _adjacent(x, dt, A, B, C, D, dt_bias, state)
    _check(inputs)
    _, kernels = find_kernels(SsdKernels, backend, x.device, inputs)
    if x.numel() == 0:
        out, last = _empty_results(inputs)
        return out, last.zero_() if state is None else last.copy_(state)
    with torch.autocast(x.device.type, enabled=False):
        out, last, _ = kernels.forward(inputs, SsdOptions(dt_softplus, (lowest, highest)))
    return out.contiguous(), last.contiguous()


@_ssd.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, _dt_softplus, _lowest, _highest, _backend = arguments
    return _empty_results(SsdInputs(*tensors))


def _adjacent(*tensors: Tensor | None) -> SsdInputs:
    """The tensors with unit stride in the last dimension."""
    return SsdInputs(*(None if tensor is None else unit_stride(tensor) for tensor in tensors))  # type: ignore[arg-type]


def _empty_results(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """Tensors like the results."""
    x = inputs.x
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, heads, width, inputs.B.shape[3]), dtype=wide)


@operation("ssd_backward")
def _ssd_backward(
    grad: Tensor,
    grad_last: Optional[Tensor],  # noqa: UP045
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045
    dt_bias: Optional[Tensor],  # noqa: UP045
    state: Optional[Tensor],  # noqa: UP045
    dt_softplus: bool,
    lowest: float,
    highest: float,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensors from `x` on."""
    inputs = _adjacent(x, dt, A, B, C, D, dt_bias, state)
    _, kernels = find_kernels(SsdKernels, backend, x.device, inputs)
    if x.numel() == 0:
        gradients = zero_gradients(inputs, needs, grad)
        if state is not None and needs[-1] and grad_last is not None:
            gradients[-1].copy_(grad_last)
        return gradients
    options = SsdOptions(dt_softplus, (lowest, highest))
    with torch.autocast(x.device.type, enabled=False):
        found = kernels.backward(unit_stride(grad), grad_last, (), inputs, options, needs)
    return as_list(found, grad)


@_ssd_backward.register_fake
def _(grad: Tensor, grad_last: Tensor | None, *arguments: Any) -> list[Tensor]:
    *tensors, _dt_softplus, _lowest, _highest, _backend, needs = arguments
    return fake_gradients(tensors, needs, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the inputs."""
    count = len(SsdInputs._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.options = inputs[count:]
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(tensors)])
    if grad is None:
        grad = torch.zeros_like(tensors[0])
    gradients = run("ssd_backward", grad, grad_last, *tensors, *ctx.options, needs)
    return *as_optional(gradients, needs), *[None] * len(ctx.options)


_ssd.register_autograd(_autograd, setup_context=_setup)
