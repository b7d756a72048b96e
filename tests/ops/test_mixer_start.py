"""Mixers whose directions begin with a state and a convolution tail, against loops that show what these are.

Triton's kernels need a GPU, or TRITON_INTERPRET=1 set before Python starts; those of backend `nvrtc` run in
the emulator, too.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_close

from vimtune import ops
from vimtune.ops import DirectionStart, DirectionWeights, reference
from vimtune.ops.eager.scan import EagerScan
from vimtune.ops.scan import selective_scan_from

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NEEDS_TRITON = pytest.mark.skipif(
    not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs a GPU, or TRITON_INTERPRET=1 before Python starts",
)
BACKENDS = ["reference", "torch", pytest.param("triton", marks=NEEDS_TRITON)] + ([] if ON_GPU else ["cpu"])
SIZES = [(1, 8, 16, 4), (2, 24, 16, 4), (9, 7, 3, 3), (21, 20, 5, 6), (5, 8, 16, 1)]
"""Tokens, inner width, states, filter width."""
TOLERANCES = {torch.float32: 2e-5, torch.float64: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
RANK = 3


def build(tokens, inner, states, width, dtype=torch.float32, bias=True, batch=2):
    """`xz`, and weights and start of each direction."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE)

    def direction():
        return DirectionWeights(
            normal(inner, width, scale=0.5),
            normal(inner) if bias else None,
            normal(RANK + 2 * states, inner, scale=inner**-0.5),
            normal(inner, RANK, scale=RANK**-0.5),
            normal(inner) - 2,
            normal(inner, states, scale=0.5),
            normal(inner),
            normal(inner, states) if bias else None,
        )

    def start():
        return DirectionStart(normal(inner, states), normal(inner, width - 1))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = direction(), direction(), start(), start()
    return normal(batch, tokens, 2 * inner).to(dtype), *(_map(pair, lambda x: x.to(wide)) for pair in pairs)


def _map(tensors, function):
    """`function` of every tensor of a named tuple."""
    return type(tensors)(*(None if tensor is None else function(tensor) for tensor in tensors))


def by_loops(xz, weights, start, reverse):
    """One direction, token after token: u (E,), state (E, N); what the formulas say, in fp64."""
    xz, weights, start = xz.double(), _map(weights, torch.Tensor.double), _map(start, torch.Tensor.double)
    inner = xz.shape[-1] // 2
    out = torch.zeros(*xz.shape[:2], inner, dtype=torch.float64, device=xz.device)
    A = -weights.A_log.exp()
    for sample in range(xz.shape[0]):
        state, seen = start.state, list(start.tail.unbind(1))
        tokens = range(xz.shape[1])
        for t in tokens[::-1] if reverse else tokens:
            x, z = xz[sample, t].split(inner)
            seen.append(x)
            window = torch.stack(seen[-weights.conv_weight.shape[1] :], 1)
            bias = 0 if weights.conv_bias is None else weights.conv_bias
            u = F.silu((window * weights.conv_weight).sum(1) + bias)
            dt, B, C = (weights.x_proj @ u).split([RANK, A.shape[1], A.shape[1]])
            step = F.softplus(weights.dt_proj @ dt + weights.dt_bias)
            state = torch.exp(step[:, None] * A) * state + (step * u)[:, None] * B
            read = state if weights.offset is None else state + weights.offset
            out[sample, t] = (read @ C + weights.D * u) * F.silu(z)
    return out


def expected_of(xz, forward, reverse, forward_start, reverse_start):
    """The average of both directions."""
    ahead = by_loops(xz, forward, forward_start, False)
    return (ahead + by_loops(xz, reverse, reverse_start, True)) / 2


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_begins_with_a_state(backend, sizes, dtype):
    given = build(*sizes, dtype, bias=sizes[0] != 9)
    found = ops.bidirectional_scan_from(*given, backend=backend)
    assert found.dtype == dtype
    assert_close(found, expected_of(*given), TOLERANCES[dtype], backend)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_gradients_are_those_of_the_definition(backend):
    """They pass through the operations of which it is composed."""
    given = build(6, 8, 4, 4)

    def gradients(given, backend):
        leaves = [given[0], *(tensor for part in given[1:] for tensor in part if tensor is not None)]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        xz, *rest = leaves
        parts = [DirectionWeights(*rest[:8]), DirectionWeights(*rest[8:16])]
        starts = [DirectionStart(*rest[16:18]), DirectionStart(*rest[18:])]
        out = ops.bidirectional_scan_from(xz, *parts, *starts, backend=backend)
        return torch.autograd.grad(out.double().square().sum(), leaves)

    exact = (given[0].double(), *(_map(part, torch.Tensor.double) for part in given[1:]))
    for index, (found, expected) in enumerate(
        zip(gradients(given, backend), gradients(exact, "reference"), strict=True)
    ):
        assert expected.abs().max() > 0
        assert_close(found, expected, 1e-4, f"gradient {index}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_of_zeros_is_the_plain_mixer(backend):
    xz, forward, reverse, *starts = build(9, 8, 16, 4)
    zeros = [_map(start, torch.zeros_like) for start in starts]
    found = ops.bidirectional_scan_from(xz, forward, reverse, *zeros, backend=backend)
    plain = ops.bidirectional_scan(xz, forward, reverse, backend=backend)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_that_begin_with_zeros_do_as_well(reverse, monkeypatch):
    """mamba-ssm's are such kernels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 9, 6), "delta": (2, 9, 6), "B": (2, 9, 5), "C": (2, 9, 5), "z": (2, 9, 6)}
    shapes |= {"A": (6, 5), "D": (6,), "delta_bias": (6,), "state": (6, 5)}
    given = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    given["A"] = -given["A"].exp()
    options = {"delta_softplus": True, "reverse": reverse}

    def outcome(given, backend):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
        out = selective_scan_from(**leaves, **options, backend=backend)
        return [out, *torch.autograd.grad(out.double().square().sum(), list(leaves.values()))]

    expected = outcome({name: value.double() for name, value in given.items()}, "reference")
    monkeypatch.setattr(EagerScan, "refusals", lambda self, inputs: [] if inputs.state is None else ["zeros"])
    for found, exact in zip(outcome(given, "torch"), expected, strict=True):
        assert_close(found, exact, 1e-4, "result")


def test_no_tokens_and_no_images():
    xz, *rest = build(4, 8, 3, 4)
    assert ops.bidirectional_scan_from(xz[:, :0], *rest).shape == (2, 0, 8)
    assert ops.bidirectional_scan_from(xz[:0], *rest).shape == (0, 4, 8)


def test_a_start_that_does_not_fit_is_named():
    xz, forward, reverse, start, other = build(4, 8, 3, 4)
    with pytest.raises(ValueError, match=r"reverse state is \(8, 2\), expected \(8, 3\)"):
        ops.bidirectional_scan_from(xz, forward, reverse, start, other._replace(state=other.state[:, :2]))
    with pytest.raises(ValueError, match=r"forward tail is \(8, 4\), expected \(8, 3\)"):
        ops.bidirectional_scan_from(xz, forward, reverse, start._replace(tail=torch.ones(8, 4)), other)


def test_compiler_and_torchscript_see_the_start():
    given = build(5, 8, 4, 4)
    expected = ops.bidirectional_scan_from(*given)
    compiled = torch.compile(ops.bidirectional_scan_from, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), expected)
    scripted = torch.jit.script(ops.bidirectional_scan_from)
    torch.testing.assert_close(scripted(*given), expected)


def test_tokens_before_the_others_leave_their_state_behind():
    """Their last inputs are the tail."""
    xz, forward, reverse, *_ = build(12, 8, 3, 4)
    forward, reverse = (_map(weights, torch.Tensor.double) for weights in (forward, reverse))
    xz = xz.double()
    zeros = DirectionStart(*(torch.zeros(8, 3, dtype=torch.float64, device=DEVICE) for _ in range(2)))
    whole = by_loops(xz, forward, zeros, False)
    before = xz[:1, :5, :8]
    u = reference.causal_conv1d(before, forward.conv_weight, forward.conv_bias, True)
    dt, B, C = (u @ forward.x_proj.t()).split([RANK, 3, 3], -1)
    given = u, dt @ forward.dt_proj.t(), -forward.A_log.exp(), B, C
    _, state = reference.stateful_scan(*given, delta_bias=forward.dt_bias, delta_softplus=True)
    start = DirectionStart(state[0], before[0, -3:].t())
    torch.testing.assert_close(by_loops(xz[:1, 5:], forward, start, False), whole[:1, 5:])
