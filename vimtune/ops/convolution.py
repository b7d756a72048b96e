"""The operation `causal_conv1d`: its kernels' interface, and its registration with torch (as in `scan.py`).

Shape letters: B batch, L tokens, E inner width, K filter width.
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
    run,
    unit_stride,
    zero_gradients,
)

NUM_INPUTS = 3
"""Number of tensors that a convolution has gradients of."""


class ConvInputs(NamedTuple):
    """Tensors of a convolution, in the order of their gradients.

    In kernels they have unit stride in the last dimension and any stride elsewhere.
    """

    x: Tensor
    """(B, L, E)"""
    weight: Tensor
    """(E, K)"""
    bias: Tensor | None = None
    """(E,)"""


class ConvOptions(NamedTuple):
    """The other arguments of a convolution, see `causal_conv1d`."""

    silu: bool
    """Whether the result goes through SiLU."""
    reverse: bool
    """Whether the filter runs from the last token to the first."""


class ConvKernels(Kernels[ConvInputs]):
    """Kernels of the depthwise causal convolution.

    Results may have any strides: the operation makes them contiguous. Inputs are never empty.
    """

    operation = "causal_conv1d"

    @abstractmethod
    def forward(self, inputs: ConvInputs, options: ConvOptions) -> Tensor:
        """Return the result (B, L, E) in the dtype of `x`."""

    @abstractmethod
    def backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> Gradients:
        """Gradients of the inputs, None where `needs` is False, from `grad` (B, L, E) of unit stride."""


# About the spelling of annotations and of conditions see `scan.py`.


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    silu: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution of `x` (B, L, E) with `weight` (E, K), optionally through SiLU.

    With `reverse` the filter runs from the last token to the first. Returns (B, L, E). The formula is that of
    `vimtune.ops.reference.causal_conv1d`, errors are those of `selective_scan`.
    """
    if not torch.jit.is_scripting():
        backend = chosen_backend(backend)
        if backend == REFERENCE:
            _check(x, weight, bias)
            return reference.causal_conv1d(x, weight, bias, silu, reverse)
        out: Tensor = run("causal_conv1d", x, weight, bias, silu, reverse, backend)
        return out
    scripted: Tensor = torch.ops.vimtune.causal_conv1d(x, weight, bias, silu, reverse, backend)
    return scripted


def causal_conv1d_behind(
    tail: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    silu: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The convolution of `causal_conv1d` for inputs that follow others, `tail`, the same for all samples.

    Only the first tokens in the order of the filter see the others, so only they are computed twice.

    Args:
        tail: the K - 1 inputs before the first token, (E, K - 1), in the order of the filter: the last one is
            the neighbour of the first token, also with `reverse`.
        x: (B, L, E), as the other arguments that of `causal_conv1d`.
        weight: (E, K).
        bias: (E,).
        silu: whether the result goes through SiLU.
        reverse: whether the filter runs from the last token to the first.
        backend: see `vimtune.ops`.

    Returns:
        The result (B, L, E).
    """
    y = causal_conv1d(x, weight, bias, silu, reverse, backend)
    count = tail.shape[1]
    if count == 0:
        return y
    before = tail.to(x.dtype).t().unsqueeze(0).expand(x.shape[0], -1, -1)
    if reverse:
        around = torch.cat([x[:, -count:], before.flip(1)], 1)
        y[:, -count:] = causal_conv1d(around, weight, bias, silu, reverse, backend)[:, :-count]
    else:
        around = torch.cat([before, x[:, :count]], 1)
        y[:, :count] = causal_conv1d(around, weight, bias, silu, reverse, backend)[:, count:]
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] < 1:
        raise ValueError(
            f"x must be (B, L, E) and weight (E, K); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    inner = x.shape[2]
    check_inputs(
        x.device, x=(x, tuple(x.shape)), weight=(weight, (inner, weight.shape[1])), bias=(bias, (inner,))
    )


def _adjacent(x: Tensor, weight: Tensor, bias: Tensor | None) -> ConvInputs:
    """The tensors with unit stride in the last dimension."""
    return ConvInputs(unit_stride(x), unit_stride(weight), None if bias is None else unit_stride(bias))


@operation("causal_conv1d")
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    silu: bool,
    reverse: bool,
    backend: str,
) -> Tensor:
    """The result."""
    _check(x, weight, bias)
    inputs = _adjacent(x, weight, bias)
    _, kernels = find_kernels(ConvKernels, backend, x.device, inputs)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    return kernels.forward(inputs, ConvOptions(silu, reverse)).contiguous()


@_conv.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
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
    """Gradients of the tensors from `x` on."""
    inputs = _adjacent(x, weight, bias)
    _, kernels = find_kernels(ConvKernels, backend, x.device, inputs)
    if x.numel() == 0:
        return zero_gradients(inputs, needs, grad)
    return as_list(kernels.backward(unit_stride(grad), inputs, ConvOptions(silu, reverse), needs), grad)


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    *_options, needs = rest
    return fake_gradients([x, weight, bias], needs, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the backward pass needs, and the backend by its own name (as in `scan.py`)."""
    x, weight, bias, silu, reverse, backend = inputs
    ctx.save_for_backward(x, weight, bias)
    name, _ = find_kernels(ConvKernels, backend, x.device, ConvInputs(x, weight, bias))
    ctx.options = (silu, reverse, name)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    needs = list(ctx.needs_input_grad[:NUM_INPUTS])
    gradients = run("causal_conv1d_backward", grad, *ctx.saved_tensors, *ctx.options, needs)
    return *as_optional(gradients, needs), None, None, None


_conv.register_autograd(_autograd, setup_context=_setup)
