"""Inputs at the edge of what operations take, and beyond it, for every operation and backend."""

from __future__ import annotations

import pytest
import torch
from test_transformations import CASES, HAS_TRITON, TRITON_DEVICE, leaves

from vimtune import ops

# Of each operation: the place of a tensor with batch and tokens, and all such tensors.
SEQUENCES = {
    "selective_scan": (0, 1, 3, 4, 6),
    "causal_conv1d": (0,),
    "add_rms_norm": (0, 1),
    "bidirectional_scan": (0,),
}
BY_CASE = [name for name in CASES if name.split()[0] in SEQUENCES]


@pytest.fixture(params=["kernels", "definition"])
def which(request):
    return request.param


def prepared(name, which, request):
    """The function, and its tensors where it runs."""
    kernels, definition, tensors = CASES[name]
    device = "cpu"
    if which == "kernels" and name.endswith("triton"):
        if not HAS_TRITON:
            pytest.skip("needs a GPU, or TRITON_INTERPRET=1 set before Python starts")
        device = TRITON_DEVICE
    if which == "kernels" and name.endswith("nvrtc"):
        request.getfixturevalue("on_cpu")
    return (kernels if which == "kernels" else definition), [tensor.to(device) for tensor in tensors()]


def test_labels_are_where_the_logits_are():
    with pytest.raises(ValueError, match=r"labels must be \(3,\), int64 and on cpu; got .* and meta"):
        ops.token_losses(torch.ones(3, 5), torch.zeros(3, dtype=torch.long, device="meta"))


def test_no_tokens_have_no_losses():
    logits = torch.zeros(0, 5, requires_grad=True)
    out = ops.token_losses(logits, torch.zeros(0, dtype=torch.long))
    assert out.shape == (0,)
    out.sum().backward()
    assert logits.grad.shape == (0, 5)


@pytest.mark.parametrize("name", BY_CASE)
@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_gives_nothing_and_gradients_of_zero(name, which, batch, tokens, dtype, request):
    function, tensors = prepared(name, which, request)
    for place in SEQUENCES[name.split()[0]]:
        tensors[place] = tensors[place].new_zeros(batch, tokens, tensors[place].shape[2], dtype=dtype)
    inputs = leaves(tensors)
    out = function(*inputs)
    wanted = [*tensors[0].shape]
    if name.startswith("bidirectional"):
        wanted[2] //= 2
    if name.startswith("add_rms_norm"):
        wanted[0] *= 2
    assert [*out.shape] == wanted
    out.sum().backward()
    for tensor in inputs:
        assert (
            tensor.grad is not None
            and tensor.grad.shape == tensor.shape
            and tensor.grad.dtype == tensor.dtype
        )
        assert not tensor.grad.any()
    with torch.no_grad():
        assert [*function(*tensors).shape] == wanted


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_numbers_with_a_point(name, dtype, which, request):
    function, tensors = prepared(name, which, request)
    for place, tensor in enumerate(tensors):
        changed = [*tensors[:place], tensor.to(dtype), *tensors[place + 1 :]]
        with pytest.raises(ValueError, match=rf" is {dtype}, expected float32, bfloat16, float16 or float64"):
            function(*changed)


def assert_names_the_device(function, tensors, device):
    for place in range(1, len(tensors)):
        changed = [*tensors[:place], tensors[place].to(device), *tensors[place + 1 :]]
        with pytest.raises(ValueError, match=r" is on .*, expected "):
            function(*changed)


@pytest.mark.parametrize("name", CASES)
def test_one_device(name, which, request):
    function, tensors = prepared(name, which, request)
    if name.startswith("token_losses"):
        pytest.skip("logits and labels have a test of their own")
    if which == "kernels" and name.startswith(("selective_scan", "causal_conv1d")):
        pytest.skip("torch.library itself gives meta tensors for a meta tensor")
    assert_names_the_device(function, tensors, "meta")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in CASES if not n.endswith(" cpu") and "losses" not in n])
def test_one_device_of_two(name):
    """The kernels must not take an address on one for that on the other."""
    function, _, tensors = CASES[name]
    assert_names_the_device(function, [tensor.cuda() for tensor in tensors()], "cpu")


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_dtypes_may_differ(backend):
    """Each result and gradient has the dtype of what it belongs to."""
    _, definition, tensors = CASES["selective_scan torch"]
    dtypes = (torch.float16, torch.float32, torch.float64, torch.bfloat16)
    exact = definition(*[tensor.double() for tensor in tensors()])
    for shift in range(4):
        inputs = leaves([t.to(dtypes[(i + shift) % 4]) for i, t in enumerate(tensors())])
        out = ops.selective_scan(*inputs, delta_softplus=True, backend=backend)
        assert out.dtype == inputs[0].dtype
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
        out.sum().backward()
        assert [tensor.grad.dtype for tensor in inputs] == [tensor.dtype for tensor in inputs]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.selective_scan(x[0], x[0], x[0], x[0], x[0]),
        lambda x: ops.selective_scan(x, x, torch.ones(4, 0), x[..., :0], x[..., :0]),
        lambda x: ops.causal_conv1d(x[0], torch.ones(4, 2)),
        lambda x: ops.causal_conv1d(x, torch.ones(4, 0)),
        lambda x: ops.causal_conv1d(x, torch.ones(3, 2)),
        lambda x: ops.causal_conv1d(x, torch.ones(4, 2), torch.ones(1)),
        lambda x: ops.add_rms_norm(x[:1], x, torch.ones(4)),
        lambda x: ops.add_rms_norm(None, x, torch.ones(3)),
        lambda x: ops.add_rms_norm(None, x, torch.ones(1)),
        lambda x: ops.gated_rms_norm(x, x[:1], torch.ones(4), 1, 1e-5),
        lambda x: ops.gated_rms_norm(x, x, torch.ones(4), 3, 1e-5),
        lambda x: ops.membrane(x, None, first=2, width=3, chunks=2, length=1, tau=0.9, threshold=1.0),
        lambda x: ops.membrane(x, x, first=0, width=4, chunks=2, length=1, tau=0.9, threshold=1.0),
        lambda x: ops.membrane(x, x, first=0, width=4, chunks=None, length=2, tau=0.9, threshold=1.0),
        lambda x: ops.membrane(x[0], None, first=0, width=4, chunks=2, length=1, tau=0.9, threshold=1.0),
        lambda x: ops.add_silu_pair(x, x, torch.ones(4), x[:1], torch.ones(4), 0),
        lambda x: ops.add_silu_pair(x, x, torch.ones(4), x, torch.ones(3), 0),
        lambda x: ops.add_silu_pair(x[0], x[0], torch.ones(4), x[0], torch.ones(4), 0),
        lambda x: ops.token_losses(x, torch.ones(2, dtype=torch.long)),
        lambda x: ops.token_losses(x[0], torch.ones(2, dtype=torch.long)),
        lambda x: ops.token_losses(x[0], torch.ones(3)),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_shapes_that_do_not_fit(call, backend):
    with ops.use_backend(backend), pytest.raises(ValueError, match=r"expected|must be"):
        call(torch.ones(2, 3, 4))
