"""The mixer of backend `nvrtc` as a whole: no kernel depends on the order in which threads and blocks run."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import TOLERANCES, assert_close, build_weights

import vimtune
from vimtune import ops
from vimtune.models.mixer import BiMambaMixer
from vimtune.ops import DirectionStart, DirectionWeights, dispatch, reference
from vimtune.ops.nvrtc import mixer, scan


def mapped(part, *place):
    """Weights or a start of a direction in another dtype or on another device."""
    return type(part)(*(None if tensor is None else tensor.to(*place) for tensor in part))


def build(batch, tokens, inner, rank, dtype, directions=2, width=4, num_states=16, offset=False):
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    around = build_weights(inner, rank, width, True, "cpu", tokens, num_states, directions)
    weights = [
        DirectionWeights(
            *(each[d] for each in around.values()),
            *(0.5 * normal(inner, num_states), normal(inner)),
            normal(inner, num_states) if offset else None,
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
    with_offset = num_states == 22
    xz, grad, weights = build(batch, tokens, inner, 5, dtype, directions, 4, num_states, with_offset)

    def run():
        results = mixer.forward(xz, weights, True)
        grad_xz, grads = mixer.backward(grad, xz, results, weights, True, [[trained] * 8] * directions)
        out, projections, _ = results
        return [out, projections, grad_xz, *(g for own in grads for g in own if g is not None)]

    forwards, backwards = in_both_orders(run)
    assert len(forwards) == 3 + ((7 + with_offset) * directions if trained else 0)
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
    with_offset = states == 22
    xz, _, (weights,) = build(batch, tokens, inner, 5, dtype, 1, num_states=states, offset=with_offset)
    xz, own, exact = xz.to(device), mapped(weights, device), mapped(weights, torch.float64)
    u = reference.causal_conv1d(xz.cpu().double()[..., :inner], exact.conv_weight, exact.conv_bias, True)
    dt, B, C = (u @ exact.x_proj.t()).split([5, states, states], dim=-1)
    given = (u, dt @ exact.dt_proj.t(), -exact.A_log.exp(), B, C, exact.D, xz.cpu().double()[..., inner:])
    expected, state = reference.stateful_scan(*given, exact.dt_bias, True)
    if with_offset:
        expected = expected + C @ exact.offset.t() * torch.nn.functional.silu(given[-1])
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
    numbers = {"width": width, "num_states": states, "offset": states == 22}
    xz, _, weights = build(batch, tokens, inner, 5, dtype, **numbers)
    generator = torch.Generator().manual_seed(1)
    shapes = (inner, states), (inner, width - 1)
    starts = [DirectionStart(*(torch.randn(*s, generator=generator) for s in shapes)) for _ in range(2)]
    exact = [mapped(part, torch.float64) for part in (*weights, *starts)]
    expected = ops.bidirectional_scan_from(xz.double(), *exact, backend="reference")
    given = [mapped(part, device) for part in (*weights, *starts)]
    launched, scan_from = [], scan.scan_from
    monkeypatch.setattr(scan, "scan_from", lambda *inputs: launched.append(1) or scan_from(*inputs))
    out = ops.bidirectional_scan_from(xz.to(device), *given, backend="nvrtc")
    assert launched
    assert_close(out, expected, 2 * TOLERANCES[dtype], "out")
    zeros = [type(start)(*(torch.zeros_like(tensor) for tensor in start)) for start in given[2:]]
    assert ops.bidirectional_scan_from(xz[:, :0].to(device), *given, backend="nvrtc").shape[1] == 0
    found = ops.bidirectional_scan_from(xz.to(device), *given[:2], *zeros, backend="nvrtc")
    assert torch.equal(found, ops.bidirectional_scan(xz.to(device), *given[:2], backend="nvrtc"))


@pytest.mark.parametrize("directions, trained", [(2, False), (1, True)])
def test_offsets_and_their_gradients(device, directions, trained, monkeypatch):
    """Alone, or together with all other weights; against the composition of the definitions in fp64."""
    xz, grad, weights = build(2, 11, 40, 5, torch.bfloat16, directions, num_states=16, offset=True)
    function = ops.bidirectional_scan if directions == 2 else ops.causal_mixer
    launched, backward = [], mixer.backward
    monkeypatch.setattr(mixer, "backward", lambda *inputs: launched.append(1) or backward(*inputs))

    def run(backend, dtype, place):
        wide = torch.promote_types(dtype, torch.float32)
        own = [mapped(each, place, wide) for each in weights]
        wanted = [weight for each in own for weight in (each if trained else each[-1:])]
        leaves = [xz.to(place, dtype).requires_grad_(), *(weight.requires_grad_() for weight in wanted)]
        out = function(leaves[0], *own, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad.to(place, dtype))]

    found = run("nvrtc", torch.bfloat16, device)
    for index, (one, other) in enumerate(zip(found, run("reference", torch.float64, "cpu"), strict=True)):
        assert_close(one.cpu(), other, 2 * TOLERANCES[torch.bfloat16], str(index))
    assert launched


def test_one_of_two_directions_with_an_offset_is_composed(on_cpu):
    xz, _, weights = build(1, 5, 8, 3, torch.bfloat16, offset=True)
    weights[1] = weights[1]._replace(offset=None)
    assert mixer.refusals(xz, weights) == ["one of two directions has an offset"]
    exact = [mapped(own, torch.float64) for own in weights]
    expected = ops.bidirectional_scan(xz.double(), *exact, backend="reference")
    assert_close(ops.bidirectional_scan(xz, *weights, backend="torch"), expected, 3e-2, "out")


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
        exact = [mapped(own, torch.float64) for own in weights]
        expected = ops.bidirectional_scan(xz.double(), *exact, backend="reference")
        launched.clear()
        torch.testing.assert_close(compiled(xz, *weights).double(), expected, rtol=3e-2, atol=3e-2)
        assert bool(launched) == kernels


def test_more_states_and_offsets_of_adapters_reach_the_kernels(on_cpu, monkeypatch):
    """Forward and backward of a mixer under rules are one launch of the kernels, with what the rules give."""
    own = BiMambaMixer(16, backend="nvrtc")
    vimtune.inject(torch.nn.Sequential(own), "additional_scan+state_offset", num_states=6)
    seen, scan_backward = [], scan.scan_backward

    def watched(grad, out, inputs, *rest, **options):
        seen.append((inputs.num_states(), len(inputs.offsets)))
        return scan_backward(grad, out, inputs, *rest, **options)

    monkeypatch.setattr(scan, "scan_backward", watched)
    xz = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    own.scan(xz).float().square().sum().backward()
    assert seen == [(22, 2)]
    trained = [parameter for parameter in own.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    shapes = [*[(6, 32)] * 4, *[(32, 6)] * 2, *[(32, 22)] * 2]
    assert sorted(tuple(parameter.shape) for parameter in trained) == shapes
