"""The CUDA C++ scan answers to the definition; without a GPU its source runs in an emulator on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_checks import TOLERANCES, ZERO_A, assert_close, assert_compiles

from vimtune.ops import reference
from vimtune.ops.nvrtc import runtime, scan


def build_inputs(
    batch, tokens, inner, dtype, device, delta_scale=1.0, directions=2, num_states=16, offset=False
) -> dict:
    generator = torch.Generator().manual_seed(tokens + inner)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    delta = torch.nn.functional.softplus(normal(directions, batch, tokens, inner) - 2) * delta_scale
    padded = scan.padded_states(num_states)
    columns = normal(directions, batch, tokens, 2 * padded + 16)
    for first in (0, padded):
        columns[..., first + num_states : first + padded] = 0
    inputs = {
        "u": normal(directions, batch, tokens, inner).to(dtype),
        "delta": delta.clamp(max=6e4).half(),
        "projections": columns.to(dtype),
        "A_log": [torch.rand(inner, num_states, generator=generator) * 3 for _ in range(directions)],
        "D": [normal(inner) for _ in range(directions)],
        "xz": normal(batch, tokens, 2 * inner).to(dtype),
        "offsets": [normal(inner, num_states) for _ in range(directions * offset)],
    }
    return {
        name: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
        for name, value in inputs.items()
    }


def with_room(inputs: dict) -> scan.ScanInputs:
    """With room for what the forward keeps."""
    directions, batch, tokens, inner = inputs["u"].shape
    dtype, device = inputs["u"].dtype, inputs["u"].device
    num_states = inputs["A_log"][0].shape[1]
    ends_shape = scan.ends_shape(directions, batch, tokens, inner, num_states, device, True)
    ends = torch.empty(ends_shape, device=device)
    mean = torch.empty(scan.mean_shape(batch, tokens, inner, dtype, True), dtype=dtype, device=device)
    return scan.ScanInputs(**inputs, ends=ends, mean=mean)


def definition(u, delta, projections, A_log, D, xz, offsets):
    """What the kernels compute, by the reference in fp64. `delta` is before softplus here."""
    z, num_states = xz[..., xz.shape[-1] // 2 :], A_log[0].shape[1]
    padded, total = scan.padded_states(num_states), 0
    for d in range(len(u)):
        B, C = (projections[d, ..., first : first + num_states] for first in (0, padded))
        total = total + reference.selective_scan(
            u[d], delta[d], -A_log[d].exp(), B, C, D[d], z, None, True, bool(d)
        )
        if offsets:
            total = total + C @ offsets[d].t() * torch.nn.functional.silu(z)
    return total / len(u)


def exact(inputs: dict) -> dict:
    """Leaves in fp64 on the CPU; time steps inverted through softplus."""
    wide = {
        name: [x.cpu().double() for x in value] if isinstance(value, list) else value.cpu().double()
        for name, value in inputs.items()
    }
    wide["delta"] = wide["delta"] + torch.log(-torch.expm1(-wide["delta"]))
    for value in wide.values():
        for leaf in value if isinstance(value, list) else [value]:
            leaf.requires_grad_()
    return wide


@pytest.mark.parametrize("segments, trained, offset", [(1, False, False), (2, True, True), (5, True, False)])
@pytest.mark.parametrize(
    "directions, batch, tokens, inner, dtype, delta_scale, num_states",
    [
        (2, 1, 1, 64, torch.bfloat16, 1.0, 16),
        (2, 1, 2, 8, torch.float16, 1.0, 1),
        (2, 2, 7, 40, torch.bfloat16, 1.0, 16),
        (2, 1, 18, 72, torch.float16, 1.0, 22),
        (2, 1, 65, 64, torch.bfloat16, 1.0, 16),
        (2, 1, 33, 64, torch.bfloat16, 100.0, 16),
        (2, 1, 33, 64, torch.bfloat16, 1e-3, 16),
        (2, 1, 63, 8, torch.float16, 1.0, 16),
        (2, 1, 197, 40, torch.bfloat16, 1.0, 16),
        (2, 1, 500, 8, torch.bfloat16, 1.0, 16),
        (2, 1, 730, 8, torch.float16, 0.1, 16),
        (1, 1, 1, 40, torch.bfloat16, 1.0, 16),
        (1, 2, 7, 40, torch.bfloat16, 1.0, 9),
        (1, 1, 18, 72, torch.float16, 1.0, 32),
        (1, 1, 33, 40, torch.bfloat16, 100.0, 16),
        (1, 3, 65, 72, torch.float16, 1e-3, 16),
        (1, 1, 197, 40, torch.bfloat16, 1.0, 16),
    ],
)
def test_scan_and_its_gradients(
    device,
    directions,
    batch,
    tokens,
    inner,
    dtype,
    delta_scale,
    num_states,
    segments,
    trained,
    offset,
    monkeypatch,
):
    if tokens < segments:
        pytest.skip("fewer tokens than segments")
    span = -(-tokens // segments)
    monkeypatch.setattr(scan, "num_segments", lambda *sizes: -(-tokens // span))
    inputs = build_inputs(batch, tokens, inner, dtype, device, delta_scale, directions, num_states, offset)
    leaves = exact(inputs)
    expected = definition(**leaves)
    grad = torch.randn(batch, tokens, inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = [leaves["u"], leaves["delta"], leaves["projections"], leaves["xz"]]
    flat += [*leaves["A_log"], *leaves["D"], *leaves["offsets"]]
    grad_u, grad_delta, grad_projections, grad_xz, *vectors = torch.autograd.grad(
        expected, flat, grad.double()
    )

    tolerance = TOLERANCES[dtype]
    kernel_inputs = with_room(inputs)
    out = scan.scan_forward(kernel_inputs)
    assert_close(out, expected, tolerance, "out")
    assert (kernel_inputs.ends.numel() > 0) == (span < tokens)
    assert (kernel_inputs.mean.numel() > 0) == (dtype == torch.float16)
    found_xz = torch.zeros_like(inputs["xz"])
    found = scan.scan_backward(grad.to(device), out, kernel_inputs, found_xz, trained)
    assert_close(found.u, grad_u, tolerance, "u")
    assert_close(found.delta, grad_delta, tolerance, "delta")
    assert_close(found_xz[..., inner:], grad_xz[..., inner:], tolerance, "gate")
    assert not found_xz[..., :inner].any(), "the other half is not the scan's"
    BC, padded = found.BC.sum(1), scan.padded_states(num_states)
    for label, first in (("B", 0), ("C", padded)):
        own = slice(first, first + num_states)
        assert_close(BC[..., own], grad_projections[..., own], tolerance, label)
        assert not BC[..., first + num_states : first + padded].any(), "padding"
    if trained:
        assert_close(
            found.A, torch.stack(vectors[:directions]), tolerance, "A_log", floor=ZERO_A / directions
        )
        assert_close(found.D, torch.stack(vectors[directions : 2 * directions]), tolerance, "D")
        assert_close(found.bias, grad_delta.sum((1, 2)), tolerance, "bias")
    else:
        assert found.A.numel() == found.D.numel() == found.bias.numel() == 0
    if offset:
        assert_close(found.offset, torch.stack(vectors[2 * directions :]), tolerance, "offset")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_gradient_of_gates_at_and_around_zero_and_far_from_it(device, directions, dtype):
    """In bf16 it is found from the result, which there is almost zero: small ones must be right as well."""
    batch, tokens, inner = 2, 21, 64
    inputs = build_inputs(batch, tokens, inner, dtype, device, directions=directions)
    values = [0.0, 1e-38, 1e-30, 1e-18, 1e-10, 1e-4, 1.0, 20.0, 90.0, 300.0]
    gates = torch.tensor([sign * value for value in values for sign in (1, -1)])
    gates = gates.repeat(batch * tokens * inner // len(gates) + 1)[: batch * tokens * inner]
    inputs["xz"][..., inner:] = gates.view(batch, tokens, inner).to(inputs["xz"])
    leaves = exact(inputs)
    grad = torch.randn(batch, tokens, inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = definition(**leaves)
    (grad_xz,) = torch.autograd.grad(expected, leaves["xz"], grad.double())

    kernel_inputs = with_room(inputs)
    out = scan.scan_forward(kernel_inputs)
    found = torch.zeros_like(inputs["xz"])
    scan.scan_backward(grad.to(device), out, kernel_inputs, found, False)
    z = leaves["xz"].detach()[..., inner:].requires_grad_()
    silu = torch.nn.functional.silu(z)
    (slope,) = torch.autograd.grad(silu.sum(), z)
    mean = (grad_xz[..., inner:] / (grad * slope))[slope.abs() > 0.1].abs().max()
    allowed = TOLERANCES[dtype] * mean
    assert ((out.cpu() - expected).abs() <= allowed * silu.abs() + 1e-7).all()
    error = (found[..., inner:].cpu() - grad_xz[..., inner:]).abs()
    assert (error <= allowed * (grad * slope).abs() + 1e-7).all()


@pytest.fixture
def card(monkeypatch):
    """A device with the 132 multiprocessors of an H200."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8, 21, 44, 128, 1024])
@pytest.mark.parametrize("tokens", [1, 197, 256, 257, 785, 3137])
@pytest.mark.parametrize("directions", [1, 2])
def test_no_segment_is_empty_or_short(directions, batch, tokens, backward, card):
    segments = scan.num_segments(directions, batch, tokens, 384, card, backward)
    span = -(-tokens // segments)
    assert (segments - 1) * span < tokens <= segments * span
    assert segments == 1 or span >= scan.SHORTEST_SEGMENT


@pytest.mark.parametrize(
    "batch, tokens, forward, both", [(128, 197, 1, 1), (64, 785, 1, 1), (32, 785, 1, 4), (8, 3137, 11, 11)]
)
def test_segments_where_they_were_measured_to_pay(batch, tokens, forward, both, card):
    assert scan.num_segments(2, batch, tokens, 384, card, backward=False) == forward
    assert scan.num_segments(2, batch, tokens, 384, card, backward=True) == both


def test_half_the_directions_leave_room_for_twice_the_images(card):
    for batch, tokens in ((8, 512), (8, 3137), (32, 785), (64, 785)):
        for backward in (False, True):
            one = scan.num_segments(1, 2 * batch, tokens, 384, card, backward)
            assert one == scan.num_segments(2, batch, tokens, 384, card, backward)


def test_what_is_covered():
    assert not any(scan.refusals(torch.bfloat16, 384, num_states) for num_states in (1, 16, 22, 32))
    assert scan.refusals(torch.float32, 388, 33) == [
        "activations are torch.float32, the kernels have bf16 and fp16",
        "inner width 388 is no multiple of 8",
        "33 states are more than the 32 of the kernels",
    ]


@pytest.mark.parametrize(
    "directions, states, fp16, trained, architecture",
    [(2, 16, 0, 0, "sm_90"), (2, 16, 1, 1, "sm_80"), (1, 22, 0, 1, "sm_80"), (1, 16, 1, 0, "sm_90")],
)
def test_source_compiles_without_a_gpu(directions, states, fp16, trained, architecture, nvrtc):
    columns = 2 * scan.padded_states(states) + 16
    sizes = ("DIRECTIONS", directions), ("STATES", states), ("WIDTH", 40), ("COLUMNS", columns)
    constants = (*sizes, ("FP16", fp16), ("SEGMENTED", trained), ("OFFSET", fp16))
    assert_compiles(scan.FORWARD, constants, [architecture])
    assert_compiles(scan.FROM, constants, [architecture])
    assert_compiles(scan.BACKWARD, (*constants, ("TRAINED", trained)), [architecture])


def test_compile_errors_are_one_line(nvrtc):
    with pytest.raises(
        runtime.CompileError, match=r"does not compile scan.cu for sm_90: .*undefined"
    ) as caught:
        runtime.compile_source(scan.FORWARD, (), "sm_90")
    assert "\n" not in str(caught.value)


class Driver:
    """Stands in for CUDA's driver on a thread that has this context."""

    def __init__(self, context):
        self.context = context
        self.calls = []

    def cuCtxGetCurrent(self, place):
        place._obj.value = self.context
        return 0

    def cuDevicePrimaryCtxRetain(self, place, device):
        place._obj.value = 100 + device
        return 0

    def cuCtxSetCurrent(self, context):
        self.context = context.value
        return 0

    def cuAnything(self, *arguments):
        self.calls.append((self.context, arguments))
        return 0


@pytest.mark.parametrize("own, used", [(None, 103), (7, 7)])
def test_the_driver_is_called_in_a_context(own, used, monkeypatch):
    """A thread that has not called CUDA has none; one that has keeps its own."""
    driver = Driver(own)
    monkeypatch.setattr(runtime, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    runtime._call("cuAnything", 1, 2)
    assert driver.calls == [(used, (1, 2))]
