"""Both directions of the Vim mixer, between its two large projections, forward and backward.

Forward, three tensors touched: x and z are read, the gated average is written. The convolved input is
recomputed wherever it is needed, the time step never exists in memory; B, C and the low-rank time step
(B, L, 2 NP + RP) are the only intermediates, kept for the backward together with a few states.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vimtune.ops.triton import launch
from vimtune.ops.triton.common import INTERPRETED, next_power_of_2
from vimtune.ops.triton.conv_kernels import conv_project_kernel, project_backward_kernel
from vimtune.ops.triton.convolution import ROWS, adjoint, convolve, weight_gradients

PROJECT_ROWS = 64
PROJECT_CHANNELS = 64

# Order of one direction's weights in the flat lists below.
CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D = range(7)


def shapes(xz: Tensor, num_states: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two fp32 tensors kept for the backward: projections and states."""
    batch, tokens, twice = xz.shape
    columns = 2 * launch.padded_states(num_states, launch.is_low(xz)) + _padded_rank(rank)
    return (
        (2, batch, tokens, columns),
        (2, batch, launch.num_chunks(tokens), num_states, twice // 2),
    )


def forward(xz: Tensor, weights: Sequence[Sequence[Tensor | None]], save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gated average (B, L, E) of both directions, the projections and the states of `shapes`."""
    x, z, directions, num_states, rank = _unpack(xz, weights)
    batch, tokens, inner = x.shape
    projections = torch.empty(shapes(xz, num_states, rank)[0], dtype=torch.float32, device=xz.device)
    columns = projections.shape[-1]
    padded = launch.padded_states(num_states, launch.is_low(x))
    with torch.cuda.device_of(xz):
        conv_project_kernel[(-(-batch * tokens // PROJECT_ROWS),)](
            x, *_both(weights, CONV_WEIGHT, x), *_both(weights, CONV_BIAS, x), *_both(weights, X_PROJ, x), projections,
            x.stride(0), x.stride(1), batch * tokens, tokens, inner,
            BM=PROJECT_ROWS, BK=PROJECT_CHANNELS, K=directions[0].conv_weight.shape[1],
            HAS_BIAS=weights[0][CONV_BIAS] is not None, N=num_states, NP=padded, R=rank, P=columns,
            PP=next_power_of_2(columns), LOW=_multiplies_low(x), num_stages=1,
        )  # fmt: skip
    out = torch.empty((batch, tokens, inner), dtype=xz.dtype, device=xz.device)
    states = launch.scan_forward(
        x, z, *_parts(projections, padded), directions, out,
        first=0, rank=rank, softplus=True, from_log=True, scale=0.5,
        direction_stride=projections.stride(0), save_states=save,
    )  # fmt: skip
    return out, projections, states


def backward(
    grad: Tensor,
    xz: Tensor,
    projections: Tensor,
    states: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    need_xz: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradient of `xz` and, per direction, of the weights; None where `needs` is False."""
    x, z, directions, num_states, rank = _unpack(xz, weights)
    batch, tokens, inner = x.shape
    padded = launch.padded_states(num_states, launch.is_low(x))

    def anywhere(*names: int) -> bool:
        return any(direction[name] for direction in needs for name in names)

    weight_keep = anywhere(X_PROJ)
    need_filter = anywhere(CONV_WEIGHT, CONV_BIAS)
    upstream = need_xz or need_filter
    need_projection = upstream or weight_keep
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    gradients = launch.scan_backward(
        grad, x, z, states, *_parts(projections, padded), directions, grad_xz[..., inner:],
        launch.ScanNeeds(
            u=need_projection, delta=need_projection or anywhere(DT_PROJ), A=anywhere(A_LOG), BC=need_projection,
            D=anywhere(D), z=need_xz, bias=anywhere(DT_BIAS),
        ),
        first=0, rank=rank, softplus=True, from_log=True, scale=0.5, direction_stride=projections.stride(0),
    )  # fmt: skip
    grad_projections = torch.empty(
        projections.shape if weight_keep else (0,), dtype=torch.float32, device=xz.device
    )
    if need_projection:
        _project_backward(x, weights, gradients, grad_projections, num_states, rank, padded)
    if need_xz:
        conv0, conv1 = _both(weights, CONV_WEIGHT, x)
        adjoint(gradients.u[0], gradients.u[1], conv0, conv1, grad_xz[..., :inner], use=(True, True))

    result: list[list[Tensor | None]] = []
    for index, (wanted, direction, own) in enumerate(zip(needs, directions, weights, strict=True)):
        found: list[Tensor | None] = [None] * 7
        if wanted[CONV_WEIGHT] or wanted[CONV_BIAS]:
            width = direction.conv_weight.shape[1]
            found[CONV_WEIGHT], found[CONV_BIAS] = weight_gradients(gradients.u[index], x, width, bool(index))
        if wanted[X_PROJ]:
            u = torch.empty((batch, tokens, inner), dtype=x.dtype, device=x.device)
            convolve(x, direction.conv_weight, direction.conv_bias, u, True, bool(index))
            rows = grad_projections[index].flatten(0, 1).to(x.dtype).t() @ u.flatten(0, 1)
            found[X_PROJ] = torch.cat(
                [rows[2 * padded : 2 * padded + rank], rows[:num_states], rows[padded : padded + num_states]]
            )
        if wanted[DT_PROJ]:
            dt = projections[index, ..., 2 * padded : 2 * padded + rank].flatten(0, 1).to(x.dtype)
            found[DT_PROJ] = gradients.delta[index].flatten(0, 1).t() @ dt
        found[DT_BIAS] = gradients.bias[index] if wanted[DT_BIAS] else None
        found[A_LOG] = gradients.A[index] if wanted[A_LOG] else None
        found[D] = gradients.D[index] if wanted[D] else None
        result.append(
            [
                value.to(weight.dtype, copy=True, memory_format=torch.contiguous_format) if want else None
                for value, weight, want in zip(found, own, wanted, strict=True)
            ]
        )
    return grad_xz if need_xz else None, result


def _project_backward(x, weights, gradients, grad_projections, num_states, rank, padded) -> None:
    batch, tokens, inner = x.shape
    with torch.cuda.device_of(x):
        project_backward_kernel[(-(-batch * tokens // ROWS), 2)](
            x, *_both(weights, CONV_WEIGHT, x), *_both(weights, CONV_BIAS, x), *_both(weights, X_PROJ, x),
            *_both(weights, DT_PROJ, x), gradients.u, gradients.delta, gradients.BC, grad_projections,
            x.stride(0), x.stride(1), batch * tokens, tokens, inner, gradients.BC.shape[1],
            BM=ROWS, BK=PROJECT_CHANNELS, K=weights[0][CONV_WEIGHT].shape[-1],
            HAS_BIAS=weights[0][CONV_BIAS] is not None, N=num_states, NP=padded, R=rank, RP=_padded_rank(rank),
            P=2 * padded + _padded_rank(rank), LOW=_multiplies_low(x), KEEP=grad_projections.numel() > 0,
        )  # fmt: skip


def _unpack(xz, weights):
    inner = xz.shape[-1] // 2
    directions = [
        launch.Direction(w[A_LOG], w[D], w[DT_BIAS], w[CONV_WEIGHT], w[CONV_BIAS], w[DT_PROJ]) for w in weights
    ]
    return xz[..., :inner], xz[..., inner:], directions, weights[0][A_LOG].shape[1], weights[0][DT_PROJ].shape[1]


def _parts(projections: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """The low-rank time step, B and C of the first direction; the second one lies a constant stride away."""
    first = projections[0]
    return first[..., 2 * padded :], first[..., :padded], first[..., padded : 2 * padded]


def _both(weights, name: int, absent: Tensor) -> list[Tensor]:
    return [absent if own[name] is None else own[name] for own in weights]


def _padded_rank(rank: int) -> int:
    return max(next_power_of_2(rank), 16)


def _multiplies_low(x: Tensor) -> bool:
    return launch.is_low(x) and not INTERPRETED
