"""The mixer of backend `nvrtc` as a whole: no kernel depends on the order in which threads and blocks run."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import TOLERANCES, assert_close, build_weights

from vimtune import ops
from vimtune.ops import DirectionStart, DirectionWeights, dispatch, reference
from vimtune.ops.nvrtc import mixer, scan


def build(batch, tokens, inner, rank, dtype, directions=2, width=4, num_states=16):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    around = build_weights(inner, rank, width, True, "cpu", tokens, num_states, directions)
    weights = [
        DirectionWeights(
            *(each[d] for each in around.values()), 0.5 * normal(inner, num_states), normal(inner)
        )
        for d in range(directions)
    ]
    return normal(batch, tokens, 2 * inner).to(dtype), normal(batch, tokens, inner).to(dtype), weights


@pytest.mark.parametrize(
    "directions, batch, tokens, inner, segments, num_states, dtype, trained",
    [
        (2, 2, 37, 72, 1, 16, torch.bfloat16, False),
        (2, 1, 37, 72, 3, 22, torch.float16, True),
        (2, 1, 70, 136, 2, 16, torch.bfloat16, True),
        (2, 3, 2, 64, 1, 16, torch.float16, False),
        (1, 2, 37, 72, 1, 16, torch.bfloat16, True),
        (1, 1, 70, 72, 3, 5, torch.float16, False),
    ],
)
def test_the_order_of_threads_and_blocks_changes_no_bit(
    directions, batch, tokens, inner, segments, num_states, dtype, trained, in_both_orders, monkeypatch
):
    """Every pair of directions, dtype, one segment or several, and what is trained."""
    monkeypatch.setattr(scan, "num_segments", lambda *sizes: segments)
    xz, grad, weights = build(batch, tokens, inner, 5, dtype, directions, num_states=num_states)

    def run():
        results = mixer.forward(xz, weights, True)
        grad_xz, grads = mixer.backward(grad, xz, results, weights, True, [[trained] * 7] * directions)
        out, projections, _ = results
        return [out, projections, grad_xz, *(g for own in grads for g in own if g is not None)]

    forwards, backwards = in_both_orders(run)
    assert len(forwards) == 3 + (7 * directions if trained else 0)
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "batch, tokens, inner, segments, states, dtype",
    [
        (2, 1, 8, 1, 16, torch.bfloat16),
        (2, 37, 72, 1, 16, torch.float16),
        (1, 70, 72, 3, 16, torch.bfloat16),
        (1, 70, 72, 3, 22, torch.float16),
    ],
)
def test_a_prompt_gives_the_last_state_as_well(
    device, batch, tokens, inner, segments, states, dtype, monkeypatch
):
    monkeypatch.setattr(scan, "num_segments", lambda *sizes: segments)
    xz, _, (weights,) = build(batch, tokens, inner, 5, dtype, directions=1, num_states=states)
    xz, own = xz.to(device), DirectionWeights(*(weight.to(device) for weight in weights))
    exact = DirectionWeights(*(weight.double() for weight in weights))
    u = reference.causal_conv1d(xz.cpu().double()[..., :inner], exact.conv_weight, exact.conv_bias, True)
    dt, B, C = (u @ exact.x_proj.t()).split([5, states, states], dim=-1)
    given = (u, dt @ exact.dt_proj.t(), -exact.A_log.exp(), B, C, exact.D, xz.cpu().double()[..., inner:])
    expected, state = reference.stateful_scan(*given, exact.dt_bias, True)
    out, last = ops.causal_prompt(xz, own, backend="nvrtc")
    assert_close(out, expected, 2 * TOLERANCES[dtype], "out")
    assert_close(last, state, 2 * TOLERANCES[dtype], "state")
    assert torch.equal(out, ops.causal_mixer(xz, own, backend="nvrtc"))


@pytest.mark.parametrize(
    "batch, tokens, inner, width, segments, states, dtype",
    [
        (2, 1, 8, 4, 1, 16, torch.bfloat16),
        (2, 2, 72, 6, 1, 16, torch.float16),
        (1, 37, 72, 4, 1, 16, torch.bfloat16),
        (1, 70, 72, 4, 3, 22, torch.float16),
        (2, 16, 64, 1, 1, 16, torch.bfloat16),
    ],
)
def test_directions_begin_with_a_state(
    device, batch, tokens, inner, width, segments, states, dtype, monkeypatch
):
    monkeypatch.setattr(scan, "num_segments", lambda *sizes: segments)
    xz, _, weights = build(batch, tokens, inner, 5, dtype, width=width, num_states=states)
    generator = torch.Generator().manual_seed(1)
    shapes = (inner, states), (inner, width - 1)
    starts = [DirectionStart(*(torch.randn(*s, generator=generator) for s in shapes)) for _ in range(2)]
    exact = [type(part)(*(tensor.double() for tensor in part)) for part in (*weights, *starts)]
    expected = ops.bidirectional_scan_from(xz.double(), *exact, backend="reference")
    given = [type(part)(*(tensor.to(device) for tensor in part)) for part in (*weights, *starts)]
    launched, scan_from = [], scan.scan_from
    monkeypatch.setattr(scan, "scan_from", lambda *inputs: launched.append(1) or scan_from(*inputs))
    out = ops.bidirectional_scan_from(xz.to(device), *given, backend="nvrtc")
    assert launched
    assert_close(out, expected, 2 * TOLERANCES[dtype], "out")
    zeros = [type(start)(*(torch.zeros_like(tensor) for tensor in start)) for start in given[2:]]
    assert ops.bidirectional_scan_from(xz[:, :0].to(device), *given, backend="nvrtc").shape[1] == 0
    found = ops.bidirectional_scan_from(xz.to(device), *given[:2], *zeros, backend="nvrtc")
    assert torch.equal(found, ops.bidirectional_scan(xz.to(device), *given[:2], backend="nvrtc"))


def test_a_prompt_that_has_to_be_composed(on_cpu):
    xz, _, (weights,) = build(1, 3, 8, 2, torch.bfloat16, directions=1)
    assert ops.causal_prompt(xz, weights, backend="nvrtc") is not None
    assert ops.causal_prompt(xz[:, :0], weights, backend="nvrtc") is None
    assert ops.causal_prompt(xz.float(), weights, backend="nvrtc") is None
    assert ops.causal_prompt(xz, weights, backend="torch") is None
    assert ops.causal_prompt(xz.requires_grad_(), weights, backend="nvrtc") is None
    with torch.no_grad():
        assert ops.causal_prompt(xz, weights, backend="nvrtc") is not None


@pytest.mark.parametrize("directions", [1, 2])
def test_what_is_covered(directions):
    for inner, rank in ((384, 12), (1536, 48), (2048, 64), (4096, 128)):
        xz, _, weights = build(1, 1, inner, rank, torch.bfloat16, directions)
        assert not mixer.refusals(xz, weights)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_compiler_sees_what_the_kernels_take(dynamic, on_cpu, monkeypatch):
    """Where they do not take it, and Triton is not there, the mixer is composed of other operations."""
    key = ("nvrtc", "bidirectional_scan")
    monkeypatch.setitem(dispatch._KERNELS, key, dispatch._KERNELS[key][:1])
    launched, forward = [], mixer.forward
    monkeypatch.setattr(mixer, "forward", lambda *inputs: launched.append(inputs) or forward(*inputs))
    torch._dynamo.reset()
    compiled = torch.compile(ops.bidirectional_scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens, inner, kernels in ((5, 8, True), (7, 8, True), (5, 9, False)):
        xz, _, weights = build(1, tokens, inner, 3, torch.bfloat16)
        exact = [DirectionWeights(*(weight.double() for weight in own)) for own in weights]
        expected = ops.bidirectional_scan(xz.double(), *exact, backend="reference")
        launched.clear()
        torch.testing.assert_close(compiled(xz, *weights).double(), expected, rtol=3e-2, atol=3e-2)
        assert bool(launched) == kernels
