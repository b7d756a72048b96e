"""Gradients of a mixer's weights, made of what backward kernels find by products and another order of rows.

This is shared by the backends that have kernels for the inside of a mixer. They keep B | C | dt_r of every
token as columns of one matrix, each part padded: P = 2 NP + RP columns.

Shape letters: d directions, B batch, L tokens, E inner width, N states (padded NP), R dt rank (padded RP),
K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vimtune.ops.mixer import DirectionWeights

Weights = Sequence[DirectionWeights]
"""The weights of the forward direction, and of the reverse one if there is one."""
Needs = Sequence[Sequence[bool]]
"""For each direction, for each weight in the order of `DirectionWeights`, whether its gradient is wanted."""

CONV_WEIGHT, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D, OFFSET = range(len(DirectionWeights._fields))
"""Places of the weights in `DirectionWeights`."""


@dataclass(frozen=True)
class ParameterGradients:
    """What the gradients of the weights are made of; None or empty where nobody needs it."""

    A_log: Tensor
    """(d, E, N)"""
    D: Tensor
    """(d, E)"""
    dt_bias: Tensor
    """(d, E)"""
    delta: Tensor
    """Gradients of the time steps before softplus (d, B, L, E)."""
    conv_weight: Tensor | None
    """(d, E, K)"""
    conv_bias: Tensor | None
    """(d, E)"""
    projections: Tensor | None
    """Gradients of B | C | dt_r (d, B L, P)."""
    offset: Tensor | None = None
    """(d, E, N)"""


def any_needs(needs: Needs, *places: int) -> bool:
    """Whether in either direction the gradient of any of these weights is wanted."""
    return any(direction[place] for direction in needs for place in places)


def parameter_gradients(
    gradients: ParameterGradients,
    needs: Needs,
    weights: Weights,
    u: Tensor,
    projections: Tensor,
    padded_states: int,
) -> list[list[Tensor | None]]:
    """Gradients of the weights in their order and dtype, None where `needs` is False.

    Args:
        gradients: what the kernels have found.
        needs: which are wanted.
        weights: what they are the gradients of.
        u: convolved inputs (d, B, L, E).
        projections: B | C | dt_r (d, B, L, P).
        padded_states: NP.
    """
    result = []
    for index, own_weights in enumerate(weights):
        found = _of_one_direction(index, needs[index], gradients, own_weights, u, projections, padded_states)
        result.append(
            [
                None
                if value is None or own is None
                else value.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
                for value, own in zip(found, own_weights, strict=True)
            ]
        )
    return result


def _of_one_direction(
    index: int,
    wanted: Sequence[bool],
    gradients: ParameterGradients,
    weights: DirectionWeights,
    u: Tensor,
    projections: Tensor,
    padded: int,
) -> list[Tensor | None]:
    """Gradients of one direction's weights in fp32 or the dtype of the activations."""
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    found: list[Tensor | None] = [None] * len(weights)
    if wanted[CONV_WEIGHT] and gradients.conv_weight is not None:
        found[CONV_WEIGHT] = gradients.conv_weight[index]
    if wanted[CONV_BIAS] and gradients.conv_bias is not None:
        found[CONV_BIAS] = gradients.conv_bias[index]
    if wanted[X_PROJ] and gradients.projections is not None:
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
    if wanted[OFFSET] and gradients.offset is not None:
        found[OFFSET] = gradients.offset[index]
    return found
