"""The operations of a scan as graphs hold them, which know nothing of this package.

The recurrence itself, s_t = exp(dt_t A) s_{t-1} + x_t B_t and y_t = <s_t, C_t>, is a loop over the tokens,
which each format of files has in a form of its own (`Recurrence`). What surrounds it is the same everywhere.

Shape letters: B batch, L tokens, E inner width, N states, K filter width; T tokens of a chunk, G chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.ops.scan import time_steps

Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""From the state before the first token (B, N, E), time steps and inputs dt u (B, L, E), A (N, E), B and C
(B, L, N), and whether the last token comes first, to y (B, L, E) and the state behind the token that is
visited last (B, N, E)."""


def chunked_recurrence(
    state: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """A `Recurrence` in operations of torch alone, some 5 sqrt(L) of them in the place of 6 L.

    The tokens are cut into chunks. A loop over the tokens of a chunk, all chunks together, gives the states
    that they leave behind where they begin with zeros; one over the chunks, the states with which they do
    begin; the first one once more, the states within them. The exponents are not positive, so nothing
    overflows, however long the sequence is. No tensor has all states of all tokens: in pieces that fit a
    cache a CPU computes the same in half the time.
    """
    if reverse:
        dt, x, B, C = (tensor.flip(1) for tensor in (dt, x, B, C))
    tokens = dt.shape[1]
    # A step within the chunks takes four times what one over them does.
    size = max(math.isqrt(tokens // 4), 1)
    count = -(-tokens // size)
    # Tokens that fill the last chunk have time steps of 0: they leave the state as it is.
    padding = (0, 0, 0, count * size - tokens)
    dt, x, B, C = (F.pad(tensor, padding).unflatten(1, (count, size)) for tensor in (dt, x, B, C))
    decays = [torch.exp(step * A) for step in dt.unsqueeze(3).unbind(2)]  # T times (B, G, N, E)
    pairs = zip(x.unsqueeze(3).unbind(2), B.unsqueeze(4).unbind(2), strict=True)
    added = [value * row for value, row in pairs]

    behind = added[0]
    for decay, own in zip(decays[1:], added[1:], strict=True):
        behind = torch.addcmul(own, decay, behind)
    before = [state]
    whole = torch.exp(dt.sum(2, keepdim=True) * A)
    for decay, own in zip(whole.unbind(1), behind.unbind(1), strict=True):
        before.append(torch.addcmul(own, decay, before[-1]))
    states, results = torch.stack(before[:-1], 1), []
    for decay, own, row in zip(decays, added, C.unsqueeze(3).unbind(2), strict=True):
        states = torch.addcmul(own, decay, states)
        results.append(row @ states)
    y = torch.cat(results, 2).flatten(1, 2)[:, :tokens]
    return y.flip(1) if reverse else y, before[-1]


def operations(recurrence: Recurrence) -> dict[Any, Callable[..., Any]]:
    """What takes the place of this package's operations in a graph, for `run_decompositions`.

    The operations are those of which the backend "torch" composes a model of images; each function has the
    arguments and results of its operation, without what only a backward pass needs.
    """

    def selective_scan(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """What `vimtune::selective_scan` returns: the result, and no states."""
        *tensors, softplus, reverse, _backend, _save = others
        result, _ = _scan(recurrence, u, *[*tensors, None, softplus, reverse])
        return result, u.new_empty(0)

    def stateful_scan(u: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What `vimtune::stateful_scan` returns: the result, the last state, and no other states."""
        *arguments, _backend, _save = others
        return *_scan(recurrence, u, *arguments), u.new_empty(0)

    ops: Any = torch.ops.vimtune
    return {
        ops.selective_scan.default: selective_scan,
        ops.stateful_scan.default: stateful_scan,
        ops.causal_conv1d.default: _causal_conv1d,
    }


def _scan(
    recurrence: Recurrence,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`vimtune.ops.reference.stateful_scan` around the recurrence."""
    dt = time_steps(delta, delta_bias, softplus)
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y, last = recurrence(state.transpose(1, 2), dt, dt * u, A.t(), B, C, reverse)
    if D is not None:
        y = y + D * u
    return (y if z is None else y * F.silu(z)), last.transpose(1, 2)


def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool, backend: str
) -> Tensor:
    """`vimtune.ops.reference.causal_conv1d`, where the filter is turned round instead of the sequence."""
    lag = weight.shape[1] - 1
    padded = F.pad(x.transpose(1, 2), (0, lag) if reverse else (lag, 0))
    kernel = (weight.flip(1) if reverse else weight).unsqueeze(1)
    y = F.conv1d(padded, kernel, bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if silu else y
