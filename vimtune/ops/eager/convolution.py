"""The depthwise causal convolution of the backend `torch`, a product for each tap of the filter.

Shape letters: B batch, L tokens, E inner width, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.backend import Gradients
from vimtune.ops.convolution import ConvInputs, ConvKernels, ConvOptions


class EagerConvolution(ConvKernels):
    """The depthwise causal convolution in operations of PyTorch."""

    def forward(self, inputs: ConvInputs, options: ConvOptions) -> Tensor:
        x, weight, bias = inputs
        silu, reverse = options
        y = _filter(x.to(torch.promote_types(x.dtype, torch.float32)), weight, bias, reverse)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    def backward(
        self, grad: Tensor, inputs: ConvInputs, options: ConvOptions, needs: Sequence[bool]
    ) -> Gradients:
        x, weight, bias = inputs
        silu, reverse = options
        dtype = torch.promote_types(x.dtype, torch.float32)
        need_x, need_weight, need_bias = needs
        xf, grad = x.to(dtype), grad.to(dtype)
        if silu:
            y = _filter(xf, weight, bias, reverse)
            gate = torch.sigmoid(y)
            grad = grad * gate * (1 + y * (1 - gate))
        grad_x = grad_weight = grad_bias = None
        if need_x:
            # The adjoint of a causal filter is the same filter run in the other direction.
            grad_x = _filter(grad, weight, None, not reverse).to(x.dtype)
        if need_weight:
            columns = []
            for source, target in _shifts(x.shape[1], weight.shape[1], reverse):
                columns.append((grad[:, target] * xf[:, source]).sum((0, 1)))
            grad_weight = torch.stack(columns, dim=1).to(weight.dtype)
        if need_bias and bias is not None:
            grad_bias = grad.sum((0, 1)).to(bias.dtype)
        return grad_x, grad_weight, grad_bias


def _shifts(num_tokens: int, width: int, reverse: bool) -> list[tuple[slice, slice]]:
    """For each filter tap the tokens it reads and the tokens it adds to."""
    shifts = []
    for tap in range(width):
        lag = min(width - 1 - tap, num_tokens)
        early, late = slice(0, num_tokens - lag), slice(lag, num_tokens)
        shifts.append((late, early) if reverse else (early, late))
    return shifts


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The causal convolution of `x` (B, L, E) without SiLU, in the dtype of `x`."""
    weight = weight.to(x.dtype)
    # A copy in any case: of one or no token, `contiguous` would return the bias itself.
    start = x.new_zeros(()) if bias is None else bias.to(x.dtype)
    y = start.expand_as(x).clone(memory_format=torch.contiguous_format)
    for tap, (source, target) in enumerate(_shifts(x.shape[1], weight.shape[1], reverse)):
        y[:, target].addcmul_(x[:, source], weight[:, tap])
    return y
