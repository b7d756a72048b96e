"""A mixer with one direction or both, between its two large projections, in CUDA C++: forward and backward.

For the backward pass the result, which out_proj mostly keeps anyway, B | C | dt_r and the small weights as
the kernels read them are kept; where sequences are cut the ends of their segments, too, and in fp16 the mean
of the directions before the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vimtune.ops.mixer import DirectionStart
from vimtune.ops.mixer_gradients import (
    A_LOG,
    CONV_BIAS,
    CONV_WEIGHT,
    DT_BIAS,
    DT_PROJ,
    X_PROJ,
    D,
    Needs,
    ParameterGradients,
    Weights,
    any_needs,
    parameter_gradients,
)
from vimtune.ops.nvrtc import prepare, prepare_backward, scan


def refusals(xz: Tensor, weights: Weights) -> list[str]:
    """Reasons why there are no kernels for these activations (B, L, 2 E) and weights."""
    inner, num_states = weights[0].A_log.shape
    with_offset = len(_offsets(weights))
    return [
        *(["one of two directions has an offset"] if with_offset not in (0, len(weights)) else []),
        *scan.refusals(xz.dtype, inner, num_states),
        *prepare.refusals(inner, weights[0].conv_weight.shape[1]),
        *prepare_backward.refusals(len(weights), weights[0].dt_proj.shape[1], num_states, xz.device),
    ]


def shapes(xz: Tensor, weights: Weights, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept for the backward beside the result: B | C | dt_r in the dtype of `xz`, and an
    fp32 buffer (see `_Kept`)."""
    num_states = weights[0].A_log.shape[1]
    num_columns = prepare.columns(weights[0].dt_proj.shape[1], num_states)
    projections = len(weights), *xz.shape[:2], num_columns
    return projections, (sum(_sizes(_shapes(xz, weights, save), xz.dtype)) if save else 0,)


def forward(xz: Tensor, weights: Weights, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of the directions, and the two tensors of `shapes`."""
    inputs, buffer = _prepared(xz, weights, save)
    out = scan.scan_forward(inputs)
    return out, inputs.projections, buffer if save else buffer.new_empty(0)


def prompt(xz: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Gated result (B, L, E) of a mixer with one direction, and the state behind the last token (B, E, N)."""
    return scan.scan_prompt(_prepared(xz, weights, save=False)[0])


def forward_from(xz: Tensor, weights: Weights, starts: Sequence[DirectionStart]) -> Tensor:
    """Gated average (B, L, E) of the directions, each of which begins with its start."""
    inputs, _ = _prepared(xz, weights, save=False, tails=[start.tail for start in starts])
    return scan.scan_from(inputs, [start.state for start in starts])


def backward(
    grad: Tensor,
    xz: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
    need_xz: bool,
    needs: Needs,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradient of `xz` and, per direction, of the weights; None where `needs` is False.

    `results` are those of the forward, `grad` is the gradient of the first.
    """
    out, projections, buffer = results
    kept = _kept_in(buffer, _shapes(xz, weights, save=True), xz.dtype)
    packed = prepare.packed_in(kept.packed, _weight_sizes(weights), xz.dtype)
    u, delta, _ = prepare.prepare(_x(xz), packed, projections)
    inputs = _scan_inputs(u, delta, projections, weights, xz, kept)
    grad_xz = torch.empty_like(xz)
    found = scan.scan_backward(
        grad, out, inputs, grad_xz, need_parameters=any_needs(needs, A_LOG, D, DT_BIAS)
    )
    grad_projections, grad_filters = prepare_backward.prepare_backward(
        found.u, found.delta, found.BC, _x(xz), packed, _x(grad_xz),
        need_weights=any_needs(needs, CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ),
    )  # fmt: skip
    parts = ParameterGradients(
        found.A,
        found.D,
        found.bias,
        found.delta,
        grad_filters[..., :-1, :].transpose(-1, -2),
        grad_filters[..., -1, :],
        grad_projections.flatten(1, -2),
        found.offset if inputs.offsets else None,
    )
    return grad_xz if need_xz else None, parameter_gradients(
        parts, needs, weights, u, projections, packed.padded_states()
    )


def _prepared(
    xz: Tensor, weights: Weights, save: bool, tails: Sequence[Tensor] = ()
) -> tuple[scan.ScanInputs, Tensor]:
    """All that happens before the scan: what it reads, and the buffer with what may be kept.

    `tails` (E, K - 1), if there are some, are what each direction's convolution begins with.
    """
    parts = _shapes(xz, weights, save)
    buffer = torch.empty(sum(_sizes(parts, xz.dtype)), dtype=torch.float32, device=xz.device)
    kept = _kept_in(buffer, parts, xz.dtype)
    packed = prepare.pack_weights(
        [own.conv_weight for own in weights],
        [own.conv_bias for own in weights],
        [own.x_proj for own in weights],
        [own.dt_proj for own in weights],
        [own.dt_bias for own in weights],
        xz.dtype,
        kept.packed,
        tails,
    )
    u, delta, projections = prepare.prepare(_x(xz), packed)
    return _scan_inputs(u, delta, projections, weights, xz, kept), buffer


def _x(xz: Tensor) -> Tensor:
    """The half of `xz` (B, L, 2 E) that is convolved."""
    return xz[..., : xz.shape[-1] // 2]


class _Kept(NamedTuple):
    """Parts of the buffer that is kept: packed weights, and what the scan's backward needs (`ScanInputs`)."""

    packed: Tensor
    ends: Tensor
    mean: Tensor


class _Shapes(NamedTuple):
    """Shapes of the parts of `_Kept`."""

    packed: tuple[int, ...]
    ends: tuple[int, ...]
    mean: tuple[int, ...]


def _shapes(xz: Tensor, weights: Weights, save: bool) -> _Shapes:
    """Shapes of what is kept; `save` says whether a backward pass follows."""
    batch, tokens, _ = xz.shape
    inner, num_states = weights[0].A_log.shape
    return _Shapes(
        (prepare.packed_size(_weight_sizes(weights)),),
        scan.ends_shape(len(weights), batch, tokens, inner, num_states, xz.device, backward=save),
        scan.mean_shape(batch, tokens, inner, xz.dtype, backward=save),
    )


def _sizes(parts: _Shapes, dtype: torch.dtype) -> list[int]:
    """How many fp32 numbers each part of the buffer takes; the mean has the dtype of the activations."""
    return [prod(parts.packed), prod(parts.ends), prod(parts.mean) * dtype.itemsize // 4]


def _kept_in(buffer: Tensor, parts: _Shapes, dtype: torch.dtype) -> _Kept:
    """The parts of the buffer."""
    packed, ends, mean = torch.split(buffer, _sizes(parts, dtype))
    return _Kept(packed, ends.view(parts.ends), mean.view(dtype).view(parts.mean))


def _weight_sizes(weights: Weights) -> prepare.WeightSizes:
    """Sizes of the weights that are packed."""
    inner, rank = weights[0].dt_proj.shape
    num_states, width = weights[0].A_log.shape[1], weights[0].conv_weight.shape[1]
    return prepare.WeightSizes(len(weights), inner, rank, num_states, width)


def _scan_inputs(
    u: Tensor, delta: Tensor, projections: Tensor, weights: Weights, xz: Tensor, kept: _Kept
) -> scan.ScanInputs:
    """What the scan reads."""
    return scan.ScanInputs(
        u,
        delta,
        projections,
        [own.A_log for own in weights],
        [own.D for own in weights],
        xz,
        kept.ends,
        kept.mean,
        _offsets(weights),
    )


def _offsets(weights: Weights) -> list[Tensor]:
    """The offsets of the directions that have one."""
    return [own.offset for own in weights if own.offset is not None]
