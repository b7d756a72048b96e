"""Launches of the convolution kernels. A filter (E, K) travels transposed, as `filters` (K, E).

Shape letters: B batch, L tokens, E inner width, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.triton.common import in_units
from vimtune.ops.triton.conv_kernels import (
    conv_adjoint_kernel,
    conv_kernel,
    conv_slope_kernel,
    conv_weight_kernel,
)

ROWS, CHANNELS = 32, 64
"""Tokens and channels of a tile."""
TILES = 8
"""Tiles of which a program adds up the gradients of filters."""


def conv_grid(num_rows: int, inner: int) -> tuple[int, int]:
    """Programs for tiles of ROWS tokens (of all samples) and CHANNELS channels."""
    return -(-num_rows // ROWS), -(-inner // CHANNELS)


def sign(reverse: bool) -> int:
    """Where filter taps lie: before their token, or ahead of it."""
    return 1 if reverse else -1


def transposed(weight: Tensor) -> Tensor:
    """Filter (E, K) as the kernels read it: (K, E), contiguous."""
    return weight.t().contiguous()


def convolve(x: Tensor, filters: Tensor, bias: Tensor | None, out: Tensor, silu: bool, reverse: bool) -> None:
    """`out` = causal convolution of `x` (B, L, E), through SiLU if asked for."""
    batch, tokens, inner = x.shape
    image, token, unit = in_units(x.stride(0), x.stride(1))
    with device_of(x):
        conv_kernel[conv_grid(batch * tokens, inner)](
            x, filters, filters if bias is None else bias, out,
            image, token, out.stride(0), out.stride(1), batch * tokens, tokens, inner, sign(reverse),
            BM=ROWS, BE=CHANNELS, K=filters.shape[0], HAS_BIAS=bias is not None, SILU=silu, UNIT=unit,
        )  # fmt: skip


def adjoint(
    grads: tuple[Tensor, Tensor], filters: tuple[Tensor, Tensor], out: Tensor, use: tuple[bool, bool]
) -> None:
    """`out` = gradient of the filter input, from the gradients behind either direction's filter."""
    batch, tokens, inner = out.shape
    with device_of(out):
        conv_adjoint_kernel[conv_grid(batch * tokens, inner)](
            *grads, *filters, out,
            grads[0].stride(0), grads[0].stride(1), out.stride(0), out.stride(1),
            batch * tokens, tokens, inner,
            BM=ROWS, BE=CHANNELS, K=filters[0].shape[0], USE0=use[0], USE1=use[1],
        )  # fmt: skip


def weight_gradients(grad: Tensor, x: Tensor, width: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the filter (E, K) and its bias (E,), fp32, from `grad` (B, L, E) behind the filter."""
    batch, tokens, inner = x.shape
    programs = -(-batch * tokens // (ROWS * TILES))
    partial = torch.empty((programs, width + 1, inner), dtype=torch.float32, device=x.device)
    image, token, unit = in_units(x.stride(0), x.stride(1))
    with device_of(x):
        conv_weight_kernel[(programs, -(-inner // CHANNELS))](
            grad, x, partial, grad.stride(0), grad.stride(1), image, token,
            batch * tokens, tokens, inner, sign(reverse),
            BM=ROWS, BE=CHANNELS, K=width, TILES=TILES, UNIT=unit,
        )  # fmt: skip
    return partial[:, :width].sum(0).t().contiguous(), partial[:, width].sum(0)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias), None where `needs` is False."""
    need_x, need_weight, need_bias = needs
    batch, tokens, inner = x.shape
    filters = transposed(weight)
    width = filters.shape[0]
    if silu:
        slope = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        image, token, unit = in_units(x.stride(0), x.stride(1))
        with device_of(x):
            conv_slope_kernel[conv_grid(batch * tokens, inner)](
                grad, x, filters, filters if bias is None else bias, slope,
                grad.stride(0), grad.stride(1), image, token, batch * tokens, tokens, inner,
                sign(reverse), BM=ROWS, BE=CHANNELS, K=width, HAS_BIAS=bias is not None, UNIT=unit,
            )  # fmt: skip
        grad = slope
    grad_x = None
    if need_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        adjoint((grad, grad), (filters, filters), grad_x, use=(not reverse, reverse))
    if not (need_weight or need_bias):
        return grad_x, None, None
    grad_weight, grad_bias = weight_gradients(grad, x, width, reverse)
    return (
        grad_x,
        grad_weight.to(weight.dtype) if need_weight else None,
        None if bias is None or not need_bias else grad_bias.to(bias.dtype),
    )
