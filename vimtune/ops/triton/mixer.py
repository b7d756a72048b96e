"""Both directions of the Vim mixer, between its two large projections, forward and backward.

For the backward only B | C | dt_r (2, B, L, 2 NP + RP) and a few states are kept. The convolved input and
the time step exist for the duration of one call: they are computed again for the backward.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vimtune.ops.triton import launch
from vimtune.ops.triton.common import next_power_of_2
from vimtune.ops.triton.convolution import (
    CHANNELS,
    ROWS,
    adjoint,
    convolve_pair,
    transposed,
    weight_gradients,
)
from vimtune.ops.triton.project_kernels import (
    project_kernel,
    project_reduce_kernel,
    project_spread_kernel,
    time_step_kernel,
)

PROJECT_ROWS = 32
PROJECT_CHANNELS = 64

# Order of one direction's weights in the flat lists below.
CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D = range(7)

Weights = Sequence[Sequence[Any]]
"""Per direction, tensors in the order above; CONV_BIAS may be None."""


@dataclass(frozen=True)
class _Sizes:
    batch: int
    tokens: int
    inner: int
    states: int
    rank: int
    padded_states: int
    padded_rank: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def columns(self) -> int:
        return 2 * self.padded_states + self.padded_rank


def _sizes(xz: Tensor, num_states: int, rank: int) -> _Sizes:
    batch, tokens, twice = xz.shape
    padded = launch.padded_states(num_states, launch.is_low(xz))
    return _Sizes(batch, tokens, twice // 2, num_states, rank, padded, max(next_power_of_2(rank), 16))


def shapes(xz: Tensor, num_states: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two fp32 tensors kept for the backward: B | C | dt_r, and states."""
    sizes = _sizes(xz, num_states, rank)
    return (
        (2, sizes.batch, sizes.tokens, sizes.columns),
        (2, sizes.batch, launch.num_chunks(sizes.tokens) - 1, num_states, sizes.inner),
    )


def forward(xz: Tensor, weights: Weights, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of both directions, and the two tensors of `shapes`."""
    sizes = _sizes(xz, weights[0][A_LOG].shape[1], weights[0][DT_PROJ].shape[1])
    x, z = xz[..., : sizes.inner], xz[..., sizes.inner :]
    filters = [transposed(weight) for weight in _both(weights, CONV_WEIGHT)]
    u = convolve_pair(x, filters, _both(weights, CONV_BIAS))
    projections = torch.empty(
        (2, sizes.batch, sizes.tokens, sizes.columns), dtype=torch.float32, device=xz.device
    )
    delta = _empty_delta(u)
    with torch.cuda.device_of(xz):
        project_kernel[(-(-sizes.rows // PROJECT_ROWS), 2)](
            u, *_both(weights, X_PROJ), *_both(weights, DT_PROJ), *_both(weights, DT_BIAS),
            projections, delta,
            sizes.rows, sizes.inner, BM=PROJECT_ROWS, BK=PROJECT_CHANNELS,
            N=sizes.states, NP=sizes.padded_states, R=sizes.rank, RP=sizes.padded_rank,
            DOT_TYPE=launch.dot_type(xz),
        )  # fmt: skip
    out = torch.empty((sizes.batch, sizes.tokens, sizes.inner), dtype=xz.dtype, device=xz.device)
    states = launch.scan_forward(_scan_inputs(u, delta, projections, weights, sizes), z, out, 0.5, save)
    return out, projections, states


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
    sizes = _sizes(xz, weights[0][A_LOG].shape[1], weights[0][DT_PROJ].shape[1])
    x, z = xz[..., : sizes.inner], xz[..., sizes.inner :]

    def anywhere(*names: int) -> bool:
        return any(direction[name] for direction in needs for name in names)

    need_conv = need_xz or anywhere(CONV_WEIGHT, CONV_BIAS)
    need_projection = need_conv or anywhere(X_PROJ)
    filters = [transposed(weight) for weight in _both(weights, CONV_WEIGHT)]
    u = convolve_pair(x, filters, _both(weights, CONV_BIAS))
    delta = _empty_delta(u)
    with torch.cuda.device_of(xz):
        time_step_kernel[(-(-sizes.rows // PROJECT_ROWS), 2)](
            projections, *_both(weights, DT_PROJ), *_both(weights, DT_BIAS), delta, sizes.rows, sizes.inner,
            BM=PROJECT_ROWS, BK=PROJECT_CHANNELS, NP=sizes.padded_states, R=sizes.rank, RP=sizes.padded_rank,
            DOT_TYPE=launch.dot_type(xz),
        )  # fmt: skip
    gradients = launch.scan_backward(
        _scan_inputs(u, delta, projections, weights, sizes),
        launch.gate_gradient(grad, z, 0.5),
        states,
        launch.ScanNeeds(
            u=need_conv,
            delta=need_projection or anywhere(DT_PROJ),
            A=anywhere(A_LOG),
            BC=need_projection,
            D=anywhere(D),
            y=need_xz,
            bias=anywhere(DT_BIAS),
        ),
    )
    grad_projections = _grad_projections(gradients, weights, sizes) if need_projection else None
    if need_conv and grad_projections is not None:
        _spread(x, weights, filters, grad_projections, gradients.u, sizes)
    grad_xz = None
    if need_xz:
        grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
        launch.gate_finish(grad, z, gradients.y, grad_xz[..., sizes.inner :], 0.5)
        x_part = grad_xz[..., : sizes.inner]
        adjoint(gradients.u[0], gradients.u[1], filters[0], filters[1], x_part, use=(True, True))

    result = []
    for index in (0, 1):
        found = _weight_gradients(
            index, needs[index], weights, x, u, projections, grad_projections, gradients, sizes
        )
        result.append(
            [
                None
                if value is None
                else value.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
                for value, own in zip(found, weights[index], strict=True)
            ]
        )
    return grad_xz, result


def _weight_gradients(index, wanted, weights, x, u, projections, grad_projections, gradients, sizes):
    """Gradients of one direction's weights in the order of `weights`, None where not wanted."""
    padded = sizes.padded_states
    found: list[Tensor | None] = [None] * 7
    if wanted[CONV_WEIGHT] or wanted[CONV_BIAS]:
        width = weights[index][CONV_WEIGHT].shape[1]
        weight, bias = weight_gradients(gradients.u[index], x, width, bool(index))
        found[CONV_WEIGHT] = weight if wanted[CONV_WEIGHT] else None
        found[CONV_BIAS] = bias if wanted[CONV_BIAS] else None
    if wanted[X_PROJ]:
        rows = grad_projections[index].t() @ u[index].flatten(0, 1)
        found[X_PROJ] = torch.cat(
            [
                rows[2 * padded : 2 * padded + sizes.rank],
                rows[: sizes.states],
                rows[padded : padded + sizes.states],
            ]
        )
    if wanted[DT_PROJ]:
        low_rank = projections[index, ..., 2 * padded : 2 * padded + sizes.rank].flatten(0, 1)
        found[DT_PROJ] = gradients.delta[index].flatten(0, 1).t() @ low_rank.to(x.dtype)
    found[DT_BIAS] = gradients.bias[index] if wanted[DT_BIAS] else None
    found[A_LOG] = gradients.A[index] if wanted[A_LOG] else None
    found[D] = gradients.D[index] if wanted[D] else None
    return found


def _grad_projections(gradients: launch.ScanGradients, weights: Weights, sizes: _Sizes) -> Tensor:
    """Gradient of B | C | dt_r, (2, B L, P) in the dtype of the activations."""
    out = torch.empty(
        (2, sizes.rows, sizes.columns), dtype=gradients.delta.dtype, device=gradients.delta.device
    )
    with torch.cuda.device_of(out):
        project_reduce_kernel[(-(-sizes.rows // PROJECT_ROWS), 2)](
            gradients.BC, gradients.delta, *_both(weights, DT_PROJ), out,
            sizes.rows, sizes.inner, gradients.BC.shape[1],
            BM=PROJECT_ROWS, BK=PROJECT_CHANNELS, NP=sizes.padded_states, R=sizes.rank, RP=sizes.padded_rank,
            DOT_TYPE=launch.dot_type(out),
        )  # fmt: skip
    return out


def _spread(
    x: Tensor,
    weights: Weights,
    filters: list[Tensor],
    grad_projections: Tensor,
    grad_u: Tensor,
    sizes: _Sizes,
) -> None:
    biases = [x if bias is None else bias for bias in _both(weights, CONV_BIAS)]
    with torch.cuda.device_of(x):
        project_spread_kernel[(-(-sizes.rows // ROWS), -(-sizes.inner // CHANNELS), 2)](
            x, *filters, *biases, *_both(weights, X_PROJ), grad_projections, grad_u,
            x.stride(0), x.stride(1), sizes.rows, sizes.tokens, sizes.inner,
            BM=ROWS, BE=CHANNELS, K=filters[0].shape[0],
            HAS_BIAS=weights[0][CONV_BIAS] is not None,
            N=sizes.states, NP=sizes.padded_states, R=sizes.rank, RP=sizes.padded_rank,
            DOT_TYPE=launch.dot_type(x),
        )  # fmt: skip


def _scan_inputs(
    u: Tensor, delta: Tensor, projections: Tensor, weights: Weights, sizes: _Sizes
) -> launch.ScanInputs:
    padded = sizes.padded_states
    return launch.ScanInputs(
        u[0],
        delta[0],
        projections[0, ..., :padded],
        projections[0, ..., padded : 2 * padded],
        [launch.Direction(own[A_LOG], own[D], None) for own in weights],
        first=0,
        softplus=True,
        raw=False,
        from_log=True,
        u_stride=u.stride(0),
        delta_stride=delta.stride(0),
        BC_stride=projections.stride(0),
    )


def _empty_delta(u: Tensor) -> Tensor:
    """Time steps keep eleven bits where activations have fewer: they multiply exponents."""
    return torch.empty(u.shape, dtype=torch.float16 if launch.is_low(u) else torch.float32, device=u.device)


def _both(weights: Weights, name: int) -> list[Any]:
    return [weights[0][name], weights[1][name]]
