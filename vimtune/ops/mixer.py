"""The inside of a mixer as one operation: `bidirectional_scan` is that of Vim, `causal_mixer` of Mamba.

Between `in_proj` and `out_proj` a mixer runs a convolution, two small projections and the gated scan. That of
Vim does so in both directions and averages the results, that of Mamba only from the first token to the last.
As one differentiable operation this reads and writes a fraction of the memory; gradients of weights nobody
trains are never computed, and with all of them frozen only d(xz) remains. Where no backend has kernels for
it, it is composed of the convolution and the scan.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

# There is no `from __future__ import annotations`: TorchScript has to read those of DirectionWeights.
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from vimtune.ops.backend import Kernels
from vimtune.ops.convolution import causal_conv1d, causal_conv1d_behind
from vimtune.ops.dispatch import find_backend, find_kernels
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    one_by_one,
    operation,
    run,
    zero_gradients,
)
from vimtune.ops.scan import selective_scan, selective_scan_from

NUM_WEIGHTS = 8
"""Number of weights of one direction."""


class DirectionWeights(NamedTuple):
    """Weights of one direction: conv_weight (E, K), conv_bias (E,) or None, x_proj (R + 2 N, E) with rows
    dt | B | C, dt_proj (E, R), dt_bias (E,), A_log (E, N), D (E,), offset (E, N) or None, which C reads
    beside the state: it adds C_t offset to the result of token t before the gate."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    offset: Tensor | None = None


class DirectionStart(NamedTuple):
    """What a direction begins with instead of zeros, the same for all samples."""

    state: Tensor
    """That of the scan before its first token, (E, N)."""
    tail: Tensor
    """The inputs of the convolution before its first token, (E, K - 1), in the order of the direction: the
    last one is the neighbour of the first token."""


class MixerInputs(NamedTuple):
    """Tensors of a mixer: the output of `in_proj`, and the weights of its directions. All are contiguous."""

    xz: Tensor
    """(B, L, 2 E)"""
    directions: tuple[DirectionWeights, ...]
    """Weights of the forward direction, and of the reverse one if the mixer has both."""


class MixerKernels(Kernels[MixerInputs]):
    """Kernels of the inside of a mixer with one direction or both. Activations have the dtype of `xz`.

    Inputs are never empty, results are contiguous.
    """

    operation = "bidirectional_scan"

    @abstractmethod
    def shapes(self, inputs: MixerInputs, save: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two tensors that `forward` returns beside the result.

        Batch and tokens may be 0, or symbols of the compiler.
        """

    @abstractmethod
    def forward(self, inputs: MixerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run the directions.

        Returns:
            The gated average of the directions (B, L, E), and two tensors for the backward pass: one in the
            dtype of `xz`, and one in fp32 that is kept only if `save`.
        """

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        inputs: MixerInputs,
        results: tuple[Tensor, Tensor, Tensor],
        need_xz: bool,
        needs: Sequence[Sequence[bool]],
    ) -> tuple[Tensor | None, Sequence[Sequence[Tensor | None]]]:
        """Gradients of `xz` and of the weights of each direction, None where they are not needed.

        Args:
            grad: gradient of the first result, contiguous and in the dtype of `xz`.
            inputs: those of `forward`.
            results: what `forward` has returned with `save`.
            need_xz: whether the gradient of `xz` is wanted.
            needs: for each direction, for each weight, whether its gradient is wanted.
        """


def bidirectional_scan(
    xz: Tensor, forward: DirectionWeights, reverse: DirectionWeights, backend: str = "auto"
) -> Tensor:
    """Average of both directions' gated scans: `xz` (B, L, 2 E), the output of in_proj, to (B, L, E).

    Computes, for u = SiLU(conv(x)) and (dt, B, C) = x_proj(u),
    (scan(u, softplus(dt_proj(dt))) + the same from the last token to the first) / 2 * SiLU(z).
    The output has the dtype of `xz`. In kernels state, time steps, B and C are fp32. B and L may be 0.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only the backend
            "reference" has.
    """
    if not torch.jit.is_scripting():
        check_mixer(xz, forward, reverse)
        name = find_backend(MixerKernels, backend, xz.device, MixerInputs(xz, (forward, reverse)))
        if name:
            save = is_trained(xz, *forward, *reverse)
            result: Tensor = run("bidirectional_scan", xz, *forward, *reverse, save, name)[0]
            return result
    return composed(xz, forward, reverse, backend)


def causal_mixer(xz: Tensor, weights: DirectionWeights, backend: str = "auto") -> Tensor:
    """The gated scan from the first token to the last: `xz` (B, L, 2 E), the output of in_proj, to (B, L, E).

    Computes scan(u, softplus(dt_proj(dt))) * SiLU(z) for u = SiLU(conv(x)) and (dt, B, C) = x_proj(u), which
    is the inside of Mamba's mixer (Gu & Dao 2023, arXiv 2312.00752, section 3.4). Dtypes, empty inputs and
    errors are those of `bidirectional_scan`.
    """
    if not torch.jit.is_scripting():
        check_mixer(xz, weights)
        name = find_backend(MixerKernels, backend, xz.device, MixerInputs(xz, (weights,)))
        if name:
            save = is_trained(xz, *weights)
            result: Tensor = run("causal_mixer", xz, *weights, save, name)[0]
            return result
    x, z = xz.chunk(2, dim=-1)
    return one_direction(x, z, weights, False, backend)


def composed(
    xz: Tensor, forward: DirectionWeights, reverse: DirectionWeights, backend: str = "auto"
) -> Tensor:
    """What `bidirectional_scan` computes, by the operations that it consists of; its definition.

    With the backend "reference" it has no kernels at all. The arguments are those of `bidirectional_scan`.
    """
    x, z = xz.chunk(2, dim=-1)
    gated = one_direction(x, z, forward, False, backend) + one_direction(x, z, reverse, True, backend)
    return gated / 2


def one_direction(
    x: Tensor,
    z: Tensor,
    weights: DirectionWeights,
    reverse: bool,
    backend: str,
    start: Optional[DirectionStart] = None,  # noqa: UP045
) -> Tensor:
    """The gated scan of one direction, `x`, `z` (B, L, E) to (B, L, E); the definition of `causal_mixer`.

    Args:
        x: first half of `xz`.
        z: second half of `xz`.
        weights: those of the direction.
        reverse: whether it goes from the last token to the first.
        backend: that of the operations of which it is composed.
        start: what it begins with; zeros if None.
    """
    if start is None:
        u = causal_conv1d(x, weights.conv_weight, weights.conv_bias, True, reverse, backend)
    else:
        u = causal_conv1d_behind(
            start.tail, x, weights.conv_weight, weights.conv_bias, True, reverse, backend
        )
    delta, A, B, C = scan_parameters(u, weights)
    if start is None:
        gated = selective_scan(u, delta, A, B, C, weights.D, z, weights.dt_bias, True, reverse, backend)
    else:
        gated = selective_scan_from(
            start.state, u, delta, A, B, C, weights.D, z, weights.dt_bias, True, reverse, backend
        )
    offset = weights.offset
    return gated if offset is None else add_offset(gated, C, offset, z)


def add_offset(gated: Tensor, C: Tensor, offset: Tensor, z: Tensor) -> Tensor:
    """What a gated scan gives where C reads an offset beside the state.

    Args:
        gated: the result without it, (B, L, E).
        C: (B, L, N).
        offset: (E, N).
        z: the gate (B, L, E).
    """
    return torch.addcmul(gated, F.silu(z), F.linear(C, offset.to(C.dtype)))


def offset_refusals(*directions: DirectionWeights) -> list[str]:
    """The reason of kernels that know no offsets, where a direction has one."""
    if all(own.offset is None for own in directions):
        return []
    return ["C reads an offset beside the state, which the kernels do not know"]


def scan_parameters(u: Tensor, weights: DirectionWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a scan needs of the convolved inputs `u` (B, L, E) and the weights of its direction.

    Returns:
        Time steps before bias and softplus (B, L, E), A (E, N), B and C (B, L, N).
    """
    num_states, rank = weights.A_log.shape[1], weights.dt_proj.shape[1]
    projected = F.linear(u, weights.x_proj.to(u.dtype))
    dt, B, C = torch.split(projected, [rank, num_states, num_states], dim=-1)
    return F.linear(dt, weights.dt_proj.to(dt.dtype)), -torch.exp(weights.A_log), B, C


def check_mixer(xz: Tensor, forward: DirectionWeights, reverse: DirectionWeights | None = None) -> None:
    """Raise ValueError for tensors that do not fit together."""
    if torch.jit.is_tracing():
        return  # Sizes are tensors there, and whatever was asked of them is not asked again.
    if xz.dim() != 3 or xz.shape[-1] % 2:
        raise ValueError(f"xz must be (B, L, 2 E), got {tuple(xz.shape)}")
    inner, width = xz.shape[-1] // 2, forward.conv_weight.shape[1]
    states, rank = forward.A_log.shape[1], forward.dt_proj.shape[1]
    check_inputs(xz.device, xz=(xz, xz.shape))
    labelled = [("", forward)] if reverse is None else [("forward ", forward), ("reverse ", reverse)]
    for label, weights in labelled:
        check_inputs(
            xz.device,
            label,
            conv_weight=(weights.conv_weight, (inner, width)),
            conv_bias=(weights.conv_bias, (inner,)),
            x_proj=(weights.x_proj, (rank + 2 * states, inner)),
            dt_proj=(weights.dt_proj, (inner, rank)),
            dt_bias=(weights.dt_bias, (inner,)),
            A_log=(weights.A_log, (inner, states)),
            D=(weights.D, (inner,)),
            offset=(weights.offset, (inner, states)),
        )


def is_trained(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass: a linear probe's backbone keeps nothing for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# torch.library reads the annotations at run time, hence Optional.


@operation("bidirectional_scan")
def _bidirectional_scan(
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
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward pass needs."""
    forward = conv_weight0, conv_bias0, x_proj0, dt_proj0, dt_bias0, A_log0, D0, offset0
    reverse = conv_weight1, conv_bias1, x_proj1, dt_proj1, dt_bias1, A_log1, D1, offset1
    return _run(xz, [*forward, *reverse], save, backend)


@operation("causal_mixer")
def _causal_mixer(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],  # noqa: UP045
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    offset: Optional[Tensor],  # noqa: UP045
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward pass needs."""
    return _run(xz, [conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, offset], save, backend)


def _run(
    xz: Tensor, weights: Sequence[Tensor | None], save: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What either operation computes."""
    inputs = _contiguous(xz, weights)
    _, kernels = find_kernels(MixerKernels, backend, xz.device, inputs)
    if xz.numel() == 0:
        return _empty_results(kernels, inputs, save)
    return kernels.forward(inputs, save)


def _fake(xz: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors without contents in the place of the results."""
    *weights, save, backend = arguments
    inputs = MixerInputs(xz, _by_direction(weights))
    return _empty_results(find_kernels(MixerKernels, backend, xz.device, inputs)[1], inputs, save)


def _empty_results(kernels: MixerKernels, inputs: MixerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that the kernels return."""
    projections, states = kernels.shapes(inputs, save)
    xz = inputs.xz
    batch, tokens, twice = xz.shape
    return (
        xz.new_empty((batch, tokens, twice // 2)),
        xz.new_empty(projections),
        xz.new_empty(states, dtype=torch.float32),
    )


@operation("mixer_backward")
def _backward(
    grad: Tensor,
    xz: Tensor,
    out: Tensor,
    projections: Tensor,
    states: Tensor,
    weights: list[Optional[Tensor]],  # noqa: UP045
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of `xz` and all weights of one direction or both, from that of the result."""
    if xz.numel() == 0:
        return zero_gradients([xz, *weights], needs, xz)
    need_xz, *wanted = needs
    inputs = _contiguous(xz, weights)
    _, kernels = find_kernels(MixerKernels, backend, xz.device, inputs)
    grad_xz, by_direction = kernels.backward(
        grad.to(xz.dtype).contiguous(), inputs, (out, projections, states), need_xz, _of_directions(wanted)
    )
    return as_list([grad_xz, *chain.from_iterable(by_direction)], xz)


@_backward.register_fake
def _(grad: Tensor, xz: Tensor, *arguments: Any) -> list[Tensor]:
    *_results, weights, needs, _backend = arguments
    return fake_gradients([xz, *weights], needs, xz)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what the backward pass needs."""
    *tensors, save, ctx.backend = inputs
    if not save:
        raise RuntimeError("a mixer was called without saved states but needs a gradient")
    ctx.save_for_backward(*output, *tensors)  # The first is out_proj's input, which is mostly kept anyway.
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # Otherwise these two would get gradients of zeros.


def _autograd(
    ctx: Any, grad: Tensor, _grad_projections: None, _grad_states: None
) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for those that are no tensors."""
    out, projections, states, xz, *weights = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: 1 + len(weights)])
    gradients = run("mixer_backward", grad, xz, out, projections, states, weights, needs, ctx.backend)
    return *as_optional(gradients, needs), None, None


def _one_by_one(op: CustomOpDef, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    """The rule for vmap of either operation."""
    *tensors, _save, backend = inputs  # Above, vmap has hidden whether gradients are wanted.
    return one_by_one(op, info.batch_size, in_dims, (*tensors, is_trained(*tensors), backend))


for _operation in (_bidirectional_scan, _causal_mixer):
    _operation.register_fake(_fake)
    _operation.register_autograd(_autograd, setup_context=_setup)
    _operation.register_vmap(partial(_one_by_one, _operation))


def _of_directions(values: Sequence[Any]) -> list[Sequence[Any]]:
    """What belongs to the weights of each direction, out of one list for all of them."""
    return [values[first : first + NUM_WEIGHTS] for first in range(0, len(values), NUM_WEIGHTS)]


def _by_direction(weights: Sequence[Any]) -> tuple[DirectionWeights, ...]:
    """The weights of each direction out of one list."""
    return tuple(DirectionWeights(*own) for own in _of_directions(weights))


def _contiguous(xz: Tensor, weights: Sequence[Tensor | None]) -> MixerInputs:
    """All tensors as kernels take them."""
    flat = [None if weight is None else weight.contiguous() for weight in weights]
    return MixerInputs(xz.contiguous(), _by_direction(flat))
