"""The inside of Mamba-2's mixer as one operation, `ssd_mixer`: convolution, scan and gated norm.

It keeps nothing for the backward pass but its inputs, which are the output of in_proj and the weights. That
pass computes everything in between once more, and the scan's forward pass leaves to its backward pass what
both need.

Shape letters: B batch, L tokens, H heads of width P, E = H P inner width, G groups of heads that share B and
C, N states, F = E + 2 G N channels of the convolution, K filter width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.backends import REFERENCE
from vimtune.ops.backend import Gradients
from vimtune.ops.convolution import ConvInputs, ConvKernels, causal_conv1d
from vimtune.ops.dispatch import chosen_backend, find_backend, find_kernels
from vimtune.ops.gated_norm import GatedNormInputs, find_norm, gated_rms_norm, norm_gradients
from vimtune.ops.operation import (
    as_list,
    as_optional,
    check_inputs,
    fake_gradients,
    operation,
    run,
    wanted,
    zero_gradients,
)
from vimtune.ops.ssd import (
    NO_LIMIT,
    PLAIN,
    SsdInputs,
    SsdKernels,
    SsdOptions,
    ssd,
    time_step_gradients,
    time_steps,
)

AS_GIVEN = SsdOptions(False, NO_LIMIT)
"""The scan takes time steps as they are: a mixer has computed them, and masked tokens have 0."""


class SsdWeights(NamedTuple):
    """The weights of a mixer between its projections, in the order of their gradients."""

    conv_weight: Tensor
    """(F, K)"""
    conv_bias: Tensor | None
    """(F,)"""
    dt_bias: Tensor
    """(H,)"""
    A_log: Tensor
    """(H,)"""
    D: Tensor
    """(H,)"""
    norm_weight: Tensor
    """(E,)"""


class SsdMixerOptions(NamedTuple):
    """What a mixer is told beside its tensors."""

    groups: int
    """G, which divides H."""
    norm_groups: int
    """Groups of channels that the norm is of, each by itself."""
    eps: float
    """Added to the mean squares of the norm."""
    lowest: float
    """The least that time steps are; those of masked tokens are 0 all the same."""
    highest: float
    """The most that they are."""

    @property
    def time_steps(self) -> SsdOptions:
        """How time steps are computed."""
        return SsdOptions(True, (self.lowest, self.highest))


class SsdBackends(NamedTuple):
    """Names of the backends that compute the parts of a mixer."""

    convolution: str
    """That of `causal_conv1d`."""
    scan: str
    """That of `ssd`."""
    norm: str
    """That of `gated_rms_norm`."""


def ssd_mixer(
    projected: Tensor,
    weights: SsdWeights,
    options: SsdMixerOptions,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The inside of Mamba-2's mixer (Dao & Gu 2024, arXiv 2405.21060, section 7), from in_proj to out_proj.

        z, xBC, dt = projected
        x, B, C    = SiLU(conv(xBC))
        y          = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
        out        = gated_rms_norm(y, z)

    Args:
        projected: the output of in_proj with its columns z | x | B | C | dt, (B, L, 2 E + 2 G N + H).
        weights: what lies between the projections.
        options: sizes that shapes do not tell, and limits.
        mask: (B, L, 1), False at padding, which reaches no other token; None if there is none.
        backend: that of convolution and scan, see `vimtune.ops`.

    Returns:
        The input of out_proj, (B, L, E), in the dtype of `projected`.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or an unknown backend.
        BackendUnavailable: `backend` names one that cannot run here.
        NotImplementedError: derivatives other than those of autograd's backward pass, which only
            `backend="reference"` has.
    """
    _check(projected, weights, options)
    if chosen_backend(backend) == REFERENCE:
        return composed(projected, weights, options, mask, SsdBackends(REFERENCE, REFERENCE, REFERENCE))
    # Both by their own names: the backward pass may run in another thread, or after another choice.
    z, xBC, dt = split_projected(projected, weights)
    convolution = ConvInputs(xBC, weights.conv_weight, weights.conv_bias)
    x, B, C = split_convolved(xBC, weights, options)
    scan = SsdInputs(x, dt, weights.A_log, B, C, weights.D)
    backends = SsdBackends(
        find_backend(ConvKernels, backend, projected.device, convolution) or backend,
        find_backend(SsdKernels, backend, projected.device, scan) or PLAIN,
        find_norm(backend, GatedNormInputs(x.flatten(2), z, weights.norm_weight)),
    )
    result: Tensor = run("ssd_mixer", projected, *weights, mask, *options, *backends)
    return result


def composed(
    projected: Tensor,
    weights: SsdWeights,
    options: SsdMixerOptions,
    mask: Tensor | None,
    backends: SsdBackends,
) -> Tensor:
    """What `ssd_mixer` computes, by the operations that it consists of; its definition."""
    z, xBC, dt = split_projected(projected, weights)
    taps = weights.conv_weight, weights.conv_bias
    convolved = causal_conv1d(masked(xBC, mask), *taps, silu=True, backend=backends.convolution)
    inputs, how = forward_inputs(masked(convolved, mask), dt, weights, options, mask)
    y, _ = ssd(*inputs[:-1], *how, backend=backends.scan)
    norm = options.norm_groups, options.eps, backends.norm
    return gated_rms_norm(y.flatten(2), z, weights.norm_weight, *norm)


def split_projected(projected: Tensor, weights: SsdWeights) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, L, E), xBC (B, L, F) and dt (B, L, H), views of the output of in_proj."""
    sizes = [len(weights.norm_weight), len(weights.conv_weight), len(weights.A_log)]
    z, xBC, dt = projected.split(sizes, dim=-1)
    return z, xBC, dt


def split_convolved(
    convolved: Tensor, weights: SsdWeights, options: SsdMixerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P), B and C (B, L, G, N), views of xBC."""
    inner = len(weights.norm_weight)
    states = (convolved.shape[-1] - inner) // 2
    x, B, C = convolved.split([inner, states, states], dim=-1)
    B, C = (part.unflatten(-1, (options.groups, -1)) for part in (B, C))
    return x.unflatten(-1, (len(weights.A_log), -1)), B, C


def scan_inputs(
    convolved: Tensor, dt: Tensor, weights: SsdWeights, options: SsdMixerOptions, mask: Tensor | None
) -> SsdInputs:
    """What the scan is of: parts of the convolved xBC (B, L, F), and time steps from `dt` (B, L, H)."""
    x, B, C = split_convolved(convolved, weights, options)
    wide = torch.promote_types(dt.dtype, torch.float32)
    steps = masked(time_steps(dt.to(wide), weights.dt_bias, options.time_steps), mask)
    return SsdInputs(x, steps, -weights.A_log.to(wide).exp(), B, C, weights.D)


def forward_inputs(
    convolved: Tensor, dt: Tensor, weights: SsdWeights, options: SsdMixerOptions, mask: Tensor | None
) -> tuple[SsdInputs, SsdOptions]:
    """What the scan of a forward pass is of, and how it gets its time steps.

    Its kernels compute them on the way, where there is no padding whose time steps have to be 0.
    """
    if mask is not None:
        return scan_inputs(convolved, dt, weights, options, mask), AS_GIVEN
    x, B, C = split_convolved(convolved, weights, options)
    A = -weights.A_log.to(torch.promote_types(dt.dtype, torch.float32)).exp()
    return SsdInputs(x, dt, A, B, C, weights.D, weights.dt_bias), options.time_steps


def masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The tensor with 0 at padding."""
    return tensor if mask is None else tensor * mask


def _check(projected: Tensor, weights: SsdWeights, options: SsdMixerOptions) -> None:
    """Raise ValueError for tensors that do not fit together."""
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = weights
    if projected.dim() != 3 or conv_weight.dim() != 2 or A_log.dim() != 1 or norm_weight.dim() != 1:
        raise ValueError(
            "projected must be (B, L, 2 E + 2 G N + H), conv_weight (F, K), A_log (H,) and norm_weight (E,); "
            "got "
            + ", ".join(str(tuple(tensor.shape)) for tensor in (projected, conv_weight, A_log, norm_weight))
        )
    (inner,), (heads,), (channels, width) = norm_weight.shape, A_log.shape, conv_weight.shape
    groups, norm_groups = options.groups, options.norm_groups
    fits = channels > inner and (channels - inner) % (2 * groups) == 0 and heads % groups == 0
    if not fits or inner % heads or inner % norm_groups:
        raise ValueError(
            f"{inner} channels of {heads} heads, {channels} of the convolution and {groups} groups "
            f"({norm_groups} of the norm) do not fit together: H must divide E, G must divide H, 2 G must "
            "divide F - E"
        )
    batch, tokens, _ = projected.shape
    check_inputs(
        projected.device,
        projected=(projected, (batch, tokens, inner + channels + heads)),
        conv_weight=(conv_weight, (channels, width)),
        conv_bias=(conv_bias, (channels,)),
        dt_bias=(dt_bias, (heads,)),
        A_log=(A_log, (heads,)),
        D=(D, (heads,)),
        norm_weight=(norm_weight, (inner,)),
    )


def _gradients(
    grad: Tensor,
    projected: Tensor,
    weights: SsdWeights,
    options: SsdMixerOptions,
    mask: Tensor | None,
    backends: SsdBackends,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of `projected` and the weights, of which those that are not needed may be anything."""
    conv_weight, conv_bias, dt_bias, _, _, _ = weights
    z, xBC, dt = split_projected(projected, weights)
    xBC = masked(xBC, mask)
    convolved = causal_conv1d(xBC, conv_weight, conv_bias, silu=True, backend=backends.convolution)
    inputs = scan_inputs(masked(convolved, mask), dt, weights, options, mask)
    del convolved
    scanned, grad_z, grad_norm = _scan_gradients(grad, z, inputs, weights, options, backends, needs[5:])
    grad_x, grad_steps, grad_A, grad_B, grad_C, grad_D, _, _ = scanned
    assert grad_x is not None and grad_steps is not None and grad_A is not None
    assert grad_B is not None and grad_C is not None
    parts = torch.cat([part.flatten(2) for part in (grad_x, grad_B, grad_C)], dim=-1)
    A = inputs.A
    del inputs, scanned, grad_x
    of_convolution = True, False, backends.convolution, [True, *needs[1:3]]
    grad_xBC, grad_taps, grad_bias = run(
        "causal_conv1d_backward", masked(parts, mask), xBC, conv_weight, conv_bias, *of_convolution
    )
    grad_dt = time_step_gradients(
        masked(grad_steps, mask), dt.to(grad_steps.dtype), dt_bias, options.time_steps
    )
    columns = torch.cat([grad_z, masked(grad_xBC, mask), grad_dt.to(projected.dtype)], dim=-1)
    return [columns, grad_taps, grad_bias, grad_dt.sum((0, 1)), grad_A * A, grad_D, grad_norm]


def _scan_gradients(
    grad: Tensor,
    z: Tensor,
    inputs: SsdInputs,
    weights: SsdWeights,
    options: SsdMixerOptions,
    backends: SsdBackends,
    needs: Sequence[bool],
) -> tuple[Gradients, Tensor, Tensor | None]:
    """Gradients of the scan's inputs, of z and of the norm's weight, from that of the result.

    Those of D and of the norm's weight are computed if they are needed, which `needs` says in this order.

    What the scan leaves from its forward to its backward pass is the largest part of the memory that a
    backward pass needs. It is given back here, before the convolution takes its own.
    """
    _, kernels = find_kernels(SsdKernels, backends.scan, z.device, inputs)
    y, _, kept = kernels.forward(inputs, AS_GIVEN)
    need_D, need_norm = needs
    of_norm = GatedNormInputs(y.flatten(2), z, weights.norm_weight)
    grad_y, grad_z, grad_norm = norm_gradients(
        grad, of_norm, options.norm_groups, options.eps, need_norm, backends.norm
    )
    assert grad_y is not None and grad_z is not None
    wanted_of_scan = [*[True] * 5, need_D, False, False]
    found = kernels.backward(grad_y.view(y.shape), None, kept, inputs, AS_GIVEN, wanted_of_scan)
    return found, grad_z, grad_norm


# About the spelling of annotations see `scan.py`.


@operation("ssd_mixer")
def _ssd_mixer(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],  # noqa: UP045
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    groups: int,
    norm_groups: int,
    eps: float,
    lowest: float,
    highest: float,
    convolution: str,
    scan: str,
    norm: str,
) -> Tensor:
    """The result."""
    weights = SsdWeights(conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if projected.numel() == 0:
        return _empty_result(projected, weights)
    options = SsdMixerOptions(groups, norm_groups, eps, lowest, highest)
    return composed(projected, weights, options, mask, SsdBackends(convolution, scan, norm)).contiguous()


@_ssd_mixer.register_fake
def _(projected: Tensor, *arguments: Any) -> Tensor:
    return _empty_result(projected, SsdWeights(*arguments[: len(SsdWeights._fields)]))


def _empty_result(projected: Tensor, weights: SsdWeights) -> Tensor:
    """A tensor like the result."""
    return projected.new_empty((*projected.shape[:2], len(weights.norm_weight)))


@operation("ssd_mixer_backward")
def _ssd_mixer_backward(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Optional[Tensor],  # noqa: UP045
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    mask: Optional[Tensor],  # noqa: UP045
    groups: int,
    norm_groups: int,
    eps: float,
    lowest: float,
    highest: float,
    convolution: str,
    scan: str,
    norm: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of `projected` and the weights."""
    weights = SsdWeights(conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    tensors = [projected, *weights]
    if projected.numel() == 0:
        return zero_gradients(tensors, needs, projected)
    options = SsdMixerOptions(groups, norm_groups, eps, lowest, highest)
    backends = SsdBackends(convolution, scan, norm)
    with torch.autocast(projected.device.type, enabled=False):
        found = _gradients(grad, projected, weights, options, mask, backends, needs)
    return as_list(wanted(found, tensors, needs), projected)


@_ssd_mixer_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    tensors = arguments[: 1 + len(SsdWeights._fields)]
    return fake_gradients(tensors, arguments[-1], tensors[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save the inputs."""
    count = 2 + len(SsdWeights._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.others = inputs[count:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments; None for the mask and those that are no tensors."""
    needs = list(ctx.needs_input_grad[: 1 + len(SsdWeights._fields)])
    gradients = run("ssd_mixer_backward", grad, *ctx.saved_tensors, *ctx.others, needs)
    return *as_optional(gradients, needs), None, *[None] * len(ctx.others)


_ssd_mixer.register_autograd(_autograd, setup_context=_setup)
