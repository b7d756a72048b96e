"""The operation `bidirectional_scan_from`: the inside of Vim's mixer where its directions begin with a state.

What tokens before the image leave behind, when they are the same for every image, is a state of the scan and
the last inputs of the convolution: a model that begins with these computes what it would compute with the
tokens, at the cost of the model without them. The kernels serve inference. Where gradients are asked for, and
where no backend has kernels for it, it is composed of the convolution and the scan.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

# There is no `from __future__ import annotations`: TorchScript has to read those of the named tuples.
from abc import abstractmethod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.backend import Kernels
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.mixer import (
    NUM_WEIGHTS,
    DirectionStart,
    DirectionWeights,
    check_mixer,
    is_trained,
    one_direction,
    scan_parameters,
)
from vimtune.ops.operation import check_inputs, operation, run


class StartInputs(NamedTuple):
    """Tensors of a mixer whose directions begin with a state. All are contiguous in kernels."""

    xz: Tensor
    """(B, L, 2 E)"""
    directions: tuple[DirectionWeights, DirectionWeights]
    """Weights of the forward and of the reverse direction."""
    starts: tuple[DirectionStart, DirectionStart]
    """What each direction begins with."""


class StartKernels(Kernels[StartInputs]):
    """Kernels of the inside of a mixer with both directions that begin with a state; inputs are never
    empty."""

    operation = "bidirectional_scan_from"

    @abstractmethod
    def forward(self, inputs: StartInputs) -> Tensor:
        """The gated average of the directions (B, L, E) in the dtype of `xz`."""


def bidirectional_scan_from(
    xz: Tensor,
    forward: DirectionWeights,
    reverse: DirectionWeights,
    forward_start: DirectionStart,
    reverse_start: DirectionStart,
    backend: str = "auto",
) -> Tensor:
    """What `bidirectional_scan` computes, where each direction begins with a state and a convolution tail.

    Args:
        xz: the output of in_proj, (B, L, 2 E).
        forward: weights of the forward direction.
        reverse: weights of the reverse direction.
        forward_start: what stands before the first token.
        reverse_start: what stands behind the last token, which the reverse direction visits first.
        backend: see `vimtune.ops`.

    Returns:
        The gated average of the directions (B, L, E) in the dtype of `xz`.

    Raises:
        ValueError, BackendUnavailable, NotImplementedError: as `bidirectional_scan`.
    """
    if not torch.jit.is_scripting():
        _check(xz, forward, reverse, forward_start, reverse_start)
        tensors = (xz, *forward, *reverse, *forward_start, *reverse_start)
        if not is_trained(*tensors):
            inputs = StartInputs(xz, (forward, reverse), (forward_start, reverse_start))
            name = find_backend(StartKernels, backend, xz.device, inputs)
            if name:
                result: Tensor = run("bidirectional_scan_from", *tensors, name)
                return result
    x, z = xz.chunk(2, dim=-1)
    ahead = one_direction(x, z, forward, False, backend, forward_start)
    back = one_direction(x, z, reverse, True, backend, reverse_start)
    return (ahead + back) / 2


@torch.no_grad()
def start_behind(tokens: Tensor, weights: DirectionWeights, start: DirectionStart) -> DirectionStart:
    """What a direction begins with where the first tokens that it visits are left away.

    With it a direction computes for the other tokens what it would compute behind these. It is found by the
    definitions of the operations, in fp64 where the device has it.

    Args:
        tokens: what the convolution is given for these tokens, (n, E), in the order in which the direction
            visits them. They are the same for all samples.
        weights: those of the direction.
        start: what it begins with before these tokens.

    Returns:
        State (E, N) and tail (E, K - 1) in the dtypes of `start`.
    """
    wide = torch.float32 if tokens.device.type == "mps" else torch.float64
    exact = DirectionWeights(*(None if weight is None else weight.to(wide) for weight in weights))  # type: ignore[arg-type]
    count = start.tail.shape[1]
    inputs = torch.cat([start.tail.to(wide).t(), tokens.to(wide)])
    u = reference.causal_conv1d(inputs[None], exact.conv_weight, exact.conv_bias, True)[:, count:]
    delta, A, B, C = scan_parameters(u, exact)
    _, state = reference.stateful_scan(
        u,
        delta,
        A,
        B,
        C,
        delta_bias=exact.dt_bias,
        delta_softplus=True,
        state=start.state[None].to(wide),
    )
    tail = inputs[len(inputs) - count :].t()
    return DirectionStart(state[0].to(start.state.dtype), tail.to(start.tail.dtype))


def _check(
    xz: Tensor,
    forward: DirectionWeights,
    reverse: DirectionWeights,
    forward_start: DirectionStart,
    reverse_start: DirectionStart,
) -> None:
    """Raise ValueError for tensors that do not fit together."""
    check_mixer(xz, forward, reverse)
    if torch.jit.is_tracing():
        return  # As in `check_mixer`, sizes are tensors there.
    inner, width = forward.conv_weight.shape
    for label, start in (("forward ", forward_start), ("reverse ", reverse_start)):
        check_inputs(
            xz.device,
            label,
            state=(start.state, tuple(forward.A_log.shape)),
            tail=(start.tail, (inner, width - 1)),
        )


# torch.library reads the annotations at run time, hence Optional.


@operation("bidirectional_scan_from")
def _scan_from(
    xz: Tensor,
    conv_weight0: Tensor,
    conv_bias0: Optional[Tensor],  # noqa: UP045
    x_proj0: Tensor,
    dt_proj0: Tensor,
    dt_bias0: Tensor,
    A_log0: Tensor,
    D0: Tensor,
    offset0: Optional[Tensor],  # noqa: UP045
    conv_weight1: Tensor,
    conv_bias1: Optional[Tensor],  # noqa: UP045
    x_proj1: Tensor,
    dt_proj1: Tensor,
    dt_bias1: Tensor,
    A_log1: Tensor,
    D1: Tensor,
    offset1: Optional[Tensor],  # noqa: UP045
    state0: Tensor,
    tail0: Tensor,
    state1: Tensor,
    tail1: Tensor,
    backend: str,
) -> Tensor:
    """The result."""
    forward = conv_weight0, conv_bias0, x_proj0, dt_proj0, dt_bias0, A_log0, D0, offset0
    reverse = conv_weight1, conv_bias1, x_proj1, dt_proj1, dt_bias1, A_log1, D1, offset1
    inputs = _inputs(*_contiguous(xz, *forward, *reverse, state0, tail0, state1, tail1))
    if xz.numel() == 0:
        return xz.new_empty((*xz.shape[:2], xz.shape[2] // 2))
    return find_kernels(StartKernels, backend, xz.device, inputs)[1].forward(inputs)


@_scan_from.register_fake
def _(xz: Tensor, *arguments: Any) -> Tensor:
    batch, tokens, twice = xz.shape
    return xz.new_empty((batch, tokens, twice // 2))


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """All tensors as kernels take them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _inputs(xz: Tensor, *tensors: Any) -> StartInputs:
    """The inputs out of one list of tensors, in the order of the operation's arguments."""
    weights, starts = tensors[: 2 * NUM_WEIGHTS], tensors[2 * NUM_WEIGHTS :]
    return StartInputs(
        xz,
        (DirectionWeights(*weights[:NUM_WEIGHTS]), DirectionWeights(*weights[NUM_WEIGHTS:])),
        (DirectionStart(*starts[:2]), DirectionStart(*starts[2:])),
    )
