"""A mixer with one direction or both, between its two large projections, forward and backward.

For the backward only B | C | dt_r (d, B, L, 2 NP + RP) and at most a few states are kept. The convolved
input and the time step exist for the duration of one call: they are computed again for the backward.

Shape letters: d directions, B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from vimtune.ops.backend import device_of
from vimtune.ops.mixer import DirectionStart, DirectionWeights
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
from vimtune.ops.triton import launch
from vimtune.ops.triton.common import next_power_of_2
from vimtune.ops.triton.convolution import adjoint, transposed, weight_gradients
from vimtune.ops.triton.project_kernels import prepare_backward_kernel, prepare_kernel

PREPARE_ROWS = 64
"""Tokens of a program of the kernels of project_kernels.py."""
PREPARE_CHANNELS = 64
"""Channels that such a program handles at a time."""


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a call, and what some of them are padded to."""

    directions: int
    batch: int
    tokens: int
    inner: int
    states: int
    rank: int
    padded_states: int
    padded_rank: int

    @property
    def rows(self) -> int:
        """Number of tokens of all samples."""
        return self.batch * self.tokens

    @property
    def columns(self) -> int:
        """P = 2 NP + RP, columns of B | C | dt_r."""
        return 2 * self.padded_states + self.padded_rank

    @property
    def scale(self) -> float:
        """What turns the sum of the directions into their average."""
        return 1 / self.directions


def _sizes(xz: Tensor, weights: Weights) -> _Sizes:
    """The sizes of activations `xz` (B, L, 2 E) and of the weights of each direction."""
    batch, tokens, twice = xz.shape
    num_states, rank = weights[0].A_log.shape[1], weights[0].dt_proj.shape[1]
    padded = launch.padded_states(num_states, launch.is_low(xz))
    padded_rank = max(next_power_of_2(rank), 16)
    return _Sizes(len(weights), batch, tokens, twice // 2, num_states, rank, padded, padded_rank)


def shapes(xz: Tensor, weights: Weights, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept for the backward: B | C | dt_r in the dtype of `xz`, and fp32 states."""
    sizes = _sizes(xz, weights)
    chunks = cast(int, torch.sym_max(launch.num_chunks(sizes.tokens) - 1, 0))  # Tokens may be a symbol.
    states = (sizes.directions, sizes.batch, chunks, sizes.states, sizes.inner)
    return (sizes.directions, sizes.batch, sizes.tokens, sizes.columns), states if save else (0,)


def forward(
    xz: Tensor, weights: Weights, save: bool, starts: Sequence[DirectionStart] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of the directions, and the two tensors of `shapes`.

    `starts`, if there are some, are what each direction begins with; the backward pass knows none.
    """
    sizes = _sizes(xz, weights)
    projections = torch.empty(
        (sizes.directions, sizes.batch, sizes.tokens, sizes.columns), dtype=xz.dtype, device=xz.device
    )
    tails = [transposed(start.tail) for start in starts]
    u, delta = _prepare(xz[..., : sizes.inner], weights, projections, sizes, project=True, tails=tails)
    out = torch.empty((sizes.batch, sizes.tokens, sizes.inner), dtype=xz.dtype, device=xz.device)
    inputs = _scan_inputs(u, delta, projections, weights, sizes)
    if starts:
        inputs = replace(inputs, starts=torch.stack([start.state.float().t() for start in starts]))
    states, _ = launch.scan_forward(inputs, xz[..., sizes.inner :], out, sizes.scale, save)
    return out, projections, states


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
    _, projections, states = results
    sizes = _sizes(xz, weights)
    x = xz[..., : sizes.inner]

    need_conv = need_xz or any_needs(needs, CONV_WEIGHT, CONV_BIAS)
    need_projection = need_conv or any_needs(needs, X_PROJ)
    u, delta = _prepare(x, weights, projections, sizes, project=False)
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    z = xz[..., sizes.inner :]
    gradients = launch.scan_backward(
        _scan_inputs(u, delta, projections, weights, sizes),
        launch.gate_gradient(grad, z, sizes.scale),
        states,
        launch.ScanNeeds(
            u=need_conv,
            delta=need_projection or any_needs(needs, DT_PROJ),
            A=any_needs(needs, A_LOG),
            BC=need_projection,
            D=any_needs(needs, D),
            y=need_xz,
            bias=any_needs(needs, DT_BIAS),
        ),
    )
    if need_xz:
        launch.gate_finish(grad, z, gradients.y, grad_xz[..., sizes.inner :], sizes.scale)
    grad_projections = None
    if need_projection:
        grad_projections = _prepare_backward(x, weights, gradients, sizes, spread=need_conv)
    if need_xz:
        adjoint(
            (gradients.u[0], gradients.u[-1]),
            (transposed(weights[0].conv_weight), transposed(weights[-1].conv_weight)),
            grad_xz[..., : sizes.inner],
            use=(True, sizes.directions == 2),
        )

    filters = biases = None
    if any_needs(needs, CONV_WEIGHT, CONV_BIAS):
        width = weights[0].conv_weight.shape[1]
        found = [weight_gradients(own, x, width, bool(index)) for index, own in enumerate(gradients.u)]
        filters, biases = (torch.stack(parts) for parts in zip(*found, strict=True))
    parts = ParameterGradients(
        gradients.A, gradients.D, gradients.bias, gradients.delta, filters, biases, grad_projections
    )
    return grad_xz if need_xz else None, parameter_gradients(
        parts, needs, weights, u, projections, sizes.padded_states
    )


def _prepare(
    x: Tensor,
    weights: Weights,
    projections: Tensor,
    sizes: _Sizes,
    project: bool,
    tails: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Convolved inputs and time steps, both (d, B, L, E); fills `projections` or reads them.

    `tails` (K - 1, E), if there are some, are what each direction's convolution begins with. Time steps keep
    eleven bits where activations have fewer: they multiply exponents.
    """
    shape = sizes.directions, sizes.batch, sizes.tokens, sizes.inner
    u = torch.empty(shape, dtype=x.dtype, device=x.device)
    delta = torch.empty_like(u, dtype=torch.float16 if launch.is_low(u) else torch.float32)
    with device_of(x):
        prepare_kernel[(-(-sizes.rows // PREPARE_ROWS), sizes.directions)](
            x, *_convolution(x, weights), *(own.x_proj for own in _pair(weights)),
            *(own.dt_proj for own in _pair(weights)), *(own.dt_bias for own in _pair(weights)),
            *(tails or (x, x)), u, projections, delta, x.stride(0), x.stride(1),
            sizes.rows, sizes.tokens, sizes.inner, **_tile(x, weights, sizes), PROJECT=project,
            HAS_TAIL=bool(tails),
        )  # fmt: skip
    return u, delta


def _prepare_backward(
    x: Tensor, weights: Weights, gradients: launch.ScanGradients, sizes: _Sizes, spread: bool
) -> Tensor:
    """Gradient of B | C | dt_r, (d, B L, P); with `spread`, `gradients.u` becomes that of conv(x)."""
    out = torch.empty((sizes.directions, sizes.rows, sizes.columns), dtype=x.dtype, device=x.device)
    with device_of(x):
        prepare_backward_kernel[(-(-sizes.rows // PREPARE_ROWS), sizes.directions)](
            gradients.BC, gradients.delta, x, *_convolution(x, weights),
            *(own.x_proj for own in _pair(weights)), *(own.dt_proj for own in _pair(weights)),
            out, gradients.u, x.stride(0), x.stride(1),
            sizes.rows, sizes.tokens, sizes.inner, gradients.BC.shape[1],
            **_tile(x, weights, sizes), SPREAD=spread,
        )  # fmt: skip
    return out


def _convolution(x: Tensor, weights: Weights) -> list[Tensor]:
    """Filters (K, E) and biases of a pair of directions; any tensor for a bias that is not there."""
    filters = [transposed(own.conv_weight) for own in _pair(weights)]
    return filters + [x if own.conv_bias is None else own.conv_bias for own in _pair(weights)]


def _pair(weights: Weights) -> tuple[DirectionWeights, DirectionWeights]:
    """The forward and the reverse direction, as kernels take them: with one direction it stands for both."""
    return weights[0], weights[-1]


def _tile(x: Tensor, weights: Weights, sizes: _Sizes) -> dict[str, Any]:
    """Constants of the kernels of project_kernels.py."""
    return {
        "BM": PREPARE_ROWS,
        "BK": PREPARE_CHANNELS,
        "K": weights[0].conv_weight.shape[1],
        "HAS_BIAS": weights[0].conv_bias is not None,
        "N": sizes.states,
        "NP": sizes.padded_states,
        "R": sizes.rank,
        "RP": sizes.padded_rank,
        "DOT_TYPE": launch.dot_type(x),
    }


def _scan_inputs(
    u: Tensor, delta: Tensor, projections: Tensor, weights: Weights, sizes: _Sizes
) -> launch.ScanInputs:
    """The inputs of the scan."""
    padded = sizes.padded_states
    return launch.ScanInputs(
        u[0],
        delta[0],
        projections[0, ..., :padded],
        projections[0, ..., padded : 2 * padded],
        [launch.Direction(own.A_log, own.D, None) for own in weights],
        first=0,
        softplus=True,
        raw=False,
        from_log=True,
        u_stride=u.stride(0),
        delta_stride=delta.stride(0),
        BC_stride=projections.stride(0),
    )
