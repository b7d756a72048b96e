"""Every backend answers to the reference: forward and all gradients, both directions, odd lengths."""

from __future__ import annotations

import kernel_checks
import pytest
import torch
from kernel_checks import AUTOGRAD_OPCHECKS, OPCHECKS
from torch.utils._python_dispatch import TorchDispatchMode

from vimtune import ops
from vimtune.ops import reference
from vimtune.ops.convolution import ConvInputs, ConvOptions
from vimtune.ops.eager.convolution import EagerConvolution
from vimtune.ops.eager.scan import EagerScan
from vimtune.ops.scan import ScanInputs, ScanOptions

SCAN_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# Kernels for GPUs, with what they may deviate beyond the others: mamba-ssm uses fast exponentials.
GPU_BACKENDS = {"triton": 2, "cuda": 100}
# These operations of `nvrtc` are Triton's; what it has of its own is tested in test_nvrtc*.py.
BACKENDS = [
    pytest.param(name, marks=pytest.mark.gpu if name in GPU_BACKENDS else ())
    for name in ops.backend_names()
    if name not in ("auto", "reference", "nvrtc")
]


def device_of(backend: str) -> str:
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    status = {row.name: row for row in ops.backend_report(device_of(request.param))}[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {'; '.join(status.reasons)}")
    return request.param


def scan_inputs(batch=2, tokens=13, inner=24, states=16, dtype=torch.float32, delta_scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    wide = normal(batch, tokens, 2 * inner).to(dtype)  # u and z are views, as in the mixer
    narrow = normal(batch, tokens, 2 * states + 3).to(dtype)
    return {
        "u": wide[..., :inner],
        "delta": (delta_scale * normal(batch, tokens, inner)).to(dtype),
        "A": -torch.rand(inner, states, generator=generator) * states - 0.1,
        "B": narrow[..., 3 : 3 + states],
        "C": narrow[..., 3 + states :],
        "D": normal(inner),
        "z": wide[..., inner:],
        "delta_bias": normal(inner),
    }


def gradients(function, inputs: dict, grad, wanted, device="cpu"):
    leaves = {
        name: None if x is None else x.detach().to(device).requires_grad_(name in wanted)
        for name, x in inputs.items()
    }
    out = function(**leaves)
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], grad.to(device))
    return out.cpu(), {name: x.cpu() for name, x in zip(wanted, found, strict=True)}


def assert_close(actual, expected, tolerance, label, backend="torch"):
    assert actual.dtype == expected.dtype, label
    kernel_checks.assert_close(actual, expected, tolerance * GPU_BACKENDS.get(backend, 1), label)


def scan_gradients(backend, inputs, grad, wanted=SCAN_INPUTS, *, delta_softplus=True, reverse=False):
    """Output and gradients of a backend on its device, or of the reference (backend None)."""
    options = {"delta_softplus": delta_softplus, "reverse": reverse}
    if backend is None:
        return gradients(lambda **x: reference.selective_scan(**x, **options), inputs, grad, wanted)
    device = device_of(backend)
    return gradients(
        lambda **x: ops.selective_scan(**x, **options, backend=backend), inputs, grad, wanted, device
    )


def random_like(u, seed):
    return torch.randn(u.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 65, 197])
def test_scan_matches_reference(backend, tokens, reverse):
    inputs = scan_inputs(tokens=tokens)
    grad = random_like(inputs["u"], 1)
    options = {"delta_softplus": True, "reverse": reverse}
    expected, expected_grads = scan_gradients(None, inputs, grad, **options)
    out, grads = scan_gradients(backend, inputs, grad, **options)
    assert_close(out, expected, 1e-5, "out", backend)
    for name in SCAN_INPUTS:
        assert_close(grads[name], expected_grads[name], 2e-5, name, backend)


@pytest.mark.parametrize("inner", [1, 7, 24, 40])
@pytest.mark.parametrize("states", [1, 4, 5, 16, 22, 64])
def test_scan_sizes(backend, states, inner):
    inputs = scan_inputs(batch=1, tokens=9, inner=inner, states=states)
    grad = random_like(inputs["u"], 2)
    expected, expected_grads = scan_gradients(None, inputs, grad)
    out, grads = scan_gradients(backend, inputs, grad)
    assert_close(out, expected, 1e-5, "out", backend)
    for name in SCAN_INPUTS:
        assert_close(grads[name], expected_grads[name], 2e-5, name, backend)


@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_optional_inputs(backend, missing, softplus):
    inputs = {name: None if name in missing else x for name, x in scan_inputs().items()}
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() * 0.1
    if not softplus and inputs["delta_bias"] is not None:
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    wanted = [name for name in SCAN_INPUTS if name not in missing]
    grad = random_like(inputs["u"], 3)
    expected, expected_grads = scan_gradients(None, inputs, grad, wanted, delta_softplus=softplus)
    out, grads = scan_gradients(backend, inputs, grad, wanted, delta_softplus=softplus)
    assert_close(out, expected, 1e-5, "out", backend)
    for name in wanted:
        assert_close(grads[name], expected_grads[name], 2e-5, name, backend)


@pytest.mark.parametrize("wanted", [(name,) for name in SCAN_INPUTS] + [("u", "delta", "B", "C", "z")])
def test_scan_backward_subset(backend, wanted):
    """Only what is asked for is computed, and it does not depend on what else is asked for."""
    inputs = scan_inputs()
    grad = random_like(inputs["u"], 4)
    _, everything = scan_gradients(backend, inputs, grad)
    _, some = scan_gradients(backend, inputs, grad, wanted)
    for name in wanted:
        assert_close(some[name], everything[name], 1e-6, name, backend)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_scan_extreme_delta(backend, scale):
    inputs = scan_inputs(delta_scale=scale, tokens=40)
    grad = random_like(inputs["u"], 5)
    expected, expected_grads = scan_gradients(None, inputs, grad)
    out, grads = scan_gradients(backend, inputs, grad)
    assert_close(out, expected, 2e-5, "out", backend)
    for name in SCAN_INPUTS:
        assert torch.isfinite(grads[name]).all()
        assert_close(grads[name], expected_grads[name], 5e-5, name, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_half_activations(backend, dtype):
    """Half-precision activations: output and gradients in that dtype, state and parameters in fp32."""
    inputs = scan_inputs(dtype=dtype, tokens=65)
    grad = random_like(inputs["u"], 6).to(dtype)
    exact = {name: x.double() if x.dtype == dtype else x for name, x in inputs.items()}
    expected, expected_grads = scan_gradients(None, exact, grad.double())
    out, grads = scan_gradients(backend, inputs, grad)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert out.dtype == dtype
    assert_close(out, expected.to(dtype), tolerance, "out", backend)
    for name in SCAN_INPUTS:
        assert grads[name].dtype == inputs[name].dtype
        assert_close(grads[name], expected_grads[name].to(inputs[name].dtype), tolerance, name, backend)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 65])
def test_conv_matches_reference(backend, tokens, reverse, silu, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 48, generator=generator)[..., :24]
    inputs = {"x": x, "weight": torch.randn(24, 4, generator=generator)}
    inputs["bias"] = torch.randn(24, generator=generator) if bias else None
    wanted = [name for name, tensor in inputs.items() if tensor is not None]
    grad = torch.randn(x.shape, generator=generator)
    options = {"silu": silu, "reverse": reverse}
    expected, expected_grads = gradients(
        lambda **t: reference.causal_conv1d(**t, **options), inputs, grad, wanted
    )
    out, grads = gradients(
        lambda **t: ops.causal_conv1d(**t, **options, backend=backend),
        inputs,
        grad,
        wanted,
        device=device_of(backend),
    )
    assert_close(out, expected, 1e-5, "out", backend)
    for name in wanted:
        assert_close(grads[name], expected_grads[name], 1e-5, name, backend)


def test_backward_is_deterministic(backend):
    if backend == "cuda":
        pytest.skip("the backward of mamba-ssm adds with atomics")
    inputs = scan_inputs(batch=3, tokens=65, inner=40)
    grad = random_like(inputs["u"], 7)
    runs = [scan_gradients(backend, inputs, grad)[1] for _ in range(3)]
    for name in SCAN_INPUTS:
        assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:]), name


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_registered_correctly(backend, reverse):
    device, options = device_of(backend), (True, reverse, backend)
    leaves = [
        x.detach().to(device).requires_grad_() for x in scan_inputs(tokens=5, inner=8, states=4).values()
    ]
    forward, backward = torch.ops.vimtune.selective_scan, torch.ops.vimtune.selective_scan_backward
    torch.library.opcheck(forward, (*leaves, *options, True), test_utils=AUTOGRAD_OPCHECKS)
    tensors = [leaf.detach() for leaf in leaves]
    out, states = forward(*tensors, *options, True)
    for needs in ([True] * 8, [True, False] * 4):
        torch.library.opcheck(backward, (out, states, *tensors, *options, needs), test_utils=OPCHECKS)


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_is_registered_correctly(backend, reverse):
    device, options = device_of(backend), (True, reverse, backend)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 5, 8), (8, 4), (8,))]
    forward, backward = torch.ops.vimtune.causal_conv1d, torch.ops.vimtune.causal_conv1d_backward
    torch.library.opcheck(forward, (*leaves, *options), test_utils=AUTOGRAD_OPCHECKS)
    tensors = [leaf.detach() for leaf in leaves]
    out = forward(*tensors, *options)
    for needs in ([True] * 3, [True, False, True]):
        torch.library.opcheck(backward, (out, *tensors, *options, needs), test_utils=OPCHECKS)


def test_results_are_contiguous_however_a_backend_lays_them_out(monkeypatch):
    """As mamba-ssm's do, whose kernels are not channel-last."""

    def strided(x):
        return x if x is None or x.dim() < 2 else x.mT.contiguous().mT

    def lay_out(kernels, name):
        original = getattr(kernels, name)

        def changed(*arguments):
            found = original(*arguments)
            return strided(found) if isinstance(found, torch.Tensor) else tuple(map(strided, found))

        monkeypatch.setattr(kernels, name, changed)

    for kernels in (EagerScan, EagerConvolution):
        lay_out(kernels, "forward")
        lay_out(kernels, "backward")
    scan = [x.detach() for x in scan_inputs(tokens=5, inner=8, states=4).values()]
    out, states = torch.ops.vimtune.selective_scan(*scan, True, True, "torch", True)
    results = [
        out,
        states,
        *torch.ops.vimtune.selective_scan_backward(out, states, *scan, True, True, "torch", [True] * 8),
    ]
    conv = [torch.randn(shape) for shape in ((2, 5, 8), (8, 4), (8,))]
    out = torch.ops.vimtune.causal_conv1d(*conv, True, True, "torch")
    results += [out, *torch.ops.vimtune.causal_conv1d_backward(out, *conv, True, True, "torch", [True] * 3)]
    assert all(result.is_contiguous() for result in results)


class WithoutHost(TorchDispatchMode):
    """Fails on operations that a CUDA graph cannot record: they copy indices to the device or wait for it."""

    FORBIDDEN = ("aten.index.", "aten.index_put", "aten._local_scalar_dense", "aten.nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reverse", [False, True])
def test_plain_pytorch_can_be_recorded_on_a_gpu(reverse):
    inputs, scan, convolution = ScanInputs(**scan_inputs(tokens=19)), EagerScan(), EagerConvolution()
    options, filtering = ScanOptions(delta_softplus=True, reverse=reverse), ConvOptions(True, reverse)
    weight, grad = torch.randn(24, 4), torch.randn(2, 19, 24)
    with WithoutHost():
        out, states, _ = scan.forward(inputs, options, True)
        scan.backward(grad, None, states, inputs, options, [True] * 9)
        convolution.forward(ConvInputs(out, weight), filtering)
        convolution.backward(grad, ConvInputs(out, weight), filtering, [True, True, False])


def test_wrong_shapes_are_named():
    inputs = scan_inputs()
    inputs["B"] = inputs["B"][:, :-1]
    with pytest.raises(ValueError, match=r"B is \(2, 12, 16\), expected \(2, 13, 16\)"):
        ops.selective_scan(**inputs)


def test_unknown_backend_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'torch'"):
        ops.set_backend("troch")


def test_use_backend_is_restored():
    with ops.use_backend("reference"):
        assert ops.resolved_backend("cpu") == "reference"
        inputs = scan_inputs(tokens=3)
        assert torch.equal(ops.selective_scan(**inputs), reference.selective_scan(**inputs))
    assert ops.resolved_backend("cpu") != "reference"
