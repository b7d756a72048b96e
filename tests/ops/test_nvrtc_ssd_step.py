"""The CUDA C++ step of Mamba-2's decoding answers to the composition of it; without a GPU in the emulator."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import TOLERANCES, assert_close, assert_compiles

from vimtune import ops
from vimtune.ops.gated_norm import gated_rms_norm
from vimtune.ops.nvrtc import ssd_step
from vimtune.ops.ssd_mixer import SsdMixerOptions, SsdWeights

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def build(batch, heads, head, states, groups, width, bias, dtype, weight_dtypes, device, options):
    generator = torch.Generator().manual_seed(head)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    inner = heads * head
    channels = inner + 2 * groups * states
    weights = [normal(channels, width) * 0.5, normal(channels), normal(heads) - 2, normal(heads) * 0.5]
    weights += [normal(heads), 1 + 0.2 * normal(inner)]
    own = [weight.to(weight_dtypes[k % len(weight_dtypes)]) for k, weight in enumerate(weights)]
    own[1] = own[1] if bias else None
    projected, recent = normal(batch, inner + channels + heads), normal(batch, channels, width)
    state = normal(batch, heads, head, states)
    return projected.to(dtype), recent.to(dtype), state, SsdWeights(*own), options


def definition(projected, recent, state, weights, options, dtype):
    """The result and both states afterwards in fp64, rounded where the kernels round."""
    own = SsdWeights(*(None if weight is None else weight.double().cpu() for weight in weights))
    _, heads, head, states = state.shape
    inner, shared = heads * head, options.groups * states
    z, xBC, dt = projected.double().cpu().split([inner, inner + 2 * shared, heads], dim=-1)
    recent = torch.cat([recent.double().cpu()[..., 1:], xBC[..., None]], dim=-1)
    convolved = (recent * own.conv_weight).sum(-1)
    u = F.silu(convolved if own.conv_bias is None else convolved + own.conv_bias).to(dtype).double()
    x, B, C = u.split([inner, shared, shared], dim=-1)
    B, C = (part.unflatten(-1, (options.groups, states)) for part in (B, C))
    limits = options.lowest, options.highest
    given = (x.unflatten(-1, (heads, head)), dt, -own.A_log.exp(), B, C, own.D, own.dt_bias, True, limits)
    y, after = ops.ssd_step(*given, state.double().cpu())
    y = y.flatten(1).to(dtype).double()
    return gated_rms_norm(y, z, own.norm_weight, options.norm_groups, options.eps), after, recent


CASES = [
    (1, 2, 4, 8, 1, 4, True, BF16, (FP32,), SsdMixerOptions(1, 1, 1e-5, 0.0, math.inf)),
    (3, 6, 5, 33, 3, 4, False, BF16, (BF16,), SsdMixerOptions(3, 2, 1e-3, 0.05, 0.2)),
    (2, 4, 16, 64, 2, 3, True, FP16, (FP16, FP32), SsdMixerOptions(2, 1, 1e-5, 0.0, math.inf)),
    (2, 3, 64, 128, 1, 4, True, BF16, (FP32, BF16, FP32), SsdMixerOptions(1, 1, 1e-5, 0.0, math.inf)),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_token(device, case, monkeypatch):
    monkeypatch.setattr(ssd_step, "THREADS", 64)
    *sizes, dtype, weight_dtypes, options = case
    inputs = build(*sizes, dtype, weight_dtypes, device, options)
    expected, expected_state, expected_recent = definition(*inputs, dtype)
    out = ops.ssd_mixer_step(*inputs, backend="nvrtc")
    assert out.dtype == dtype
    assert_close(out, expected, TOLERANCES[dtype], "out")
    assert_close(inputs[2], expected_state, TOLERANCES[dtype], "state")
    assert torch.equal(inputs[1].double().cpu(), expected_recent)


def test_the_order_of_threads_changes_no_bit(in_both_orders, monkeypatch):
    monkeypatch.setattr(ssd_step, "THREADS", 96)
    *sizes, dtype, weight_dtypes, options = CASES[1]

    def run():
        inputs = build(*sizes, dtype, weight_dtypes, "cpu", options)
        return ops.ssd_mixer_step(*inputs, backend="nvrtc"), *inputs[:3]

    for one, other in zip(*in_both_orders(run), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_has_to_be_composed(on_cpu):
    def run(change=lambda inputs: inputs, backend="nvrtc"):
        *sizes, dtype, weight_dtypes, options = CASES[0]
        given = change(build(*sizes, dtype, weight_dtypes, "cpu", options))
        before = [tensor.clone() for tensor in given[1:3]]
        out = ops.ssd_mixer_step(*given, backend=backend)
        if out is None:
            assert all(torch.equal(*pair) for pair in zip(before, given[1:3], strict=True))
        return out

    assert run() is not None
    assert run(backend="torch") is None
    assert run(lambda i: (i[0].float(), *i[1:])) is None
    assert run(lambda i: (i[0], i[1].float(), *i[2:])) is None
    assert run(lambda i: (*i[:2], i[2].mT.contiguous().mT, *i[3:])) is None
    assert run(lambda i: (*i[:3], i[3]._replace(D=i[3].D.requires_grad_()), i[4])) is None


def test_it_compiles(nvrtc):
    sizes = (("HEADS", 24), ("HEAD", 64), ("STATES", 128), ("GROUPS", 1), ("NORM_GROUPS", 1), ("FILTER", 4))
    for fp16, halves in ((0, 0), (1, 63), (0, 0b10101)):
        constants = (*sizes, ("THREADS", ssd_step.THREADS), ("FP16", fp16), ("HALVES", halves))
        assert_compiles(ssd_step.SOURCE, constants)
