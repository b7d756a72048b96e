"""What the kernels of Memba's membranes keep: nothing but their result, whose zeros tell which have fired.

Their values and gradients are compared with the definition in test_operations.py. Triton's kernels need a
GPU, or TRITON_INTERPRET=1 set before Python starts.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_checks import AUTOGRAD_OPCHECKS, OPCHECKS

from vimtune import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"first": 1, "width": 2, "chunks": 2, "length": 1, "tau": 0.5, "threshold": 1.0}

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1 set before Python starts",
)


def normal(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_that_is_a_membrane_is_none_that_has_fired(dtype):
    """Gradients pass 0.0, -0.0 and what cancels the membrane before; where one has fired none passes."""
    z = torch.tensor([[0.0, -0.0], [5.0, 1.0], [-0.0, -0.5], [0.0, 5.0]], dtype=dtype, device=DEVICE)
    x = torch.cat([torch.full_like(z[:, :1], -0.0), z], 1)[None].requires_grad_()
    result, mean = ops.membrane(x, None, **OPTIONS, backend="triton")
    expected = z.new_tensor([[0.0, 0.0], [0.0, 1.0], [0.0, -0.5], [0.0, 0.0]])
    assert torch.equal(result[0, :, 1:], expected)
    assert torch.equal(torch.signbit(result[0, :, 1:]) & (expected == 0), z > 1)
    assert torch.signbit(result[0, :, 0]).all()  # no gate, and as it was
    assert torch.equal(mean, result[..., 1:].unflatten(1, (2, 2)).mean(1))
    (grad,) = torch.autograd.grad(result.sum(), x)
    passed = z.new_tensor([[1.5, 1.5], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert torch.equal(grad[0], torch.cat([torch.ones_like(z[:, :1]), passed], 1))


def test_only_the_result_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result, _ = ops.membrane(normal(2, 9, 6), None, **OPTIONS, backend="triton")
    assert {tensor.data_ptr() for tensor in kept} == {result.data_ptr()}


def test_the_mean_alone_has_gradients():
    x, start = normal(2, 9, 6), normal(2, 4, 2)
    found, expected = (
        torch.autograd.grad(ops.membrane(x, start, **OPTIONS, backend=backend)[1].square().sum(), [x, start])
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("chunks", [2, None])
def test_operations_are_registered_rightly(tokens, chunks):
    options = [1, 2, chunks, 4, 0.9, 0.5, "triton"]
    start = normal(2, min(4, tokens) if chunks is None else tokens // 2, 2)
    x = normal(2, tokens, 6)
    torch.library.opcheck(torch.ops.vimtune.membrane, (x, start, *options), test_utils=AUTOGRAD_OPCHECKS)
    mean = None if chunks is None else start.detach()
    arguments = (x.detach(), mean, x.detach(), *options, [True, True])
    torch.library.opcheck(torch.ops.vimtune.membrane_backward, arguments, test_utils=OPCHECKS)
