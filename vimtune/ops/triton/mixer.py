"""Both directions of the Vim mixer, between its two large projections, forward and backward.

For the backward only B | C | dt_r (2, B, L, 2 NP + RP) and at most a few states are kept. The convolved
input and the time step exist for the duration of one call: they are computed again for the backward.

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
from vimtune.ops.triton.convolution import adjoint, transposed, weight_gradients
from vimtune.ops.triton.project_kernels import prepare_backward_kernel, prepare_kernel

PREPARE_ROWS = 64
PREPARE_CHANNELS = 64

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


def shapes(xz: Tensor, weights: Sequence[Any], save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept for the backward: B | C | dt_r in the dtype of `xz`, and fp32 states.

    `weights` are those of one direction.
    """
    num_states = weights[A_LOG].shape[1]
    sizes = _sizes(xz, num_states, weights[DT_PROJ].shape[1])
    states = (2, sizes.batch, torch.sym_max(launch.num_chunks(sizes.tokens) - 1, 0), num_states, sizes.inner)
    return (2, sizes.batch, sizes.tokens, sizes.columns), states if save else (0,)


def forward(xz: Tensor, weights: Weights, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of both directions, and the two tensors of `shapes`."""
    sizes = _sizes(xz, weights[0][A_LOG].shape[1], weights[0][DT_PROJ].shape[1])
    projections = torch.empty((2, sizes.batch, sizes.tokens, sizes.columns), dtype=xz.dtype, device=xz.device)
    u, delta = _prepare(xz[..., : sizes.inner], weights, projections, sizes, project=True)
    out = torch.empty((sizes.batch, sizes.tokens, sizes.inner), dtype=xz.dtype, device=xz.device)
    inputs = _scan_inputs(u, delta, projections, weights, sizes)
    return out, projections, launch.scan_forward(inputs, xz[..., sizes.inner :], out, 0.5, save)


def backward(
    grad: Tensor,
    xz: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    weights: Weights,
    need_xz: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradient of `xz` and, per direction, of the weights; None where `needs` is False.

    `results` are those of the forward, `grad` is the gradient of the first.
    """
    _, projections, states = results
    sizes = _sizes(xz, weights[0][A_LOG].shape[1], weights[0][DT_PROJ].shape[1])
    x = xz[..., : sizes.inner]

    def anywhere(*names: int) -> bool:
        return any(direction[name] for direction in needs for name in names)

    need_conv = need_xz or anywhere(CONV_WEIGHT, CONV_BIAS)
    need_projection = need_conv or anywhere(X_PROJ)
    u, delta = _prepare(x, weights, projections, sizes, project=False)
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    z = xz[..., sizes.inner :]
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
    if need_xz:
        launch.gate_finish(grad, z, gradients.y, grad_xz[..., sizes.inner :], 0.5)
    grad_projections = None
    if need_projection:
        grad_projections = _prepare_backward(x, weights, gradients, sizes, spread=need_conv)
    if need_xz:
        filters = [transposed(weight) for weight in both(weights, CONV_WEIGHT)]
        adjoint(gradients.u[0], gradients.u[1], *filters, grad_xz[..., : sizes.inner], use=(True, True))

    filters = biases = None
    if anywhere(CONV_WEIGHT, CONV_BIAS):
        width = weights[0][CONV_WEIGHT].shape[1]
        found = [weight_gradients(gradients.u[index], x, width, bool(index)) for index in (0, 1)]
        filters, biases = (torch.stack(both) for both in zip(*found, strict=True))
    parts = ParameterGradients(
        gradients.A, gradients.D, gradients.bias, gradients.delta, filters, biases, grad_projections
    )
    return grad_xz if need_xz else None, parameter_gradients(parts, needs, weights, u, projections)


@dataclass(frozen=True)
class ParameterGradients:
    """What the gradients of the weights are made of; None or empty where nobody needs it.

    A_log (2, E, N), D, dt_bias and conv_bias (2, E), conv_weight (2, E, K), those of the time step before
    softplus (2, B, L, E) and of B | C | dt_r (2, B L, 2 NP + RP).
    """

    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    delta: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    projections: Tensor | None


def parameter_gradients(
    gradients: ParameterGradients,
    needs: Sequence[Sequence[bool]],
    weights: Weights,
    u: Tensor,
    projections: Tensor,
) -> list[list[Tensor | None]]:
    """Gradients of the weights in their order and dtype, None where `needs` is False."""
    result = []
    for index in (0, 1):
        found = _of_one_direction(index, needs[index], gradients, weights, u, projections)
        result.append(
            [
                None
                if value is None
                else value.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
                for value, own in zip(found, weights[index], strict=True)
            ]
        )
    return result


def _of_one_direction(index, wanted, gradients, weights, u, projections):
    rank, states = weights[index][DT_PROJ].shape[1], weights[index][A_LOG].shape[1]
    padded = launch.padded_states(states, launch.is_low(u))
    found: list[Tensor | None] = [None] * 7
    found[CONV_WEIGHT] = gradients.conv_weight[index] if wanted[CONV_WEIGHT] else None
    found[CONV_BIAS] = gradients.conv_bias[index] if wanted[CONV_BIAS] else None
    if wanted[X_PROJ]:
        rows = gradients.projections[index].t() @ u[index].flatten(0, 1)
        found[X_PROJ] = torch.cat(
            [rows[2 * padded : 2 * padded + rank], rows[:states], rows[padded : padded + states]]
        )
    if wanted[DT_PROJ]:
        low_rank = projections[index, ..., 2 * padded : 2 * padded + rank].flatten(0, 1)
        found[DT_PROJ] = gradients.delta[index].flatten(0, 1).t() @ low_rank
    found[DT_BIAS] = gradients.dt_bias[index] if wanted[DT_BIAS] else None
    found[A_LOG] = gradients.A_log[index] if wanted[A_LOG] else None
    found[D] = gradients.D[index] if wanted[D] else None
    return found


def _prepare(
    x: Tensor, weights: Weights, projections: Tensor, sizes: _Sizes, project: bool
) -> tuple[Tensor, Tensor]:
    """Convolved inputs and time steps, both (2, B, L, E); fills `projections` or reads them.

    Time steps keep eleven bits where activations have fewer: they multiply exponents.
    """
    u = torch.empty((2, sizes.batch, sizes.tokens, sizes.inner), dtype=x.dtype, device=x.device)
    delta = torch.empty_like(u, dtype=torch.float16 if launch.is_low(u) else torch.float32)
    with torch.cuda.device_of(x):
        prepare_kernel[(-(-sizes.rows // PREPARE_ROWS), 2)](
            x, *_convolution(x, weights), *both(weights, X_PROJ), *both(weights, DT_PROJ),
            *both(weights, DT_BIAS), u, projections, delta, x.stride(0), x.stride(1),
            sizes.rows, sizes.tokens, sizes.inner, **_tile(x, weights, sizes), PROJECT=project,
        )  # fmt: skip
    return u, delta


def _prepare_backward(
    x: Tensor, weights: Weights, gradients: launch.ScanGradients, sizes: _Sizes, spread: bool
) -> Tensor:
    """Gradient of B | C | dt_r, (2, B L, P); with `spread`, `gradients.u` becomes that of conv(x)."""
    out = torch.empty((2, sizes.rows, sizes.columns), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        prepare_backward_kernel[(-(-sizes.rows // PREPARE_ROWS), 2)](
            gradients.BC, gradients.delta, x, *_convolution(x, weights), *both(weights, X_PROJ),
            *both(weights, DT_PROJ), out, gradients.u, x.stride(0), x.stride(1),
            sizes.rows, sizes.tokens, sizes.inner, gradients.BC.shape[1],
            **_tile(x, weights, sizes), SPREAD=spread,
        )  # fmt: skip
    return out


def _convolution(x: Tensor, weights: Weights) -> list[Tensor]:
    """Filters (K, E) and biases of both directions; any tensor for a bias that is not there."""
    filters = [transposed(weight) for weight in both(weights, CONV_WEIGHT)]
    return filters + [x if bias is None else bias for bias in both(weights, CONV_BIAS)]


def _tile(x: Tensor, weights: Weights, sizes: _Sizes) -> dict[str, Any]:
    return {
        "BM": PREPARE_ROWS,
        "BK": PREPARE_CHANNELS,
        "K": weights[0][CONV_WEIGHT].shape[1],
        "HAS_BIAS": weights[0][CONV_BIAS] is not None,
        "N": sizes.states,
        "NP": sizes.padded_states,
        "R": sizes.rank,
        "RP": sizes.padded_rank,
        "DOT_TYPE": launch.dot_type(x),
    }


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


def both(weights: Weights, name: int) -> list[Any]:
    return [weights[0][name], weights[1][name]]
