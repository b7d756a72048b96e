"""Backend `cuda`: the compiled kernels of mamba-ssm and causal-conv1d, where installed and right.

Those kernels want (B, E, L); the protocol is channel-last. The scan therefore transposes on the way in
and out (the convolution takes channel-last views as they are), and the reverse direction flips the
tokens. Offered after a numeric self-test on the device, since the packages are often built for another
torch or card. The scan's extension is probed itself: importing the package `mamba_ssm` pulls in
language-model code that may be missing.

Shape letters: B batch, L tokens, E inner width, N states, K filter width.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.dispatch import Backend, ScanOptions

MAX_STATES = 256
TOLERANCE = 1e-3
"""Relative to the largest value, fp32; the kernels use fast exponentials."""


class CudaBackend(Backend):
    name = "cuda"
    summary = "mamba-ssm and causal-conv1d"

    def refusals(self, device):
        reasons = _import_errors()
        if device.type != "cuda":
            reasons.append(f"device is {device.type}, the kernels need cuda")
        elif not reasons:
            reasons.extend(_self_test(device.index or 0))
        return reasons

    def states_shape(self, batch, tokens, inner, states):
        return (0,)

    def scan_forward(self, u, delta, A, B, C, D, z, delta_bias, options, save_states):
        out, _ = self._scan(u, delta, A, B, C, D, z, delta_bias, options)
        return out, torch.empty(0, dtype=torch.float32, device=u.device)

    def _scan(self, u, delta, A, B, C, D, z, delta_bias, options):
        """Result (B, L, E) and what the backward kernel wants to see again."""
        if A.shape[1] > MAX_STATES:
            raise ValueError(
                f"backend 'cuda' takes up to {MAX_STATES} states, got {A.shape[1]}: use 'triton'"
            )
        columns: list[Any] = [None if x is None else _to_columns(x, options.reverse) for x in (u, delta, z)]
        low = u.dtype
        small = [_to_columns(x.to(low), options.reverse)[:, None] for x in (B, C)]
        vectors: list[Any] = [None if x is None else x.float().contiguous() for x in (A, D, delta_bias)]
        extension = importlib.import_module("selective_scan_cuda")
        out, states, *gated = extension.fwd(
            columns[0], columns[1].to(low), vectors[0], *small, vectors[1],
            None if z is None else columns[2].to(low), vectors[2], options.delta_softplus,
        )  # fmt: skip
        result = gated[0] if z is not None else out
        return _from_columns(result, options.reverse), (columns, small, vectors, states, out)

    def scan_backward(self, grad, states, u, delta, A, B, C, D, z, delta_bias, options, needs):
        _, (columns, small, vectors, chunk_states, out) = self._scan(
            u, delta, A, B, C, D, z, delta_bias, options
        )
        extension = importlib.import_module("selective_scan_cuda")
        low = u.dtype
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, *rest = extension.bwd(
            columns[0], columns[1].to(low), vectors[0], *small, vectors[1],
            None if z is None else columns[2].to(low), vectors[2],
            _to_columns(grad.to(low), options.reverse), chunk_states, None if z is None else out, None,
            options.delta_softplus, False,
        )  # fmt: skip
        found = [
            _from_columns(grad_u, options.reverse),
            _from_columns(grad_delta, options.reverse),
            grad_A,
            _from_columns(grad_B.squeeze(1), options.reverse),
            _from_columns(grad_C.squeeze(1), options.reverse),
            grad_D,
            _from_columns(rest[0], options.reverse) if rest else None,
            grad_bias,
        ]
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        return tuple(
            value.to(tensor.dtype) if needed else None
            for value, tensor, needed in zip(found, inputs, needs, strict=True)
        )

    def conv_forward(self, x, weight, bias, silu, reverse):
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        filters, bias = _half_like(x, weight), None if bias is None else _half_like(x, bias)
        out = functions.causal_conv1d_fwd_function(
            _conv_columns(x, reverse), filters, bias, None, None, None, silu
        )
        return _from_columns(out, reverse)

    def conv_backward(self, grad, x, weight, bias, silu, reverse, needs):
        functions = importlib.import_module("causal_conv1d.cpp_functions")
        filters, low_bias = _half_like(x, weight), None if bias is None else _half_like(x, bias)
        grad_x, grad_weight, grad_bias, _ = functions.causal_conv1d_bwd_function(
            _conv_columns(x, reverse), filters, low_bias, _conv_columns(grad.to(x.dtype), reverse),
            None, None, None, None, False, silu,
        )  # fmt: skip
        found = (_from_columns(grad_x, reverse), grad_weight, grad_bias)
        return tuple(
            value.to(tensor.dtype) if needed else None
            for value, tensor, needed in zip(found, (x, weight, bias), needs, strict=True)
        )


def _half_like(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution wants filter and activations in one dtype."""
    return weight.to(x.dtype).contiguous()


def _conv_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, E, L) in scan order: a view of channel-last rows where they are aligned to 16 bytes."""
    rows = x.flip(1) if reverse else x
    columns = rows.transpose(1, 2)
    return columns if x.shape[2] % 8 == 0 and rows.stride(1) % 8 == 0 else columns.contiguous()


def _to_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, L, E) to contiguous (B, E, L), in scan order."""
    return (x.flip(1) if reverse else x).transpose(1, 2).contiguous()


def _from_columns(x: Tensor, reverse: bool) -> Tensor:
    """(B, E, L) in scan order to (B, L, E), strided."""
    rows = x.transpose(1, 2)
    return rows.flip(1) if reverse else rows


def _import_errors() -> list[str]:
    reasons = []
    for module, package in (("selective_scan_cuda", "mamba-ssm"), ("causal_conv1d", "causal-conv1d")):
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            reasons.append(f"{package} is not usable: {type(error).__name__}: {error}")
    return reasons


@cache
def _self_test(index: int) -> list[str]:
    """Compare both kernels with the reference, forward and backward; reasons against them if they differ."""
    device = torch.device("cuda", index)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch, tokens, inner, states = 2, 21, 16, 16
    scan_inputs: list[Any] = [
        normal(batch, tokens, inner),
        normal(batch, tokens, inner),
        -torch.rand(inner, states, generator=generator).to(device) - 0.1,
        normal(batch, tokens, states),
        normal(batch, tokens, states),
        normal(inner),
        normal(batch, tokens, inner),
        normal(inner),
    ]
    conv_inputs: list[Any] = [normal(batch, tokens, inner), normal(inner, 4), normal(inner)]
    grad = normal(batch, tokens, inner)
    backend: Any = CudaBackend()
    scan: Any = reference.selective_scan
    convolve: Any = reference.causal_conv1d
    options = ScanOptions(delta_softplus=True, reverse=True)
    try:
        out, kept = backend.scan_forward(*scan_inputs, options, True)
        found = [out, *backend.scan_backward(grad, kept, *scan_inputs, options, [True] * 8)]
        expected = _expected(lambda *x: scan(*x, delta_softplus=True, reverse=True), scan_inputs, grad)
        found.append(backend.conv_forward(*conv_inputs, True, True))
        found.extend(backend.conv_backward(grad, *conv_inputs, True, True, [True] * 3))
        expected += _expected(lambda *x: convolve(*x, silu=True, reverse=True), conv_inputs, grad)
    except (RuntimeError, TypeError, AttributeError) as error:  # another version's signature, another card
        return [f"self-test failed: {str(error).splitlines()[0]}"]
    worst = max(
        ((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    )
    return (
        [] if worst <= TOLERANCE else [f"self-test failed: relative error {worst:.1e} against the reference"]
    )


def _expected(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
