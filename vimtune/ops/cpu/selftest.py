"""A small numeric check of freshly loaded kernels: a miscompiled library must refuse, not lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vimtune.ops import reference
from vimtune.ops.convolution import ConvInputs, ConvOptions
from vimtune.ops.cpu.build import BuildError
from vimtune.ops.cpu.library import Library, empty
from vimtune.ops.scan import NUM_INPUTS, ScanInputs, ScanOptions

TOLERANCE = 1e-4
"""Largest error that is taken for rounding, relative to the largest value."""


def check_library(library: Library) -> None:
    """Compare every kernel with the fp64 reference on inputs of odd sizes.

    Raises:
        BuildError: some output or gradient differs.
    """
    # Library may be loaded in the middle of a torch.compile trace, under inference mode or a default
    # device; all of these belong to a thread, and a new one is free of them.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_check, library).result()


def _check(library: Library) -> None:
    """Compare scan and convolution, in both directions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    tokens, inner, states, width = library.chunk + 3, 21, 5, 4
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
        out, _ = library.scan_forward(scan, options, saved)
        *gradients, _ = library.scan_backward(grad, None, saved, scan, options, [True] * len(scan))
        expected = _expected(
            reference.selective_scan, scan[:NUM_INPUTS], [grad], delta_softplus=True, reverse=reverse
        )
        _compare("scan", [out, *gradients], expected)

        filtering = ConvOptions(silu=True, reverse=reverse)
        out = library.conv_forward(conv, filtering)
        gradients = library.conv_backward(grad, conv, filtering, [True] * len(conv))
        expected = _expected(reference.causal_conv1d, conv, [grad], silu=True, reverse=reverse)
        _compare("convolution", [out, *gradients], expected)

    begun, grad_last = scan._replace(state=normal(1, inner, states)), normal(1, inner, states)
    options = ScanOptions(delta_softplus=True, reverse=False)
    saved = empty((2, 1, states, inner))
    results = library.scan_forward(begun, options, saved)
    gradients = library.scan_backward(grad, grad_last, saved, begun, options, [True] * len(begun))

    def with_state(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = ScanInputs(*tensors)
        return reference.stateful_scan(**named._asdict(), delta_softplus=True)

    expected = _expected(with_state, begun, [grad, grad_last])
    _compare("scan with states", [*results, *gradients], expected)


def _expected(
    function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor], **options: bool
) -> list[Tensor]:
    """Results and gradients of a reference function in fp64; `grads` has one for each result."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    results = function(*leaves, **options)
    results = [results] if isinstance(results, Tensor) else [*results]
    gradients = torch.autograd.grad(results, leaves, [grad.double() for grad in grads])
    return [*(result.detach() for result in results), *gradients]


def _compare(what: str, results: Sequence[Any], expected: list[Tensor]) -> None:
    """Raise BuildError for one of the results and gradients that is not as expected."""
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        error = ((result - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= TOLERANCE:
            output = "the output" if index == 0 else f"gradient {index}"
            raise BuildError(
                f"the compiled library computes wrong numbers ({what}: {output} is off by {error:.1e})"
            )
