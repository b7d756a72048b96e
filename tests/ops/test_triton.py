"""The Triton kernels answer to the reference.

Without a GPU they run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/ops/test_triton.py
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from kernel_checks import AUTOGRAD_OPCHECKS, OPCHECKS, ZERO_A, assert_close

from vimtune import ops
from vimtune.models.mixer import BiMambaMixer
from vimtune.ops import reference

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 set before Python starts", allow_module_level=True)

from vimtune.ops.nvrtc import mixer as nvrtc_mixer
from vimtune.ops.nvrtc import scan
from vimtune.ops.triton import cross_entropy, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding what enters the scan to bf16, and all else exact, already moves gradients of weights by 3.4e-2 (two
# tokens); and where a GPU rounds to bf16, the interpreter cuts off.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks, and groups inside a chunk, within few tokens: the interpreter is slow."""
    if DEVICE == "cpu":
        tiling = launch.Tiling(forward_steps=4, backward_steps=4, chunk=8)
        monkeypatch.setattr(launch, "TILING", tiling)


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def gradients(function, inputs: dict, grad):
    leaves = {
        name: None if x is None else x.detach().clone().requires_grad_(x.is_floating_point())
        for name, x in inputs.items()
    }
    out = function(**leaves)
    wanted = {name: x for name, x in leaves.items() if x is not None}
    return out, dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))


@pytest.mark.parametrize(
    "tokens, inner, states, reverse, dtype, absent, delta_scale",
    [
        (1, 7, 4, False, torch.float32, (), 1.0),
        (2, 33, 5, True, torch.float32, ("D",), 30.0),
        (13, 24, 16, False, torch.float32, ("z", "delta_bias"), 1e-4),
        (18, 8, 22, True, torch.float32, (), 1.0),
        (9, 24, 16, True, torch.bfloat16, (), 1.0),
        (9, 24, 3, False, torch.float16, ("z",), 1.0),
    ],
)
def test_scan(tokens, inner, states, reverse, dtype, absent, delta_scale):
    generator = torch.Generator().manual_seed(0)
    wide = normal(generator, 2, tokens, 2 * inner, dtype=dtype)
    narrow = normal(generator, 2, tokens, 2 * states + 3, dtype=dtype)
    inputs = {
        "u": wide[..., :inner],
        "delta": delta_scale * normal(generator, 2, tokens, inner, dtype=dtype),
        "A": -torch.rand(inner, states, generator=generator).to(DEVICE) * states - 0.1,
        "B": narrow[..., 3 : 3 + states],
        "C": narrow[..., 3 + states :],
        "D": normal(generator, inner),
        "z": wide[..., inner:],
        "delta_bias": normal(generator, inner),
    }
    inputs = {name: None if name in absent else x for name, x in inputs.items()}
    grad = normal(generator, 2, tokens, inner, dtype=dtype)
    options = {"delta_softplus": True, "reverse": reverse}
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    expected, expected_grads = gradients(
        lambda **x: reference.selective_scan(**x, **options), exact, grad.double()
    )
    # Views reach the kernels as they are: `gradients` would make them contiguous.
    viewed = ops.selective_scan(**inputs, **options, backend="triton")
    out, grads = gradients(lambda **x: ops.selective_scan(**x, **options, backend="triton"), inputs, grad)
    assert torch.equal(viewed, out)
    assert_close(out, expected, TOLERANCES[dtype], "out")
    for name, value in grads.items():
        assert torch.isfinite(value).all(), name
        assert value.dtype == inputs[name].dtype
        assert_close(value, expected_grads[name], TOLERANCES[dtype], name)


@pytest.mark.parametrize("wanted", [("u",), ("A",), ("z",), ("B", "delta_bias")])
def test_scan_computes_only_what_is_asked_for(wanted):
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: normal(generator, 1, 5, width)
        for name, width in (("u", 8), ("delta", 8), ("B", 4), ("C", 4), ("z", 8))
    }
    inputs |= {
        "A": -torch.rand(8, 4).to(DEVICE),
        "D": normal(generator, 8),
        "delta_bias": normal(generator, 8),
    }
    everything = gradients(
        lambda **x: ops.selective_scan(**x, backend="triton"), inputs, torch.ones(1, 5, 8, device=DEVICE)
    )[1]
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    ops.selective_scan(**leaves, backend="triton").sum().backward()
    for name, leaf in leaves.items():
        if name in wanted:
            assert_close(leaf.grad, everything[name], 1e-6, name)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize(
    "tokens, reverse, silu, bias", [(1, False, True, True), (6, True, True, False), (35, False, False, True)]
)
def test_convolution(tokens, reverse, silu, bias):
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": normal(generator, 2, tokens, 20), "weight": normal(generator, 20, 4)}
    inputs["bias"] = normal(generator, 20) if bias else None
    grad = normal(generator, 2, tokens, 20)
    options = {"silu": silu, "reverse": reverse}

    def convolve(x, **weights):
        """The convolution of the first columns of wider rows, as in Mamba-2."""
        wide = torch.cat([x, x[..., :8]], dim=-1)
        return ops.causal_conv1d(wide[..., :20], **weights, **options, backend="triton")

    expected, expected_grads = gradients(lambda **x: reference.causal_conv1d(**x, **options), inputs, grad)
    out, grads = gradients(convolve, inputs, grad)
    assert_close(out, expected, 1e-6, "out")
    for name, value in grads.items():
        assert_close(value, expected_grads[name], 2e-6, name)


def direction_weights(generator, inner, states, rank, width, bias):
    return {
        "conv_weight": normal(generator, inner, width) / 2,
        "conv_bias": normal(generator, inner) if bias else None,
        "x_proj": normal(generator, rank + 2 * states, inner) / inner**0.5,
        "dt_proj": normal(generator, inner, rank) / rank**0.5,
        "dt_bias": normal(generator, inner) - 2,
        "A_log": (torch.rand(inner, states, generator=generator) * 2).to(DEVICE),
        "D": normal(generator, inner),
    }


@pytest.mark.parametrize("labels", [("forward", "reverse"), ("forward",)], ids=["both", "causal"])
@pytest.mark.parametrize(
    "backend, tokens, inner, states, rank, width, bias, dtype",
    [
        ("triton", 9, 24, 5, 3, 4, True, torch.float32),
        ("triton", 17, 8, 16, 2, 3, False, torch.float32),
        ("triton", 7, 32, 16, 12, 4, True, torch.bfloat16),
        ("triton", 2, 8, 4, 1, 4, True, torch.float16),
        ("triton", 1, 24, 16, 3, 4, True, torch.float16),
        ("nvrtc", 19, 72, 16, 5, 4, True, torch.bfloat16),
        ("nvrtc", 6, 8, 22, 17, 3, False, torch.float16),
        ("nvrtc", 1, 200, 16, 7, 4, True, torch.float16),
        ("nvrtc", 3, 9, 7, 2, 4, True, torch.bfloat16),  # sizes that only Triton has
    ],
)
def test_mixer(backend, tokens, inner, states, rank, width, bias, dtype, labels, request):
    """Output and every gradient, compared with the composition of the definitions in fp64."""
    mixer = ops.bidirectional_scan if "reverse" in labels else ops.causal_mixer
    if backend == "nvrtc" and DEVICE == "cpu":
        request.getfixturevalue("on_cpu")
    generator = torch.Generator().manual_seed(2)
    inputs = {"xz": normal(generator, 2, tokens, 2 * inner, dtype=dtype)}
    for label in labels:
        own = direction_weights(generator, inner, states, rank, width, bias)
        inputs |= {f"{label}.{name}": x for name, x in own.items()}

    def apply(function):
        def call(**flat):
            directions = [
                ops.DirectionWeights(*(flat.get(f"{label}.{name}") for name in ops.DirectionWeights._fields))
                for label in labels
            ]
            return function(flat["xz"], *directions)

        return call

    grad = normal(generator, 2, tokens, inner, dtype=dtype)
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    expected, expected_grads = gradients(apply(partial(mixer, backend="reference")), exact, grad.double())
    with ops.use_backend(backend):
        out, grads = gradients(apply(mixer), inputs, grad)
        frozen = inputs["xz"].detach().requires_grad_()
        apply(mixer)(**{**inputs, "xz": frozen}).backward(grad)
    assert_close(out, expected, TOLERANCES[dtype], "out")
    for name, value in grads.items():
        floor = ZERO_A / len(labels) if backend == "nvrtc" and name.endswith("A_log") else 0.0
        assert_close(value, expected_grads[name], 2 * TOLERANCES[dtype], name, floor)
    # What is wanted decides what Triton compiles: in half precision such kernels may round differently.
    may_differ = DEVICE == "cuda" and backend == "triton" and dtype != torch.float32
    rounding = torch.finfo(dtype).eps if may_differ else 0.0
    assert_close(frozen.grad, grads["xz"], rounding, "xz with frozen weights")


@pytest.mark.parametrize("directions, name", [(2, "bidirectional_scan"), (1, "causal_mixer")])
def test_segments_of_a_sequence_reach_the_backward(directions, name, request, monkeypatch):
    """The operation with sequences cut into pieces: same results, shapes as its fake implementation says."""
    operation = getattr(torch.ops.vimtune, name)
    if DEVICE == "cpu":
        request.getfixturevalue("on_cpu")
    generator = torch.Generator().manual_seed(8)
    xz = normal(generator, 1, 11, 16, dtype=torch.bfloat16).requires_grad_()
    own = [direction_weights(generator, 8, 16, 2, 4, True) for _ in range(directions)]
    weights = [x for direction in own for x in ops.DirectionWeights(**direction)]
    grad = normal(generator, 1, 11, 8, dtype=torch.bfloat16)
    results = []
    for segments in (1, 3):
        monkeypatch.setattr(scan, "num_segments", lambda *sizes, found=segments: found)
        arguments = (xz, *weights, True, "nvrtc")
        torch.library.opcheck(operation, arguments, test_utils=AUTOGRAD_OPCHECKS)
        out = operation(*arguments)[0]
        results.append([out, *torch.autograd.grad(out, xz, grad)])
    for label, whole, pieces in zip(("out", "xz"), *results, strict=True):
        assert_close(pieces, whole, 8e-3, label)


def test_what_nobody_trains_is_not_saved(request, monkeypatch):
    if DEVICE == "cpu":
        request.getfixturevalue("on_cpu")
    seen, forward = [], nvrtc_mixer.forward

    def watched(xz, weights, save):
        seen.append(save)
        return forward(xz, weights, save)

    monkeypatch.setattr(nvrtc_mixer, "forward", watched)
    generator = torch.Generator().manual_seed(9)
    xz = normal(generator, 1, 3, 16, dtype=torch.bfloat16)
    weights = [ops.DirectionWeights(**direction_weights(generator, 8, 16, 2, 4, True)) for _ in range(2)]
    trained = weights[0]._replace(D=weights[0].D.clone().requires_grad_())
    ops.bidirectional_scan(xz, *weights, backend="nvrtc")
    ops.bidirectional_scan(xz, trained, weights[1], backend="nvrtc")
    with torch.no_grad():
        ops.bidirectional_scan(xz, trained, weights[1], backend="nvrtc")
    assert seen == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 63, 65, 197, 500, 730])
@pytest.mark.parametrize("backend", ["triton", "nvrtc"])
@pytest.mark.parametrize("labels", [("forward", "reverse"), ("forward",)], ids=["both", "causal"])
def test_mixer_at_odd_lengths(labels, backend, tokens, dtype):
    test_mixer(backend, tokens, 200, 16, 7, 4, True, dtype, labels, None)


@pytest.mark.parametrize("has_branch", [True, False])
def test_add_rms_norm(has_branch):
    generator = torch.Generator().manual_seed(3)
    branch = normal(generator, 3, 5, 24, dtype=torch.bfloat16) if has_branch else None
    residual, weight = normal(generator, 3, 5, 24), normal(generator, 24)
    grads = normal(generator, 3, 5, 24), normal(generator, 3, 5, 24)
    results = []
    for backend in ("reference", "triton"):
        leaves = [None if x is None else x.detach().requires_grad_() for x in (branch, residual, weight)]
        normed, total = ops.add_rms_norm(*leaves, backend=backend)
        wanted = [leaf for leaf in leaves if leaf is not None]
        loss = (normed * grads[0]).sum() + (total * grads[1]).sum()
        results.append([normed, total, *torch.autograd.grad(loss, wanted)])
    for index, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, 1e-6 if actual.dtype == torch.float32 else 8e-3, str(index))


@pytest.mark.parametrize("part", [16, 4096])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_token_losses(dtype, part, monkeypatch):
    """Rows that are read in one piece and in several, logits far from zero and of minus infinity."""
    monkeypatch.setattr(cross_entropy, "LONGEST_PART", part)
    generator = torch.Generator().manual_seed(5)
    logits = normal(generator, 9, 37, dtype=dtype) * 5
    logits[0], logits[1, :30], logits[2] = -200, -float("inf"), logits[2] + 100
    labels = torch.tensor([0, 36, 20, 5, -100, 16, 15, 31, 32], device=DEVICE)
    grad = normal(generator, 9)
    results = []
    for backend in ("reference", "triton"):
        leaf = logits.clone().requires_grad_()
        losses = ops.token_losses(leaf, labels, backend=backend)
        results.append((losses.detach(), *torch.autograd.grad(losses, leaf, grad)))
    assert results[1][0].dtype == torch.float32 and results[1][0][4] == 0 and not results[1][1][4].any()
    assert_close(results[1][0], results[0][0], 1e-6, "losses")
    assert_close(results[1][1], results[0][1], TOLERANCES[dtype], "gradient")


def test_a_label_that_is_no_token_gives_no_number():
    logits = torch.zeros(3, 5, device=DEVICE)
    labels = torch.tensor([5, -1, 4], device=DEVICE)
    assert ops.token_losses(logits, labels, backend="triton").isnan().tolist() == [True, True, False]


def test_custom_ops_are_registered_correctly():
    generator = torch.Generator().manual_seed(4)
    xz = normal(generator, 1, 3, 16).requires_grad_()
    own = [direction_weights(generator, 8, 4, 2, 4, True) for _ in range(2)]
    weights = [x for direction in own for x in ops.DirectionWeights(**direction)]
    torch.library.opcheck(
        torch.ops.vimtune.bidirectional_scan, (xz, *weights, True, "triton"), test_utils=AUTOGRAD_OPCHECKS
    )
    with torch.no_grad():
        kept = torch.ops.vimtune.bidirectional_scan(xz, *weights, True, "triton")
    for needs in ([True] * 17, [True] + 8 * [False, True]):
        torch.library.opcheck(
            torch.ops.vimtune.mixer_backward,
            (kept[0], xz.detach(), *kept, weights, needs, "triton"),
            test_utils=OPCHECKS,
        )
    norm = (
        normal(generator, 2, 8).requires_grad_(),
        normal(generator, 2, 8),
        normal(generator, 8),
        1e-5,
        torch.float32,
        "triton",
    )
    torch.library.opcheck(torch.ops.vimtune.add_rms_norm, norm, test_utils=AUTOGRAD_OPCHECKS)


def test_backward_is_deterministic():
    generator = torch.Generator().manual_seed(5)
    xz = normal(generator, 1, 9, 80, dtype=torch.bfloat16).requires_grad_()
    directions = [
        ops.DirectionWeights(*direction_weights(generator, 40, 16, 2, 4, True).values()) for _ in range(2)
    ]
    runs = [
        torch.autograd.grad(ops.bidirectional_scan(xz, *directions, "triton").sum(), xz)[0] for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("name, shape", [("x_proj", (9, 8)), ("D", (7,))])
def test_wrong_shapes_are_named(name, shape):
    generator = torch.Generator().manual_seed(6)
    good = ops.DirectionWeights(*direction_weights(generator, 8, 4, 2, 4, True).values())
    with pytest.raises(ValueError, match=f"reverse {name} is"):
        bad = good._replace(**{name: torch.zeros(shape, device=DEVICE)})
        ops.bidirectional_scan(normal(generator, 1, 3, 16), good, bad, "triton")


def test_mixer_compiles_without_graph_breaks():
    """The whole mixer, fused scan and norm included, as one graph with the eager result and gradients."""
    mixer = BiMambaMixer(8, d_state=4, backend="triton").to(DEVICE)
    norm_weight = torch.ones(8, device=DEVICE, requires_grad=True)
    x = normal(torch.Generator().manual_seed(7), 1, 5, 8).requires_grad_()

    def block(x):
        normed, total = ops.add_rms_norm(None, x, norm_weight, backend="triton")
        return ops.add_rms_norm(mixer(normed), total, norm_weight, backend="triton")[0]

    eager = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert_close(compiled, eager, 1e-6, "out")
    expected, actual = (torch.autograd.grad(out.square().sum(), x)[0] for out in (eager, compiled))
    assert_close(actual, expected, 1e-6, "x")
