"""What the membranes of Memba keep for the backward pass: nothing but their result, whose zeros tell it all.

Their values and gradients are compared with the definition in test_operations.py.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import AUTOGRAD_OPCHECKS, OPCHECKS

from vimtune import ops

OPTIONS = {"first": 1, "width": 2, "chunks": 2, "length": 1, "tau": 0.5, "threshold": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_that_is_a_membrane_is_none_that_has_fired(dtype):
    """Gradients pass 0.0, -0.0 and what cancels the membrane before; where one has fired none passes."""
    z = torch.tensor([[0.0, -0.0], [5.0, 1.0], [-0.0, -0.5], [0.0, 5.0]], dtype=dtype)
    x = torch.cat([torch.full((4, 1), -0.0, dtype=dtype), z], 1)[None].requires_grad_()
    result, mean = ops.membrane(x, None, **OPTIONS)
    expected = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, -0.5], [0.0, 0.0]], dtype=dtype)
    assert torch.equal(result[0, :, 1:], expected)
    assert torch.equal(torch.signbit(result[0, :, 1:]) & (expected == 0), z > 1)
    assert torch.signbit(result[0, :, 0]).all()  # no gate, and as it was
    assert torch.equal(mean, result[..., 1:].unflatten(1, (2, 2)).mean(1))
    (grad,) = torch.autograd.grad(result.sum(), x)
    passed = torch.tensor([[1.5, 1.5], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=dtype)
    assert torch.equal(grad[0], torch.cat([torch.ones(4, 1, dtype=dtype), passed], 1))


def test_only_the_result_is_kept():
    kept = []
    x = torch.randn(2, 9, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result, _ = ops.membrane(x, None, **OPTIONS)
    assert {tensor.data_ptr() for tensor in kept} == {result.data_ptr()}


def test_the_mean_alone_has_gradients():
    x, start = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 4, 2, requires_grad=True)
    found, expected = (
        torch.autograd.grad(ops.membrane(x, start, **OPTIONS, backend=backend)[1].square().sum(), [x, start])
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("chunks", [2, None])
def test_operations_are_registered_rightly(tokens, chunks):
    options = [1, 2, chunks, 4, 0.9, 0.5, "torch"]
    start = None if chunks is None else torch.randn(2, tokens // 2, 2, requires_grad=True)
    x = torch.randn(2, tokens, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.vimtune.membrane, (x, start, *options), test_utils=AUTOGRAD_OPCHECKS)
    mean = None if start is None else start.detach()
    arguments = (x.detach(), mean, x.detach(), *options, [True, chunks is not None])
    torch.library.opcheck(torch.ops.vimtune.membrane_backward, arguments, test_utils=OPCHECKS)
