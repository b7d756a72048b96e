"""What the compiled kernels promise beyond agreeing with the reference."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from vimtune import ops
from vimtune.ops import reference
from vimtune.ops.convolution import ConvInputs, ConvOptions
from vimtune.ops.cpu import CpuBackend, library
from vimtune.ops.scan import ScanInputs, ScanOptions

FORWARD = ScanOptions(delta_softplus=True, reverse=False)
PLAIN = ScanOptions(delta_softplus=False, reverse=False)


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    backend = CpuBackend()
    reasons = backend.refusals(torch.device("cpu"))
    if reasons:
        pytest.skip("; ".join(reasons))
    return backend


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def scan_inputs(batch=3, tokens=70, inner=150, states=6, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    long, short = (batch, tokens, inner), (batch, tokens, states)
    A = -normal(inner, states).exp()
    return [
        normal(*long),
        normal(*long),
        A,
        normal(*short),
        normal(*short),
        normal(inner),
        normal(*long),
        normal(inner),
    ]


def with_state(inputs: list[torch.Tensor]) -> ScanInputs:
    """The inputs of a scan that begins with a state, which has the numbers of A."""
    return ScanInputs(*inputs, inputs[2].expand(len(inputs[0]), -1, -1))


def run_everything(backend: CpuBackend, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs and gradients of the scan and the convolution, both directions."""
    u, z = inputs[0], inputs[6]
    results = []
    for reverse in (False, True):
        options = ScanOptions(delta_softplus=True, reverse=reverse)
        scan = with_state(inputs) if u.numel() else ScanInputs(*inputs)
        out, states, last = backend.scan.forward(scan, options, True)
        found = [out, last, *backend.scan.backward(z, last, states, scan, options, [True] * 9)]
        results += [tensor for tensor in found if tensor is not None]
        weight, bias = inputs[2][:, :4].contiguous(), inputs[5]
        conv, filtering = ConvInputs(u, weight, bias), ConvOptions(silu=True, reverse=reverse)
        results.append(backend.convolution.forward(conv, filtering))
        results += backend.convolution.backward(z, conv, filtering, [True] * 3)
    return results


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative error of every element, not of the largest one."""
    expected = expected.double()
    assert (
        (result.double() - expected).abs() <= tolerance * expected.abs() + 2.4e-38
    ).all()  # denormals are zero


@pytest.mark.parametrize("batch", [1, 3, 9])  # narrow and wide blocks of channels
def test_results_do_not_depend_on_threads(backend, threads, monkeypatch, batch):
    inputs = scan_inputs(batch=batch, inner=300, tokens=40)
    threads(1)
    expected = run_everything(backend, inputs)
    for count in (2, 3, 8):
        threads(count)
        assert same(run_everything(backend, inputs), expected), f"{count} threads"
        with monkeypatch.context() as patch:
            patch.setattr(backend.library(), "_launcher", None)
            assert same(run_everything(backend, inputs), expected), f"{count} threads of our own"


def test_nothing_is_left_unwritten_or_written_outside(backend, monkeypatch):
    """Every output starts as NaN between two guard bands."""
    canary, guard = 1234.5, 64
    buffers = []

    def poisoned(shape):
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * guard,), canary, dtype=torch.float32)
        buffer[guard : guard + count] = float("nan")
        buffers.append(buffer)
        return buffer[guard : guard + count].view(tuple(shape))

    monkeypatch.setattr(library, "empty", poisoned)
    monkeypatch.setattr("vimtune.ops.cpu.empty", poisoned)
    for batch, tokens, inner, states in [(1, 1, 1, 1), (2, 33, 17, 5), (2, 31, 129, 4), (1, 65, 63, 3)]:
        inputs = scan_inputs(batch, tokens, inner, states)
        inputs[2] = -torch.rand(inner, max(states, 4))[:, :states]
        u = inputs[0]
        for reverse in (False, True):
            options = ScanOptions(delta_softplus=True, reverse=reverse)
            scan = with_state(inputs)
            out, saved, last = backend.scan.forward(scan, options, True)
            results = [out, saved, last]
            results += backend.scan.backward(u, last, saved, scan, options, [True] * 9)
            for width in (1, 4, 40):
                conv = ConvInputs(u, torch.rand(inner, width)), ConvOptions(True, reverse)
                results += [
                    backend.convolution.forward(*conv),
                    *backend.convolution.backward(u, *conv, [True, True, False])[:2],
                ]
            assert all(torch.isfinite(result).all() for result in results)
    for buffer in buffers:
        assert (buffer[:guard] == canary).all() and (buffer[-guard:] == canary).all()


def test_any_strides(backend):
    """Broadcast samples, every second token, parts of wider rows."""
    u, _, A, _, C, D, _, bias = scan_inputs(batch=2, tokens=20, inner=40)
    views = [
        u[:1].expand(2, -1, -1),
        torch.randn(2, 40, 50)[:, ::2, 5:45],
        torch.cat([A, A], 1)[:, 3:9],
        torch.randn(2, 20, 100)[..., 7:13],
        C[:, :1].expand(-1, 20, -1),
        D,
        torch.randn(20, 2, 40).transpose(0, 1),
        bias,
    ]
    copies = [view.contiguous() for view in views]
    assert same(run_everything(backend, views), run_everything(backend, copies))


@pytest.mark.parametrize("shape", [(0, 5, 8, 4), (2, 0, 8, 4)])
def test_empty_inputs(backend, shape):
    for result in run_everything(backend, scan_inputs(*shape)):
        assert (result == 0).all()


def one_channel_row(values: torch.Tensor, tokens: int = 1) -> torch.Tensor:
    return values.expand(1, tokens, -1).contiguous()


def test_softplus_is_accurate_everywhere(backend):
    x = torch.cat([torch.linspace(-87, 87, 4001), torch.tensor([-1e30, -200.0, -0.0, 1e-30, 200.0, 1e30])])
    ones, one = one_channel_row(torch.ones(len(x))), torch.ones(1, 1, 1)
    inputs = ScanInputs(ones, one_channel_row(x), -torch.ones(len(x), 1), one, one)
    out, *_ = backend.scan.forward(inputs, FORWARD, False)
    exact = torch.where(x > 30, x.double(), torch.log1p(x.double().clamp(max=40).exp()))
    close(out[0, 0], exact, 4e-7)


def test_decay_is_accurate_and_saturates(backend):
    """A second token with u = 0 leaves exp(dt A) times the first state, which is 1."""
    x = torch.cat(
        [torch.linspace(-86, 86, 4001), torch.tensor([-1e30, -1e4, -88.5, 0.0, 1e-30, 89.0, 1e4, 1e30])]
    )
    u = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, len(x)).contiguous()
    dt = torch.stack([torch.ones_like(x), x])[None]
    ones = torch.ones(1, 2, 1)
    out, *_ = backend.scan.forward(ScanInputs(u, dt, torch.ones(len(x), 1), ones, ones), PLAIN, False)
    got, exact = out[0, 1], x.double().exp()
    in_range = x.abs() < 87
    # The argument is rounded once to fp32, as in any fp32 exp(dt * A).
    error = (got.double() / exact - 1).abs()[in_range]
    assert (error <= 3e-7 + 2.0**-23 * x.double().abs()[in_range]).all()
    assert (got[x < -88] == 0).all() and torch.isposinf(got[x > 88.8]).all()


def test_gate_is_accurate_everywhere(backend):
    z = torch.cat([torch.linspace(-86, 90, 4001), torch.tensor([-1e30, -200.0, 1e-30, 1e30])])
    row, one = one_channel_row(torch.ones(len(z))), torch.ones(1, 1, 1)
    inputs = ScanInputs(row, row, -torch.ones(len(z), 1), one, one, z=one_channel_row(z))
    out, *_ = backend.scan.forward(inputs, PLAIN, False)
    close(out[0, 0], z.double() * torch.sigmoid(z.double()), 4e-7)


def test_nan_is_not_hidden(backend):
    for index in (0, 1, 3, 6):  # u, delta, B, z
        inputs = scan_inputs(batch=1, tokens=5, inner=20)
        inputs[index][0, 2, 3] = float("nan")
        out, *_ = backend.scan.forward(ScanInputs(*inputs), FORWARD, False)
        assert torch.isnan(out[0, 2]).any(), index
        assert torch.isfinite(out[0, :2]).all(), index


def test_denormals_are_still_denormals_elsewhere(backend, threads):
    """The kernels flush denormals in their own threads only while they run."""
    threads(2)
    tiny = torch.full((1 << 16,), 1e-39)  # large enough for torch to use all its threads
    run_everything(backend, scan_inputs())
    assert (tiny * 0.5 > 0).all()
    assert 5e-324 * 1.0 > 0


def test_two_python_threads_at_once(backend):
    inputs = [scan_inputs(seed=seed) for seed in range(2)]
    expected = [run_everything(backend, each) for each in inputs]
    mismatches = []

    def work(index):
        for _ in range(10):
            if not same(run_everything(backend, inputs[index]), expected[index]):
                mismatches.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not mismatches


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_too(backend, threads):
    """As in a DataLoader worker: the parent's threads are gone, and torch itself runs single-threaded."""
    threads(2)
    inputs = scan_inputs(batch=2, tokens=20)
    expected = run_everything(backend, inputs)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            options = ScanOptions(delta_softplus=True, reverse=False)
            scan = with_state(inputs)
            out, states, last = backend.scan.forward(scan, options, True)
            backend.scan.backward(inputs[6], last, states, scan, options, [True] * 9)
            os.write(writer, b"same" if same([out], expected[:1]) else b"different")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        timer = threading.Timer(60, os.kill, (child, 9))
        timer.start()
        answer = pipe.read()
        timer.cancel()
    os.waitpid(child, 0)
    assert answer == b"same"


def test_default_dtype_and_device_do_not_matter(backend):
    inputs = scan_inputs(batch=1, tokens=5)
    expected = run_everything(backend, inputs)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert same(run_everything(backend, inputs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_fp64_is_exact_enough_for_gradcheck(backend):
    inputs = [x.double().requires_grad_() for x in scan_inputs(1, 4, 3, 2)]
    assert torch.autograd.gradcheck(
        lambda *x: ops.selective_scan(*x, delta_softplus=True, backend="cpu"), inputs
    )
    conv = [x.double().requires_grad_() for x in (torch.randn(1, 4, 3), torch.randn(3, 2), torch.randn(3))]
    assert torch.autograd.gradcheck(lambda *x: ops.causal_conv1d(*x, silu=True, backend="cpu"), conv)


def test_long_sequences_stay_accurate(backend):
    """Slowly decaying states over thousands of tokens: errors must not add up."""
    u, delta, A, B, C, D, z, bias = scan_inputs(batch=1, tokens=4000, inner=17, states=3)
    delta, A = delta - 6, A * 0.1
    inputs = (u, delta, A, B, C, D, z, bias)
    expected = reference.selective_scan(*(x.double() for x in inputs), delta_softplus=True)
    out, *_ = backend.scan.forward(ScanInputs(*inputs), FORWARD, False)
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 2e-6
