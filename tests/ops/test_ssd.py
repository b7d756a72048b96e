"""The scan of Mamba-2 in chunks against its definition, which goes token by token."""

import sys
from types import SimpleNamespace

import pytest
import torch

from vimtune import ops
from vimtune.ops import Backend, cuda, reference
from vimtune.ops.eager.ssd import CHUNK, EagerSsd
from vimtune.ops.ssd import SsdInputs, SsdOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, WIDTH, STATES = 2, 4, 6, 5


def tensors(tokens, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens + groups)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return {
        "x": normal(BATCH, tokens, HEADS, WIDTH),
        "dt": normal(BATCH, tokens, HEADS),
        "A": -normal(HEADS).exp(),
        "B": normal(BATCH, tokens, groups, STATES),
        "C": normal(BATCH, tokens, groups, STATES),
        "D": normal(HEADS),
        "dt_bias": normal(HEADS),
        "state": normal(BATCH, HEADS, WIDTH, STATES),
    }


def results_and_gradients(function, values, **options):
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    out, last = function(**leaves, **options)
    torch.manual_seed(0)
    grads = [torch.randn(tensor.shape, dtype=torch.float64).to(tensor) for tensor in (out, last)]
    gradients = torch.autograd.grad([out, last], [*leaves.values()], grads, allow_unused=True)
    return [out, last, *(torch.zeros(1) if gradient is None else gradient for gradient in gradients)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_results_and_gradients_are_those_of_the_definition(tokens, groups):
    values = tensors(tokens, groups)
    expected = results_and_gradients(reference.ssd, values)
    for found, value in zip(results_and_gradients(ops.ssd, values), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("missing", [(), ("D",), ("dt_bias", "state"), ("D", "dt_bias", "state")])
@pytest.mark.parametrize("options", [{}, {"dt_softplus": False}, {"dt_limit": (0.1, 0.6)}])
def test_optional_tensors_and_options(missing, options):
    values = {name: value for name, value in tensors(9, 2).items() if name not in missing}
    if options.get("dt_softplus") is False:
        values["dt"] = values["dt"].abs()
    expected = results_and_gradients(reference.ssd, values, **options)
    for found, value in zip(results_and_gradients(ops.ssd, values, **options), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)


def test_numeric_gradients():
    """Also of the states before the first token and after the last one."""
    values = {name: value[:1].requires_grad_() for name, value in tensors(CHUNK + 2, 2).items()}
    values |= {name: tensors(CHUNK + 2, 2)[name].requires_grad_() for name in ("A", "D", "dt_bias")}
    assert torch.autograd.gradcheck(
        lambda *leaves: ops.ssd(**dict(zip(values, leaves, strict=True))), [*values.values()], fast_mode=True
    )


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    values = {name: value.requires_grad_() for name, value in tensors(CHUNK + 9, 2, torch.float32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda _: None):
        ops.ssd(**values)
    assert set(kept) <= {value.data_ptr() for value in values.values()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_dtypes(dtype, tolerance):
    values = tensors(CHUNK + 9, 1, dtype)
    exact = results_and_gradients(reference.ssd, {name: value.double() for name, value in values.items()})
    found = results_and_gradients(ops.ssd, values)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for value, other in zip(found, exact, strict=True):
        scale = other.abs().max().item()
        assert (value.double() - other).abs().max().item() <= tolerance * scale


def test_strong_decay_loses_no_digits():
    """Sums of rates over a chunk are far larger than the differences that matter."""
    values = tensors(CHUNK + 1, 1, torch.float32)
    values["dt"], values["A"] = values["dt"] * 10, -torch.linspace(1, 16, HEADS, device=DEVICE)
    exact = results_and_gradients(reference.ssd, {name: value.double() for name, value in values.items()})
    for value, other in zip(results_and_gradients(ops.ssd, values), exact, strict=True):
        assert (value.double() - other).abs().max() <= 3e-5 * other.abs().max()


def test_parts_are_the_whole_and_so_are_single_tokens():
    values = tensors(CHUNK + 11, 2)
    whole, last = ops.ssd(**values)
    state, outputs = values["state"], []
    for part in (slice(0, 3), slice(3, CHUNK + 5)):
        own = {name: values[name][:, part] for name in ("x", "dt", "B", "C")}
        out, state = ops.ssd(**{**values, **own, "state": state})
        outputs.append(out)
    for t in range(CHUNK + 5, CHUNK + 11):
        own = {name: values[name][:, t] for name in ("x", "dt", "B", "C")}
        out, state = ops.ssd_step(
            **{**values, **own, "state": state}, dt_softplus=True, dt_limit=(0.0, float("inf"))
        )
        outputs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


def test_time_steps_of_zero_leave_the_state_alone():
    values = {name: value for name, value in tensors(12, 1).items() if name != "dt_bias"}
    values["dt"] = values["dt"].abs()
    values["dt"][:, 7:] = 0
    _, last = ops.ssd(**values, dt_softplus=False)
    own = {name: values[name][:, :7] for name in ("x", "dt", "B", "C")}
    torch.testing.assert_close(last, ops.ssd(**{**values, **own}, dt_softplus=False)[1])


def test_no_tokens_at_all():
    values = tensors(0, 1)
    for backend in ("auto", "reference"):
        out, last = ops.ssd(**values, backend=backend)
        assert out.shape == (BATCH, 0, HEADS, WIDTH)
        torch.testing.assert_close(last, values["state"])


def test_it_is_one_graph_for_the_compiler():
    values = tensors(9, 2, torch.float32)
    compiled = torch.compile(ops.ssd, fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(ops.ssd, values)
    for found, value in zip(results_and_gradients(compiled, values), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


def mamba_ssm(calls):
    """A module like that of mamba-ssm, computed by other kernels. The compiler cannot look into it."""

    def split(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, dt_limit):
        inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, initial_states)
        return inputs, SsdOptions(dt_softplus, dt_limit)

    def forward(x, dt, A, B, C, chunk_size, **options):
        torch._dynamo.graph_break()
        calls.append("forward")
        out, last, _ = EagerSsd().forward(*split(x, dt, A, B, C, **options))
        return out, None, dt, A, last, last

    def backward(dout, x, dt, A, B, C, out, chunk_size, dfinal_states, **options):
        torch._dynamo.graph_break()
        calls.append("backward")
        assert out.shape == x.shape
        inputs, others = split(x, dt, A, B, C, **options)
        needs = [tensor is not None for tensor in inputs]
        *first, bias, state = EagerSsd().backward(dout, dfinal_states, (), inputs, others, needs)
        return *first, None, bias, state

    return SimpleNamespace(_mamba_chunk_scan_combined_fwd=forward, _mamba_chunk_scan_combined_bwd=backward)


class MambaSsm(Backend):
    """The kernels of mamba-ssm alone, on any device."""

    name = "mamba_ssm"
    summary = "a stand-in"
    kernels = (cuda.CudaSsd(),)

    def refusals(self, device):
        return []


@pytest.fixture
def stand_in(backends, monkeypatch):
    """What has been called of a module in the place of mamba-ssm's, which may take fp32."""
    calls = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setitem(sys.modules, cuda.SSD_MODULE, mamba_ssm(calls))
    cuda._ssd_import_errors.cache_clear()
    backends(MambaSsm())
    yield calls
    cuda._ssd_import_errors.cache_clear()


@pytest.mark.parametrize("missing", [(), ("D", "dt_bias", "state")])
def test_mamba_ssm_is_opaque_to_the_compiler(stand_in, missing):
    values = {name: value for name, value in tensors(9, 2, torch.float32).items() if name not in missing}
    torch._dynamo.reset()
    compiled = torch.compile(ops.ssd, fullgraph=True, backend="aot_eager")
    expected = results_and_gradients(ops.ssd, values, backend="torch")
    for function in (ops.ssd, compiled):
        found = results_and_gradients(function, values, backend="mamba_ssm")
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
    assert stand_in == ["forward", "backward"] * 2


def test_another_mamba_ssm_is_not_used(stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, cuda.SSD_MODULE, SimpleNamespace())
    cuda._ssd_import_errors.cache_clear()
    assert "_mamba_chunk_scan_combined_fwd" in cuda._ssd_import_errors()[0]
    ops.ssd(**tensors(9, 2, torch.float32), backend="mamba_ssm")
    assert not stand_in


def test_long_fading_does_not_overflow():
    """Decays within a chunk are differences of sums, of which the masked ones are large and positive."""
    values = tensors(CHUNK, 1, torch.float32)
    values["A"] = torch.full_like(values["A"], -50.0)
    for tensor in results_and_gradients(ops.ssd, values):
        assert torch.isfinite(tensor).all()


def test_tensors_that_do_not_fit_are_named():
    values = tensors(4, 1)
    with pytest.raises(ValueError, match=r"A is \(3,\), expected \(4,\)"):
        ops.ssd(**{**values, "A": values["A"][:3]})
    with pytest.raises(ValueError, match="where G divides H"):
        ops.ssd(**{**values, "B": torch.zeros(BATCH, 4, 3, STATES)})


def test_kernels_of_mamba_ssm_take_fp32_where_tf32_is_allowed(monkeypatch):
    monkeypatch.setattr(cuda, "_ssd_import_errors", list)
    kernels = cuda.CudaSsd()
    single = SsdInputs(**tensors(3, 1, torch.float32))
    assert "set_float32_matmul_precision" in kernels.refusals(single)[0]
    assert not kernels.refusals(SsdInputs(**tensors(3, 1, torch.bfloat16)))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert not kernels.refusals(single)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_mamba_ssm(dtype, monkeypatch):
    pytest.importorskip("mamba_ssm")
    if "cuda" not in {row.name for row in ops.backend_report("cuda") if row.available}:
        pytest.skip("the backend cuda is not available here")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    values = {
        "x": normal(2, 300, 8, 64),
        "dt": normal(2, 300, 8),
        "A": -normal(8).float().exp(),
        "B": normal(2, 300, 1, 128) / 8,
        "C": normal(2, 300, 1, 128) / 8,
        "D": normal(8).float(),
        "dt_bias": normal(8).float() - 2,
        "state": normal(2, 8, 64, 128).float(),
    }
    exact = results_and_gradients(reference.ssd, {name: value.double() for name, value in values.items()})
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for backend in ("cuda", "torch"):
        found = results_and_gradients(ops.ssd, values, backend=backend)
        for value, other in zip(found, exact, strict=True):
            scale = other.abs().max().item()
            assert (value.double() - other).abs().max().item() <= 5e-2 * scale, backend
