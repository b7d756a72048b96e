"""How the kernels of `add_silu_pair` cut their tensors, and how the operation is registered.

Values and gradients are compared with the definition in test_operations.py. Triton's kernels need a GPU, or
TRITON_INTERPRET=1 set before Python starts.
"""

from __future__ import annotations

import os

import pytest
import torch
from kernel_checks import AUTOGRAD_OPCHECKS, OPCHECKS

from vimtune import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1 set before Python starts",
)


def tensors(tokens, width):
    shapes = (2, tokens, width), (2, tokens, width), (width,), (2, tokens, width), (width,)
    return [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in shapes]


def test_several_tiles_and_blocks_of_columns(monkeypatch):
    """29 tokens of two samples in four programs, some with less to do, and 21 columns in three blocks."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from vimtune.ops.triton import silu_pair

    for name, value in (("PARTIAL_PROGRAMS", 4), ("WIDEST", 8), ("NUMBERS", 32)):
        monkeypatch.setattr(silu_pair, name, value)
    leaves = tensors(29, 21)
    results = []
    for backend in ("triton", "reference"):
        total = ops.add_silu_pair(*leaves, 11, backend)
        results.append([total, *torch.autograd.grad(total.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][0][:, 11], leaves[0][:, 11])


@pytest.mark.parametrize("tokens", [0, 9])
def test_operations_are_registered_rightly(tokens):
    x, *pair = tensors(tokens, 6)
    operation, backward = torch.ops.vimtune.add_silu_pair, torch.ops.vimtune.add_silu_pair_backward
    torch.library.opcheck(operation, (x, *pair, 1, "triton"), test_utils=AUTOGRAD_OPCHECKS)
    frozen = [tensor.detach() for tensor in pair]
    for needs in ([True] * 4, [True, False, False, True]):
        arguments = (x.detach(), *frozen, 1, "triton", needs)
        torch.library.opcheck(backward, arguments, test_utils=OPCHECKS)
