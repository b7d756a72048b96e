"""Blocks that sum and norm in one operation compute what the plain sequence computes.

The Triton kernel needs a GPU, or its interpreter: TRITON_INTERPRET=1 pytest tests/models/test_fused_blocks.py
Without either the pairs are still carried, through the composition that the kernel replaces.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import timm
import torch
from torch import nn

import vimtune
from vimtune import ops
from vimtune.adapters.slots import computed_ahead
from vimtune.models import layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None and (
    DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
)
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="needs Triton and a GPU, or TRITON_INTERPRET=1 set before Python starts"
)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""Relative errors; on an H200 gradients of small biases differ by up to 3.0e-6, in Triton's interpreter on an
AMD EPYC those of a weight by 1.0e-5."""


@pytest.fixture(params=["reference", pytest.param("triton", marks=needs_triton)])
def fuse(request, monkeypatch):
    """Turn carrying pairs on or off; the mixers run as ever. Returns the calls of `add_rms_norm` it sees."""

    def turn(on: bool) -> list[tuple]:
        calls: list[tuple] = []

        def watched(branch, residual, weight, eps, backend):
            calls.append((branch, residual))
            return ops.add_rms_norm(branch, residual, weight, eps, request.param)

        monkeypatch.setattr(layers, "has_add_rms_norm", lambda *_: on)
        monkeypatch.setattr(layers, "add_rms_norm", watched)
        return calls

    turn.exact = request.param == "reference" and DEVICE == "cpu"  # cuDNN's gradients vary by rounding
    return turn


def carried(calls):
    """Those calls that do a residual add of one block together with the norm of the next."""
    return [branch for branch, _ in calls if branch is not None]


def build(**options):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=4, backend="torch", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(DEVICE)


def images(dtype=torch.float32):
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def step(model, x, amp=None):
    """Tokens, and every gradient of a loss that all of them enter."""
    torch.manual_seed(2)  # stochastic depth
    model.zero_grad()
    with torch.autocast(DEVICE, amp, enabled=amp is not None):
        tokens = model.forward_features(x)
        logits = model.forward_head(tokens)
    (logits.float().square().sum() + tokens.float().square().mean()).backward()
    return tokens, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(plain, fused, tolerance):
    assert fused[0].dtype == plain[0].dtype
    for name in plain[1]:
        assert (plain[1][name] is None) == (fused[1][name] is None), name
    pairs = {"tokens": (plain[0], fused[0])}
    pairs |= {name: (grad, fused[1][name]) for name, grad in plain[1].items() if grad is not None}
    for name, (expected, actual) in pairs.items():
        error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop_path_rate": 0.5},
        {"peft": "full"},
        {"peft": "bitfit"},
        {"peft": "lora"},
        {"peft": "prodial"},
        {"peft": "ft", "peft_targets": ["norm.weight"]},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()) or "base",
)
def test_step_equals_the_plain_sequence(fuse, options, amp):
    """Tokens and gradients: equal bits for the composition, but for rounding for kernels and rules."""
    model = build(**options).train()
    results = []
    for on in (False, True):
        calls = fuse(on)
        results.append(step(model, images(), amp))
        assert len(calls) == (len(model.layers) if on else 0)
    assert calls[0][0] is None
    if amp is not None:
        assert {branch.dtype for branch, _ in calls[1:]} == {amp}
    assert {residual.dtype for _, residual in calls} == {torch.float32}
    exact = fuse.exact and options.get("peft") not in ("lora", "prodial")  # rules are computed together
    assert_same(*results, 0.0 if exact else TOLERANCES[amp or torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(fuse, dtype):
    model = build().to(dtype)
    results = []
    for on in (False, True):
        calls = fuse(on)
        with torch.no_grad():
            results.append(model.forward_features(images(dtype)))
    assert {residual.dtype for _, residual in calls} == {torch.float32}
    assert_same((results[0], {}), (results[1], {}), 2e-2)


def hook(model, place):
    return model.get_submodule(place).register_forward_hook(lambda *_: None)


class Doubled(layers.Block):
    def forward(self, x):
        return 2 * super().forward(x)


def replace_forward(model, place):
    module = model.get_submodule(place)
    original = module.forward
    module.forward = lambda x: 2 * original(x)


def replace_norm(model, place):
    model.layers[1].norm = nn.Identity()


def change_class(model, place):
    model.get_submodule(place).__class__ = Doubled


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (hook, "layers.1"),
        (hook, "layers.0.norm"),
        (replace_forward, "layers.2"),
        (replace_forward, "layers.0.norm"),
        (change_class, "layers.1"),
        (replace_norm, "layers.1.norm"),
    ],
)
def test_plain_where_a_block_is_more_than_its_parts(fuse, change, place):
    model = build().eval()
    results = []
    change(model, place)
    for on in (False, True):
        calls = fuse(on)
        results.append(step(model, images()))
        assert not carried(calls)
    assert_same(*results, TOLERANCES[torch.float32])


def test_a_block_whose_update_has_a_rule_has_the_kernel_of_its_norm(fuse):
    model = build()
    vimtune.inject(model, "svp")
    results = []
    for on in (False, True):
        calls = fuse(on)
        results.append(step(model.eval(), images()))
        assert [branch for branch, _ in calls] == [None] * (len(model.layers) if on else 0)
    assert_same(*results, TOLERANCES[torch.float32])


def test_hooks_see_the_outputs_of_blocks(fuse):
    """And once they are gone, the pairs are back. Hooks elsewhere leave them alone."""
    model = build().eval()
    calls = fuse(True)
    expected = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
    seen = []
    handles = [block.register_forward_hook(lambda *args: seen.append(args[2])) for block in model.layers]
    model(images())
    middle = model.cls_position
    for tokens, wanted in zip(seen, expected, strict=True):
        assert torch.equal(torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1), wanted)
    assert not carried(calls)
    calls.clear()
    for handle in handles:
        handle.remove()
    for place in ("layers", "layers.1.mixer", "layers.1.mixer.in_proj", "norm_f"):
        hook(model, place)
    model(images())
    assert len(calls) == len(model.layers)


def test_whoever_calls_blocks_one_by_one_has_the_plain_sequence(fuse):
    model = build().train()
    calls = fuse(True)
    expected = step(model, images())
    calls.clear()
    final, _ = model.forward_intermediates(images())
    model.set_grad_checkpointing(True)
    checkpointed = step(model, images())
    assert not carried(calls)
    assert_same((expected[0], {}), (final, {}), TOLERANCES[torch.float32])
    assert_same(expected, checkpointed, TOLERANCES[torch.float32])


def test_rules_of_all_layers_are_applied_together(fuse):
    """In the fused path alone: blocks that are computed again have to find what they found before."""
    model = build(peft="lora").train()
    seen = []
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda *_: seen.append(len(computed_ahead.get() or {})))
    expected = step(model, images())
    fuse(True)
    results = [step(model, images())]
    model.set_grad_checkpointing(True)
    results.append(step(model, images()))
    assert seen[:6] == [0] * 3 + [2 * 3] * 3
    assert len(seen) > 9 and not any(seen[6:])
    for result in results:
        assert_same(expected, result, TOLERANCES[torch.float32])


def test_pruned_models(fuse):
    """`layers` stays a sequence of blocks when cut, and the last norm is nobody's pair."""
    model = build().eval()
    results = []
    for on in (False, True):
        calls = fuse(on)
        if not on:
            model.prune_intermediate_layers([1], prune_norm=True)
        results.append(step(model, images()))
    assert len(calls) == 2
    assert_same(*results, TOLERANCES[torch.float32])


def test_scripting_and_tracing_have_the_plain_sequence(fuse):
    model = build().eval()
    tokens, logits = model.forward_features(images()), model(images())
    calls = fuse(True)
    extractor = timm.models.create_feature_extractor(model, {"layers": "x", "head": "logits"})
    features = extractor(images())
    torch.testing.assert_close(model.norm_f(features["x"]), tokens)
    torch.testing.assert_close(features["logits"], logits)
    torch.testing.assert_close(torch.jit.script(model)(images()), logits)
    traced = torch.jit.trace(model, images(), check_trace=False)  # the check would run the model itself
    torch.testing.assert_close(traced(images()), logits)
    assert not calls


def test_compiles_without_graph_breaks(fuse):
    model = build(depth=2)
    calls = fuse(True)
    expected = step(model, images())
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    calls.clear()
    tokens = compiled(images())
    assert len(calls) == 2
    torch.testing.assert_close(tokens, expected[0])


@needs_triton
class TestBackend:
    """The whole model on a backend with the kernels, nothing replaced."""

    def test_step(self, monkeypatch):
        model = build(depth=2).train()
        expected = step(model, images())
        with ops.use_backend("triton"):
            for block in model.layers:
                block.mixer.backend = "auto"
            seen = []
            add_rms_norm = layers.add_rms_norm
            monkeypatch.setattr(
                layers, "add_rms_norm", lambda *args: seen.append(args) or add_rms_norm(*args)
            )
            actual = step(model, images())
        assert len(seen) == 2
        assert_same(expected, actual, 1e-5)

    def test_graph_features(self):
        model = build(depth=1).eval()
        expected = model(images())
        model.layers[0].mixer.backend = "triton"
        extractor = timm.models.create_feature_extractor(model, {"head": "logits"})
        torch.testing.assert_close(extractor(images())["logits"], expected, atol=1e-5, rtol=1e-5)


@needs_triton
def test_norm_saves_its_sum_and_one_number_a_token():
    branch, residual = (torch.randn(2, 5, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.ones(16, device=DEVICE, requires_grad=True)
    saved = []
    with (
        torch.autocast(DEVICE, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        normed, total = ops.add_rms_norm(branch, residual, weight, backend="triton")
    assert normed.dtype == torch.bfloat16
    assert sum(t.nbytes for t in saved if t is not weight) == total.nbytes + 4 * 2 * 5


def test_rules_before_blocks_see_what_the_blocks_see(fuse):
    """They stand between a sum and its norm, so that the two are not done together."""
    model = build(peft="svp", peft_kwargs={"width": 4})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.add_(1)
    images = torch.randn(2, 3, 32, 32, device=DEVICE)
    fuse(False)
    expected = model(images)
    calls = fuse(True)
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-6)
    assert not carried(calls)
