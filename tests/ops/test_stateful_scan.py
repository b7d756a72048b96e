"""Scans that begin with a state and return the last one.

Triton's kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts.
"""

import os

import pytest
import torch

from vimtune import ops
from vimtune.ops import reference

ON_GPU = torch.cuda.is_available()
HAS_TRITON = ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(
    not HAS_TRITON, reason="needs a GPU, or TRITON_INTERPRET=1 before Python starts"
)
BACKENDS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)] + ([] if ON_GPU else ["cpu"])
DEVICE = "cuda" if ON_GPU else "cpu"
BATCH, INNER, STATES = 2, 21, 5
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "state")


def tensors(tokens, dtype=torch.float32, without=()):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(DEVICE, dtype)

    high = torch.promote_types(dtype, torch.float32)
    values = {
        "u": normal(BATCH, tokens, INNER),
        "delta": normal(BATCH, tokens, INNER),
        "A": -normal(INNER, STATES, dtype=high).exp(),
        "B": normal(BATCH, tokens, STATES),
        "C": normal(BATCH, tokens, STATES),
        "D": normal(INNER, dtype=high),
        "z": normal(BATCH, tokens, INNER),
        "delta_bias": normal(INNER, dtype=high),
        "state": normal(BATCH, INNER, STATES, dtype=high),
    }
    return {name: value for name, value in values.items() if name not in without}


def run(function, values, grads, **options):
    """Results and the gradients of all tensors."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    results = function(**leaves, delta_softplus=True, **options)
    if torch.is_tensor(results):
        results = (results,)
    gradients = torch.autograd.grad(
        results, [*leaves.values()], [g.to(r.dtype) for g, r in zip(grads, results, strict=False)]
    )
    return {**dict(zip(("out", "last"), results, strict=False)), **dict(zip(leaves, gradients, strict=True))}


def grads_for(tokens):
    generator = torch.Generator().manual_seed(9)
    shapes = (BATCH, tokens, INNER), (BATCH, INNER, STATES)
    return [torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes]


def assert_near(found, expected, tolerance):
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        scale = value.abs().max().item() if value.numel() else 1.0
        assert found[name].shape == value.shape and error <= tolerance * max(scale, 1e-3), (
            name,
            error,
            scale,
        )


@pytest.mark.parametrize(
    "backend, tokens",
    [("torch", 1), ("torch", 33), ("torch", 70)]
    + [pytest.param("triton", tokens, marks=NEEDS_TRITON) for tokens in (1, 19)]
    + ([] if ON_GPU else [("cpu", tokens) for tokens in (1, 2, 16, 33, 70)]),
)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_results_and_gradients_are_those_of_the_reference(backend, tokens, dtype, tolerance):
    values, grads = tensors(tokens, dtype), grads_for(tokens)
    exact = {name: value.double() for name, value in values.items()}
    expected = run(reference.stateful_scan, exact, grads)
    found = run(ops.stateful_scan, values, grads, backend=backend)
    assert found["out"].dtype == dtype and found["last"].dtype == torch.float32
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gate_skip_and_bias(backend):
    values, grads = tensors(19, without=("D", "z", "delta_bias")), grads_for(19)
    exact = {name: value.double() for name, value in values.items()}
    expected = run(reference.stateful_scan, exact, grads)
    assert_near(run(ops.stateful_scan, values, grads, backend=backend), expected, 2e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_two_parts_are_the_whole(backend):
    values = tensors(40)
    options = {"delta_softplus": True, "backend": backend}
    whole, last = ops.stateful_scan(**values, **options)
    parts, state = [], values["state"]
    for part in (slice(0, 1), slice(1, 18), slice(18, 40)):
        own = {name: values[name][:, part] for name in ("u", "delta", "B", "C", "z")}
        out, state = ops.stateful_scan(**{**values, **own, "state": state}, **options)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_in_reverse_it_is_the_scan_of_the_flipped_tokens(backend):
    values, (grad, grad_last) = tensors(19), grads_for(19)
    flips = {name: values[name].flip(1) for name in ("u", "delta", "B", "C", "z")}
    expected = run(ops.stateful_scan, {**values, **flips}, [grad.flip(1), grad_last], backend=backend)
    for name in ("out", *flips):
        expected[name] = expected[name].flip(1)
    found = run(ops.stateful_scan, values, [grad, grad_last], backend=backend, reverse=True)
    assert_near(found, expected, 2e-5)


@NEEDS_TRITON
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_are_the_whole(monkeypatch, reverse):
    from vimtune.ops.triton import launch

    values = tensors(20)
    options = {"delta_softplus": True, "backend": "triton", "reverse": reverse}
    monkeypatch.setattr(launch, "num_segments", lambda u: 1)
    with torch.no_grad():
        whole, last = ops.stateful_scan(**values, **options)
        monkeypatch.setattr(launch, "num_segments", lambda u: 3 if u.shape[1] == 20 else 1)
        out, state = ops.stateful_scan(**values, **options)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_state_is_a_state_of_zeros_and_the_plain_scan(backend):
    values = tensors(20, without=("state",))
    out, _ = ops.stateful_scan(**values, delta_softplus=True, backend=backend)
    plain = ops.selective_scan(**values, delta_softplus=True, backend=backend)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_by_token_is_the_whole(dtype):
    values = tensors(12, dtype)
    exact = {name: value.double() for name, value in values.items()}
    whole, last = reference.stateful_scan(**exact, delta_softplus=True)
    state, outputs = values["state"], []
    for t in range(12):
        own = {name: values[name][:, t] for name in ("u", "delta", "B", "C", "z")}
        out, state = ops.scan_step(**{**values, **own, "state": state}, delta_softplus=True)
        outputs.append(out)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.stack(outputs, 1).double(), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_time_steps_of_zero_leave_the_state_alone(backend):
    values = tensors(9, without=("delta_bias",))
    values["delta"] = values["delta"].abs()
    values["delta"][:, 5:] = 0
    _, last = ops.stateful_scan(**values, backend=backend)
    own = {name: values[name][:, :5] for name in ("u", "delta", "B", "C", "z")}
    _, early = ops.stateful_scan(**{**values, **own}, backend=backend)
    torch.testing.assert_close(last, early, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_tokens_at_all(backend):
    values, grads = tensors(0), grads_for(0)
    found = run(ops.stateful_scan, values, grads, backend=backend)
    assert found["out"].shape == (BATCH, 0, INNER)
    torch.testing.assert_close(found["last"], values["state"])
    torch.testing.assert_close(found["state"], grads[1])


def test_second_derivatives_are_those_of_the_reference_only():
    values = {name: value.double() for name, value in tensors(3).items()}
    function = lambda *args: reference.stateful_scan(*args[:8], True, args[8])  # noqa: E731
    leaves = [values[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(function, leaves)
    kernels = lambda *args: ops.stateful_scan(*args[:8], True, args[8], backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(kernels, leaves)


@pytest.mark.parametrize("backend", [name for name in ("torch", "cpu") if not ON_GPU or name == "torch"])
def test_the_operation_is_as_torch_library_wants_it(backend):
    values = {name: value.requires_grad_() for name, value in tensors(7).items()}
    arguments = (*values.values(), True, True, backend, True)
    torch.library.opcheck(torch.ops.vimtune.stateful_scan, arguments)


def test_it_is_one_graph_for_the_compiler():
    values = tensors(7)
    compiled = torch.compile(ops.stateful_scan, fullgraph=True, backend="aot_eager")
    expected = ops.stateful_scan(**values, delta_softplus=True)
    torch.testing.assert_close(compiled(**values, delta_softplus=True), expected)


def test_a_state_that_does_not_fit_is_named():
    values = tensors(4)
    values["state"] = values["state"][:1]
    for backend in ("reference", "torch"):
        with pytest.raises(ValueError, match=r"state is \(1, 21, 5\), expected \(2, 21, 5\)"):
            ops.stateful_scan(**values, backend=backend)
