"""Each operation of each backend answers to the naive definition, forward and gradients, whatever the sizes.

The device is a GPU where there is one. What runs in Triton elsewhere needs TRITON_INTERPRET=1 set before
Python starts.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from kernel_checks import assert_close

from vimtune import ops
from vimtune.ops import Backend, BackendUnavailable, dispatch, reference
from vimtune.ops.norm import NormKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of output and gradients, relative to the largest value. Kernels may round what they keep in between, and may
# compute in fp32 what is given as fp64.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 2e-5}
# mamba-ssm uses fast exponentials.
LOOSER = {"cuda": 100}


class Random:
    """Random tensors on the device: `low` of the dtype of activations, others at least fp32."""

    def __init__(self, dtype):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)

    def high(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.wide)

    def low(self, *shape):
        return self.high(*shape).to(self.dtype)


def scan(random, tokens, inner, states):
    sequences = [random.low(2, tokens, width) for width in (inner, inner, states, states, inner)]
    u, delta, B, C, z = sequences
    A = -random.high(inner, states).abs() - 0.1
    return [u, delta, A, B, C, random.high(inner), z, random.high(inner)]


def convolution(random, tokens, inner, states):
    return [random.low(2, tokens, inner), random.high(inner, 4), random.high(inner)]


def mixer(random, tokens, inner, states):
    rank = 3
    shapes = (
        (inner, 4),
        (inner,),
        (rank + 2 * states, inner),
        (inner, rank),
        (inner,),
        (inner, states),
        (inner,),
    )
    weights = [random.high(*shape) / max(shape[-1], 4) ** 0.5 for _ in range(2) for shape in shapes]
    return [random.low(2, tokens, 2 * inner), *weights]


def norm(random, tokens, inner, states):
    return [random.low(2, tokens, inner), random.high(2, tokens, inner), random.high(inner)]


def gated(random, tokens, inner, states):
    return [random.low(2, tokens, inner), random.low(2, tokens, 2 * inner), random.high(inner)]


def membranes(random, tokens, inner, states):
    """Halves, of which all dtypes can say alike whether their sums are above a threshold."""
    shapes = (2, tokens, 2 * inner), (2, tokens, inner)
    return [(2 * random.low(*shape)).round().clamp(-4, 4) / 2 for shape in shapes]


def silu_pair(random, tokens, inner, states):
    shape = 2, tokens, inner
    parts = [part for _ in range(2) for part in (random.low(*shape), random.high(inner))]
    return [random.high(*shape), *parts]


def product(random, tokens, inner, states):
    size = 4 if inner % 4 == 0 else 1
    return [random.low(tokens, inner), random.low(tokens), random.low(inner // size, size, size)]


def logits(random, tokens, inner, states):
    return [random.low(tokens, 100 * inner)]


def run_losses(logits, backend):
    labels = torch.arange(len(logits), device=logits.device) * 37 % logits.shape[1]
    return ops.token_losses(logits, torch.where(labels == 74, -100, labels), backend=backend)


def run_gated_norm(x, wide, weight, backend, groups=1):
    """The gate is a part of wider rows, as in a mixer."""
    groups = groups if len(weight) % groups == 0 else 1
    return ops.gated_rms_norm(x, wide[..., : len(weight)], weight, groups, 1e-5, backend)


def run_membrane(x, start, backend, chunks=4, handed_on=True):
    """The gates are the middle of `x`. The start is a result, too, so that it always has a gradient."""
    chunks = None if chunks is None else min(chunks, x.shape[1])  # each has at least a token
    places = min(3, x.shape[1]) if chunks is None else x.shape[1] // chunks
    begin = start[:, :places] if handed_on else None
    width = start.shape[2]
    options = {"first": width // 2, "width": width, "chunks": chunks, "length": 3, "tau": 0.5}
    result, mean = ops.membrane(x, begin, **options, threshold=0.5, backend=backend)
    parts = (result, mean, start) if handed_on else (result, start)
    return torch.cat([part.flatten() for part in parts])


def run_silu_pair(x, *pair, backend):
    return ops.add_silu_pair(x, *pair, x.shape[1] // 2, backend)


def run_mixer(xz, *weights, backend):
    half = len(weights) // 2
    directions = [ops.DirectionWeights(*part) for part in (weights[:half], weights[half:])]
    return ops.bidirectional_scan(xz, *directions, backend=backend)


# Of each operation: its tensors for sizes, and calls with each set of options that has kernels of its own.
OPERATIONS = {
    "selective_scan": (
        scan,
        [partial(ops.selective_scan, delta_softplus=True, reverse=reverse) for reverse in (False, True)],
    ),
    "causal_conv1d": (
        convolution,
        [partial(ops.causal_conv1d, silu=True, reverse=reverse) for reverse in (False, True)],
    ),
    "bidirectional_scan": (mixer, [run_mixer]),
    "add_rms_norm": (norm, [ops.add_rms_norm]),
    "gated_rms_norm": (gated, [run_gated_norm, partial(run_gated_norm, groups=4)]),
    "membrane": (
        membranes,
        [
            run_membrane,
            partial(run_membrane, chunks=3),
            partial(run_membrane, chunks=None),
            partial(run_membrane, handed_on=False),
            partial(run_membrane, chunks=None, handed_on=False),
        ],
    ),
    "add_silu_pair": (silu_pair, [run_silu_pair]),
    "token_losses": (logits, [run_losses]),
    "scaled_block_product": (product, [ops.scaled_block_product]),
}
SIZES = [(1, 8, 16), (5, 24, 16), (9, 7, 3), (11, 20, 5)]
"""Tokens (rows of a matrix), inner width, states."""

PAIRS = [
    (backend, operation)
    for backend in dispatch.BACKENDS
    for operation in OPERATIONS
    if dispatch.has_kernels(backend, operation)
]


def outcome(call, tensors, backend):
    """Outputs of a call, and gradients of all tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    found = call(*leaves, backend=backend)
    outputs = list(found) if isinstance(found, tuple) else [found]
    total = sum(
        (out.double() * torch.linspace(1, 2, out.numel(), device=out.device).view(out.shape)).sum()
        for out in outputs
    )
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, leaves)]


def test_every_operation_is_tested():
    """One for which some backend has kernels.

    Those of `ssd` have other sizes; test_ssd.py has them. Those without gradients are tested in
    test_mixer_start.py, test_nvrtc_mixer.py, test_nvrtc_step.py and test_nvrtc_ssd_step.py.
    """
    elsewhere = {"ssd", "causal_prompt", "causal_step", "ssd_mixer_step", "bidirectional_scan_from"}
    assert {operation for _, operation in dispatch._KERNELS} == {*OPERATIONS, *elsewhere}


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
    """Backend and operation, where the backend can run."""
    backend, _ = request.param
    reasons = {row.name: row.reasons for row in ops.backend_report(DEVICE)}[backend]
    if reasons and backend == "nvrtc" and DEVICE.type == "cpu":
        pytest.skip("run in the emulator by test_nvrtc*.py and test_block_product.py")
    if reasons:
        pytest.skip(f"backend {backend}: {'; '.join(reasons)}")
    if backend == "triton" and DEVICE.type == "cpu":
        from vimtune.ops.triton import launch

        # Short chunks and groups: the interpreter is slow.
        tiling = launch.Tiling(forward_steps=4, backward_steps=4, chunk=8)
        request.getfixturevalue("monkeypatch").setattr(launch, "TILING", tiling)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_answer_to_the_definition(pair, sizes, dtype):
    """What kernels refuse is computed by others or by the formula, or refused with the reason."""
    backend, operation = pair
    if (
        backend == "triton"
        and DEVICE.type == "cpu"
        and operation.endswith("scan")
        and dtype not in DTYPES[:2]
    ):
        pytest.skip("slow in Triton's interpreter, and in test_triton.py for some sizes")
    build, calls = OPERATIONS[operation]
    tensors = build(Random(dtype), *sizes)
    for call in calls:
        try:
            found = outcome(call, tensors, backend)
        except BackendUnavailable as error:
            assert f"backend {backend!r} cannot run this {operation} on {DEVICE.type}" in str(error)
            continue
        exact = outcome(call, [tensor.double() for tensor in tensors], "reference")
        for index, (actual, expected) in enumerate(zip(found, exact, strict=True)):
            tolerance = TOLERANCES[dtype] * LOOSER.get(backend, 1)
            assert_close(actual, expected, tolerance, f"result {index}", floor=1e-3)


class NarrowNorm(NormKernels):
    """The formula, for rows of up to eight numbers."""

    ran = 0

    def refusals(self, inputs):
        width = inputs.weight.shape[0]
        return [f"width {width} is above 8"] if width > 8 else []

    def forward(self, inputs, eps, dtype):
        NarrowNorm.ran += 1
        normed, total = reference.add_rms_norm(*inputs, eps, dtype)
        inverse = (total.float().square().mean(-1) + eps).rsqrt().flatten()
        return normed, total.new_empty(0) if inputs.branch is None else total, inverse

    def backward(self, grad_normed, grad_total, total, weight, inverse, branch_dtype, need_weight):
        scale = inverse.view(*total.shape[:-1], 1)
        unit, grad = total * scale, grad_normed * weight
        grad = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * scale
        grad = grad if grad_total is None else grad + grad_total
        own = (grad_normed * unit).flatten(0, -2).sum(0) if need_weight else None
        return grad, None if branch_dtype is None else grad.to(branch_dtype, copy=True), own


class OneOperation(Backend):
    """A backend of a user's package, which has kernels for one operation on the CPU."""

    name = "mine"
    summary = "a norm of my own"
    kernels = (NarrowNorm(),)

    def refusals(self, device):
        return [] if device.type == "cpu" else ["it runs on the CPU"]


@pytest.fixture
def mine(backends, monkeypatch):
    backends(OneOperation())
    monkeypatch.setattr(NarrowNorm, "ran", 0)


def norm_inputs(width):
    return [torch.randn(2, 3, width), torch.randn(2, 3, width), torch.randn(width)]


@pytest.mark.parametrize("backend", ["auto", "mine"])
def test_a_backend_with_one_operation_is_chosen_for_that_operation(mine, backend, caplog):
    with caplog.at_level(logging.INFO, logger="vimtune.ops"):
        tensors = norm_inputs(8)
        for actual, expected in zip(
            outcome(ops.add_rms_norm, tensors, backend),
            outcome(ops.add_rms_norm, tensors, "reference"),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected)
    assert NarrowNorm.ran == 1
    if backend == "auto":
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith(
            "add_rms_norm on cpu: backend mine (a norm of my own); not cpu: it has no kernels"
        )
    assert ops.has_add_rms_norm(backend, torch.device("cpu"))
    assert ops.resolved_backend("cpu", operation="add_rms_norm") == "mine"
    assert ops.resolved_backend("cpu") != "mine"


@pytest.mark.parametrize("backend", ["auto", "mine"])
def test_sizes_that_it_refuses_are_the_formula(mine, backend):
    tensors = norm_inputs(9)
    for actual, expected in zip(
        ops.add_rms_norm(*tensors, backend=backend),
        ops.add_rms_norm(*tensors, backend="reference"),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert NarrowNorm.ran == 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU has backends for this")
def test_reasons_are_given_where_there_is_no_formula(mine):
    tensors = norm_inputs(9)
    with pytest.raises(
        BackendUnavailable, match=r"'mine' cannot run this add_rms_norm on cpu: width 9 is above 8"
    ):
        torch.ops.vimtune.add_rms_norm(*tensors, 1e-5, torch.float32, "mine")
    with pytest.raises(
        BackendUnavailable, match=r"no backend can run add_rms_norm .*cpu: it has no .*mine: width 9"
    ):
        torch.ops.vimtune.add_rms_norm(*tensors, 1e-5, torch.float32)
    scan_tensors = scan(Random(torch.float32), 3, 4, 2)
    with pytest.raises(
        BackendUnavailable, match=r"'mine' cannot run this selective_scan on cpu: it has no kernels"
    ):
        ops.selective_scan(*scan_tensors, backend="mine")


def test_programs_without_the_argument_backend_run_and_are_differentiated(mine):
    """As of those that were exported before the operation had it."""
    tensors = [tensor.requires_grad_() for tensor in norm_inputs(8)]
    normed, total, _ = torch.ops.vimtune.add_rms_norm(*tensors, 1e-5, torch.float32)
    found = torch.autograd.grad((normed * total).sum(), tensors)
    normed, total = ops.add_rms_norm(*tensors, backend="reference")
    for actual, expected in zip(found, torch.autograd.grad((normed * total).sum(), tensors), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_compiler_sees_which_sizes_a_backend_takes(mine):
    torch._dynamo.reset()
    compiled = torch.compile(ops.add_rms_norm, fullgraph=True, backend="aot_eager")
    for width, ran in ((8, True), (9, False), (4, True), (16, False)):
        NarrowNorm.ran = 0
        tensors = norm_inputs(width)
        for actual, expected in zip(
            compiled(*tensors), ops.add_rms_norm(*tensors, backend="reference"), strict=True
        ):
            torch.testing.assert_close(actual, expected)
        assert bool(NarrowNorm.ran) == ran, width


def test_a_backend_that_is_registered_later_is_seen(backends):
    tensors = norm_inputs(8)
    ops.add_rms_norm(*tensors)
    backends(OneOperation())
    before = NarrowNorm.ran
    ops.add_rms_norm(*tensors)
    assert NarrowNorm.ran == before + 1


def test_names_with_a_meaning_of_their_own_are_refused(backends):
    class Misnamed(OneOperation):
        name = "auto"

    with pytest.raises(ValueError, match="backend 'auto': this name has a meaning"):
        backends(Misnamed())
