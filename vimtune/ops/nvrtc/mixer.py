"""Both directions of the Vim mixer, between its two large projections, in CUDA C++: forward and backward.

The same interface as `vimtune.ops.triton.mixer`. For the backward only B | C | dt_r are kept, the small
weights as the kernels read them and, where sequences are cut, the ends of their segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from vimtune.ops.nvrtc import prepare, prepare_backward, scan
from vimtune.ops.triton.mixer import (
    A_LOG,
    CONV_BIAS,
    CONV_WEIGHT,
    DT_BIAS,
    DT_PROJ,
    X_PROJ,
    D,
    ParameterGradients,
    Weights,
    both,
    parameter_gradients,
)


def covers(xz: Tensor, weights: Sequence[Any]) -> bool:
    """Whether the kernels exist for these activations (B, L, 2 E) and one direction's weights."""
    inner, num_states = weights[A_LOG].shape
    return (
        scan.covers(xz.dtype, inner, num_states)
        and prepare.covers(inner, weights[CONV_WEIGHT].shape[1])
        and prepare_backward.covers(weights[DT_PROJ].shape[1], xz.device)
    )


def shapes(xz: Tensor, weights: Sequence[Any], save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept for the backward: B | C | dt_r in the dtype of `xz`, and in fp32 the packed
    weights followed by the ends of segments. `weights` are those of one direction."""
    size, ends_shape = _layout(xz, weights, save)
    projections = 2, *xz.shape[:2], prepare.columns(weights[DT_PROJ].shape[1])
    return projections, (size + prod(ends_shape) if save else 0,)


def forward(xz: Tensor, weights: Weights, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of both directions, and the two tensors of `shapes`."""
    size, ends_shape = _layout(xz, weights[0], save)
    kept = torch.empty(size + prod(ends_shape), dtype=torch.float32, device=xz.device)
    packed = prepare.pack_weights(
        both(weights, CONV_WEIGHT),
        both(weights, CONV_BIAS),
        both(weights, X_PROJ),
        both(weights, DT_PROJ),
        both(weights, DT_BIAS),
        xz.dtype,
        kept[:size],
    )
    u, delta, projections = prepare.prepare(_x(xz), packed)
    ends = kept[size:].view(ends_shape)
    out = scan.scan_forward(_scan_inputs(u, delta, projections, weights, xz, ends))
    return out, projections, kept if save else kept.new_empty(0)


def backward(
    grad: Tensor,
    xz: Tensor,
    projections: Tensor,
    kept: Tensor,
    weights: Weights,
    need_xz: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradient of `xz` and, per direction, of the weights; None where `needs` is False."""

    def anywhere(*names: int) -> bool:
        return any(direction[name] for direction in needs for name in names)

    size, ends_shape = _layout(xz, weights[0], save=True)
    packed = prepare.packed_in(kept[:size], *_sizes(weights[0]), xz.dtype)
    u, delta, _ = prepare.prepare(_x(xz), packed, projections)
    inputs = _scan_inputs(u, delta, projections, weights, xz, kept[size:].view(ends_shape))
    grad_xz = torch.empty_like(xz)
    found = scan.scan_backward(grad, inputs, grad_xz, need_parameters=anywhere(A_LOG, D, DT_BIAS))
    grad_projections, grad_filters = prepare_backward.prepare_backward(
        found.u, found.delta, found.BC, _x(xz), packed, _x(grad_xz),
        need_weights=anywhere(CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ),
    )  # fmt: skip
    parts = ParameterGradients(
        found.A,
        found.D,
        found.bias,
        found.delta,
        grad_filters[..., :-1, :].transpose(-1, -2),
        grad_filters[..., -1, :],
        grad_projections.flatten(1, -2),
    )
    return grad_xz if need_xz else None, parameter_gradients(parts, needs, weights, u, projections)


def _x(xz: Tensor) -> Tensor:
    """The half that is convolved."""
    return xz[..., : xz.shape[-1] // 2]


def _sizes(weights: Sequence[Any]) -> tuple[int, int, int]:
    """E, R and K of one direction's weights."""
    return *weights[DT_PROJ].shape, weights[CONV_WEIGHT].shape[1]


def _layout(xz: Tensor, weights: Sequence[Any], save: bool) -> tuple[int, tuple[int, ...]]:
    """Of what is kept: how many numbers packed weights take, and the shape of the ends of segments behind."""
    batch, tokens, twice = xz.shape
    ends = scan.ends_shape(batch, tokens, twice // 2, xz.device, backward=save)
    return prepare.packed_size(*_sizes(weights)), ends


def _scan_inputs(
    u: Tensor, delta: Tensor, projections: Tensor, weights: Weights, xz: Tensor, ends: Tensor
) -> scan.ScanInputs:
    return scan.ScanInputs(u, delta, projections, both(weights, A_LOG), both(weights, D), xz, ends)
