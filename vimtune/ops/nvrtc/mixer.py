"""Both directions of the Vim mixer, between its two large projections, in CUDA C++: forward and backward.

The same interface as `vimtune.ops.triton.mixer`. For the backward only B | C | dt_r are kept and, where
sequences are cut, the ends of their segments.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def shapes(xz: Tensor, num_states: int, rank: int, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept for the backward: B | C | dt_r in the dtype of `xz`, and ends of segments."""
    batch, tokens, twice = xz.shape
    ends = scan.ends_shape(batch, tokens, twice // 2, xz.device) if save else (0,)
    return (2, batch, tokens, prepare.columns(rank)), ends


def forward(xz: Tensor, weights: Weights, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of both directions, and the two tensors of `shapes`."""
    u, delta, projections = prepare.prepare(_x(xz), _packed(weights, xz.dtype))
    out, ends = scan.scan_forward(u, delta, projections, both(weights, A_LOG), both(weights, D), xz, save)
    return out, projections, ends if save else ends.new_empty(0)


def backward(
    grad: Tensor,
    xz: Tensor,
    projections: Tensor,
    states: Tensor,
    weights: Weights,
    need_xz: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradient of `xz` and, per direction, of the weights; None where `needs` is False."""

    def anywhere(*names: int) -> bool:
        return any(direction[name] for direction in needs for name in names)

    packed = _packed(weights, xz.dtype)
    u, delta, _ = prepare.prepare(_x(xz), packed, projections)
    grad_xz = torch.empty_like(xz)
    found = scan.scan_backward(
        grad, u, delta, projections, both(weights, A_LOG), both(weights, D), xz, states, grad_xz,
        need_parameters=anywhere(A_LOG, D, DT_BIAS),
    )  # fmt: skip
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


def _packed(weights: Weights, dtype: torch.dtype) -> prepare.PackedWeights:
    return prepare.pack_weights(
        both(weights, CONV_WEIGHT),
        both(weights, CONV_BIAS),
        both(weights, X_PROJ),
        both(weights, DT_PROJ),
        both(weights, DT_BIAS),
        dtype,
    )
