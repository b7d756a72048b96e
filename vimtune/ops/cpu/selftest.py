"""A small numeric check of freshly loaded kernels: a miscompiled library must refuse, not lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.cpu.build import BuildError
from vimtune.ops.cpu.library import ConvInputs, Kernels, ScanInputs, empty
from vimtune.ops.dispatch import ScanOptions

TOLERANCE = 1e-4


def check_kernels(kernels: Kernels) -> None:
    """Compare every kernel with the fp64 reference on inputs of odd sizes.

    Raises:
        BuildError: some output or gradient differs.
    """
    # Kernels may be loaded in the middle of a torch.compile trace, under inference mode or a default
    # device; all of these belong to a thread, and a new one is free of them.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_check, kernels).result()


def _check(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    tokens, inner, states, width = kernels.chunk + 3, 21, 5, 4
    grad = normal(1, tokens, inner)
    scan = ScanInputs(
        normal(1, tokens, inner),
        normal(1, tokens, inner),
        -normal(inner, states).exp(),
        normal(1, tokens, states),
        normal(1, tokens, states),
        normal(inner),
        normal(1, tokens, inner),
        normal(inner),
    )
    conv = ConvInputs(normal(1, tokens, inner), normal(inner, width), normal(inner))
    for reverse in (False, True):
        options = ScanOptions(delta_softplus=True, reverse=reverse)
        saved = empty((2, 1, states, inner))
        out = kernels.scan_forward(scan, options, saved)
        gradients = kernels.scan_backward(grad, saved, scan, options, [True] * len(scan))
        expected = _expected(reference.selective_scan, scan, grad, delta_softplus=True, reverse=reverse)
        _compare("scan", [out, *gradients], expected)

        out = kernels.conv_forward(conv, True, reverse)
        gradients = kernels.conv_backward(grad, conv, True, reverse, [True] * len(conv))
        expected = _expected(reference.causal_conv1d, conv, grad, silu=True, reverse=reverse)
        _compare("convolution", [out, *gradients], expected)


def _expected(
    function: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor, **options: bool
) -> list[Tensor]:
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def _compare(what: str, results: Sequence[Any], expected: list[Tensor]) -> None:
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        error = ((result - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE:
            output = "the output" if index == 0 else f"gradient {index}"
            raise BuildError(
                f"the compiled library computes wrong numbers ({what}: {output} is off by {error:.1e})"
            )
