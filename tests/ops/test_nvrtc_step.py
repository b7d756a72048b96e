"""The CUDA C++ step of decoding answers to the composition of it; without a GPU it runs in the emulator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import TOLERANCES, assert_close, build_weights

from vimtune import ops
from vimtune.ops import DirectionWeights
from vimtune.ops.nvrtc import step
from vimtune.ops.step import StepInputs


def build(batch, inner, rank, width, states, bias, dtype, weight_dtypes, device):
    generator = torch.Generator().manual_seed(inner)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    around = build_weights(inner, rank, width, bias, num_states=states, directions=1)
    weights = [*(each[0] for each in around.values()), 0.5 * normal(inner, states), normal(inner)]
    own = [
        None if weight is None else weight.to(device, weight_dtypes[index % len(weight_dtypes)])
        for index, weight in enumerate(weights)
    ]
    sequences = [normal(batch, 2 * inner), normal(batch, inner, width)]
    xz, recent = (tensor.to(device, dtype) for tensor in sequences)
    return xz, recent, normal(batch, inner, states).to(device), DirectionWeights(*own)


def definition(xz, recent, state, weights, dtype):
    """The result and both states afterwards in fp64, rounded where the kernel rounds."""
    own = DirectionWeights(*(None if weight is None else weight.double().cpu() for weight in weights))
    x, z = xz.double().cpu().chunk(2, dim=-1)
    recent = torch.cat([recent.double().cpu()[..., 1:], x[..., None]], dim=-1)
    convolved = (recent * own.conv_weight).sum(-1)
    u = F.silu(convolved if own.conv_bias is None else convolved + own.conv_bias).to(dtype).double()
    states, rank = own.A_log.shape[1], own.dt_proj.shape[1]
    dt, B, C = (u @ own.x_proj.t()).to(dtype).double().split([rank, states, states], dim=-1)
    delta = (dt @ own.dt_proj.t()).to(dtype).double()
    given = (u, delta, -own.A_log.exp(), B, C, own.D, z, own.dt_bias, True, state.double().cpu())
    return *ops.scan_step(*given), recent


@pytest.mark.parametrize(
    "batch, inner, rank, width, states, bias, dtype, weight_dtypes",
    [
        (1, 8, 1, 4, 16, True, torch.bfloat16, (torch.float32,)),
        (3, 72, 5, 4, 16, False, torch.bfloat16, (torch.bfloat16,)),
        (2, 97, 7, 3, 5, True, torch.float16, (torch.float16, torch.float32)),
        (2, 640, 40, 4, 16, True, torch.bfloat16, (torch.float32, torch.bfloat16, torch.float32)),
    ],
)
def test_a_token(device, batch, inner, rank, width, states, bias, dtype, weight_dtypes, monkeypatch):
    monkeypatch.setattr(step, "THREADS", 64)
    xz, recent, state, weights = build(batch, inner, rank, width, states, bias, dtype, weight_dtypes, device)
    expected, expected_state, expected_recent = definition(xz, recent, state, weights, dtype)
    out = ops.causal_step(xz, recent, state, weights, backend="nvrtc")
    assert out.dtype == dtype
    assert_close(out, expected, TOLERANCES[dtype], "out")
    assert_close(state, expected_state, TOLERANCES[dtype], "state")
    assert torch.equal(recent.double().cpu(), expected_recent)


def test_the_order_of_threads_changes_no_bit(in_both_orders, monkeypatch):
    monkeypatch.setattr(step, "THREADS", 96)

    def run():
        inputs = build(2, 200, 5, 4, 16, True, torch.bfloat16, (torch.float32,), "cpu")
        return ops.causal_step(*inputs, backend="nvrtc"), *inputs[:3]

    for one, other in zip(*in_both_orders(run), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_has_to_be_composed(on_cpu):
    def run(change=lambda inputs: inputs, backend="nvrtc"):
        inputs = build(2, 8, 2, 4, 16, True, torch.bfloat16, (torch.float32,), "cpu")
        given = change(inputs)
        before = [tensor.clone() for tensor in given[1:3]]
        out = ops.causal_step(*given, backend=backend)
        if out is None:
            assert all(torch.equal(*pair) for pair in zip(before, given[1:3], strict=True))
        return out

    assert run() is not None
    assert run(backend="torch") is None
    assert run(lambda i: (i[0].float(), *i[1:])) is None
    assert run(lambda i: (i[0], i[1].float(), *i[2:])) is None
    assert run(lambda i: (*i[:2], i[2].double(), i[3])) is None
    assert run(lambda i: (*i[:2], i[2].transpose(1, 2).contiguous().transpose(1, 2), i[3])) is None
    assert run(lambda i: (*i[:3], i[3]._replace(D=i[3].D.requires_grad_()))) is None
    assert run(lambda i: (i[0][:0], i[1][:0], i[2][:0], i[3])) is None


def test_what_is_covered():
    inputs = build(1, 10240, 160, 4, 16, True, torch.bfloat16, (torch.float64,), "cpu")
    assert step.refusals(StepInputs(*inputs))[0].startswith("conv_weight is torch.float64, the kernel has")


def test_it_compiles(nvrtc):
    from kernel_checks import assert_compiles

    constants = (("WIDTH", 1536), ("STATES", 16), ("RANK", 48), ("FILTER", 4), ("THREADS", step.THREADS))
    for fp16, halves in ((0, 0), (1, 127), (0, 0b10101)):
        assert_compiles(step.SOURCE, (*constants, ("FP16", fp16), ("HALVES", halves)))
