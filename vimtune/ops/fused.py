"""The whole inside of the Vim mixer as one differentiable operation, where a backend has kernels for it.

Between `in_proj` and `out_proj` a mixer runs, in both directions, a convolution, two small projections
and the scan, and averages the gated results. As one operation this reads and writes a fraction of the
memory; gradients of weights nobody trains are never computed, and with all of them frozen only
d(xz) remains.

Shape letters: B batch, L tokens, E inner width, N states, R dt rank, K filter width.
"""

# No `from __future__ import annotations`: TorchScript has to read those of DirectionWeights.
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from vimtune.ops.dispatch import REFERENCE, chosen_backend, resolve_backend
from vimtune.ops.operation import check_inputs, one_by_one, operation

NUM_WEIGHTS = 7  # per direction


class DirectionWeights(NamedTuple):
    """Weights of one direction: conv_weight (E, K), conv_bias (E,) or None, x_proj (R + 2 N, E) with rows
    dt | B | C, dt_proj (E, R), dt_bias (E,), A_log (E, N), D (E,)."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor


def has_bidirectional_scan(backend: str, device: str) -> bool:
    """Whether `bidirectional_scan` can run with this backend name on this device (e.g. "cuda:0")."""
    return fused_backend(backend, device) != ""


def fused_backend(backend: str, device: str) -> str:
    """Backend with fused kernels that a backend name means on a device; empty if it has none."""
    # The compiler sees what has been chosen, and compiles anew after another choice.
    return _fused_backend(chosen_backend(backend), device)


@torch.compiler.assume_constant_result
def _fused_backend(chosen: str, device: str) -> str:
    if chosen == REFERENCE:
        return ""
    found = resolve_backend(chosen, torch.device(device))
    return found.name if found.has_fused_kernels else ""


def bidirectional_scan(
    xz: Tensor, forward: DirectionWeights, reverse: DirectionWeights, backend: str = "auto"
) -> Tensor:
    """Average of both directions' gated scans: `xz` (B, L, 2 E), the output of in_proj, to (B, L, E).

    Computes, for u = SiLU(conv(x)) and (dt, B, C) = x_proj(u),
    (scan(u, softplus(dt_proj(dt))) + the same from the last token to the first) / 2 * SiLU(z).
    The output has the dtype of `xz`; state, time steps, B and C are fp32. B and L may be 0.

    Raises:
        ValueError: shapes or devices that do not fit together, tensors that are not of floating point
            numbers, or a backend without these kernels.
        NotImplementedError: derivatives other than those of autograd's backward pass; a mixer has them with
            the backend "reference", where it does without this operation.
    """
    chosen = fused_backend(backend, str(xz.device))
    if not chosen:
        raise ValueError(f"backend {backend!r} has no kernels for bidirectional_scan on {xz.device}")
    if xz.dim() != 3 or xz.shape[-1] % 2:
        raise ValueError(f"xz must be (B, L, 2 E), got {tuple(xz.shape)}")
    inner, width = xz.shape[-1] // 2, forward.conv_weight.shape[1]
    states, rank = forward.A_log.shape[1], forward.dt_proj.shape[1]
    check_inputs(xz.device, xz=(xz, xz.shape))
    for label, weights in (("forward ", forward), ("reverse ", reverse)):
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
        )
    save = _is_trained(xz, *forward, *reverse)
    return torch.ops.vimtune.bidirectional_scan(xz, *forward, *reverse, save, chosen)[0]


def _is_trained(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass: a linear probe's backbone keeps nothing for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# torch.library reads the annotations at run time, hence Optional.


@operation("bidirectional_scan")
def _scan(
    xz: Tensor,
    conv_weight0: Tensor,
    conv_bias0: Optional[Tensor],  # noqa: UP045
    x_proj0: Tensor,
    dt_proj0: Tensor,
    dt_bias0: Tensor,
    A_log0: Tensor,
    D0: Tensor,
    conv_weight1: Tensor,
    conv_bias1: Optional[Tensor],  # noqa: UP045
    x_proj1: Tensor,
    dt_proj1: Tensor,
    dt_bias1: Tensor,
    A_log1: Tensor,
    D1: Tensor,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _by_direction(
        [
            *(conv_weight0, conv_bias0, x_proj0, dt_proj0, dt_bias0, A_log0, D0),
            *(conv_weight1, conv_bias1, x_proj1, dt_proj1, dt_bias1, A_log1, D1),
        ]
    )
    kernels = _kernels(backend, xz, weights[0])
    if xz.numel() == 0:
        return _empty_results(kernels, xz, weights[0], save)
    return kernels.forward(xz.contiguous(), weights, save)


@_scan.register_fake
def _(xz, *rest):
    *weights, save, backend = rest
    head = DirectionWeights(*weights[:NUM_WEIGHTS])
    return _empty_results(_kernels(backend, xz, head), xz, head, save)


def _empty_results(
    kernels: ModuleType, xz: Tensor, weights: DirectionWeights, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    projections, states = kernels.shapes(xz, weights, save)
    batch, tokens, twice = xz.shape
    return (
        xz.new_empty((batch, tokens, twice // 2)),
        xz.new_empty(projections),
        xz.new_empty(states, dtype=torch.float32),
    )


@operation("bidirectional_scan_backward")
def _scan_backward(
    grad: Tensor,
    xz: Tensor,
    out: Tensor,
    projections: Tensor,
    states: Tensor,
    weights: list[Optional[Tensor]],  # noqa: UP045
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    if xz.numel() == 0:
        return [gradient.zero_() for gradient in _fake_gradients(xz, weights, needs)]
    wanted = needs[1:]
    halves = [wanted[:NUM_WEIGHTS], wanted[NUM_WEIGHTS:]]
    directions = _by_direction(weights)
    grad_xz, found = _kernels(backend, xz, directions[0]).backward(
        grad.to(xz.dtype).contiguous(),
        xz.contiguous(),
        (out, projections, states),
        directions,
        needs[0],
        halves,
    )
    flat = [grad_xz, *found[0], *found[1]]
    return [xz.new_empty(0) if gradient is None else gradient for gradient in flat]


@_scan_backward.register_fake
def _(grad, xz, out, projections, states, weights, needs, backend):
    return _fake_gradients(xz, weights, needs)


def _fake_gradients(xz: Tensor, weights: Sequence[Tensor | None], needs: list[bool]) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape) if needed and tensor is not None else xz.new_empty(0)
        for tensor, needed in zip([xz, *weights], needs, strict=True)
    ]


def _setup(ctx, inputs, output) -> None:
    *tensors, save, ctx.backend = inputs
    if not save:
        raise RuntimeError("bidirectional_scan was called without saved states but needs a gradient")
    ctx.save_for_backward(*output, *tensors)  # the first is out_proj's input, which is mostly kept anyway
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # or else they get gradients of zeros


def _autograd(ctx, grad, _grad_projections, _grad_states):
    out, projections, states, xz, *weights = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: 1 + 2 * NUM_WEIGHTS])
    gradients = torch.ops.vimtune.bidirectional_scan_backward(
        grad, xz, out, projections, states, weights, needs, ctx.backend
    )
    return *(value if needed else None for value, needed in zip(gradients, needs, strict=True)), None, None


_scan.register_autograd(_autograd, setup_context=_setup)


@_scan.register_vmap
def _(info, in_dims, *inputs):
    *tensors, _save, backend = inputs  # above, vmap has hidden whether gradients are wanted
    return one_by_one(_scan, info.batch_size, in_dims, (*tensors, _is_trained(*tensors), backend))


def _by_direction(weights: list[Tensor | None]) -> list[DirectionWeights]:
    flat: list[Any] = [None if weight is None else weight.contiguous() for weight in weights]
    return [DirectionWeights(*flat[:NUM_WEIGHTS]), DirectionWeights(*flat[NUM_WEIGHTS:])]


def _kernels(backend: str, xz: Tensor, weights: DirectionWeights) -> ModuleType:
    """The module that runs the operation; `nvrtc` leaves to Triton what it does not cover."""
    if backend == "nvrtc":
        from vimtune.ops.nvrtc import mixer as native

        if native.covers(xz, weights):
            return native
    from vimtune.ops.triton import mixer

    return mixer
