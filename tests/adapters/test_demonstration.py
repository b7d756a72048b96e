"""What an author of methods can write in a few lines, without touching the package.

Six kinds of methods: tokens around the scan and around the encoder, a branch beside a layer, more states, a
gate with a state that passes from layer to layer, and an offset with a weight decay of its own. Each passes
the checks of every method, and they compose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import create_feature_extractor
from torch import Tensor, nn

import vimtune
from vimtune.adapters import (
    CallRule,
    Method,
    WeightRule,
    active_adapter,
    adapter_parameters,
    check_gradients,
    each_tensor,
    register_method,
    unmerge,
)
from vimtune.methods import METHODS, option
from vimtune.testing import METHOD_CHECKS, MethodCase, check_method
from vimtune.testing.methods import build_test_model, close, disturb
from vimtune.training.optim import build_optimizer


class AffixRule(CallRule):
    """Tokens left of x for the forward scan and right of it for the reverse one; their outputs are cut."""

    def __init__(self, site, num_tokens):
        super().__init__()
        width = site.owner.in_proj.out_features // 2
        self.tokens = nn.Parameter(site.new_empty(2, num_tokens, width).normal_(std=0.1))

    def around(self, call, xz, *flow):
        _, num_tokens, width = self.tokens.shape
        tokens = F.pad(self.tokens, (0, width)).to(xz.dtype)  # the gate of these tokens would be cut off
        left, right = tokens[:, None].expand(-1, xz.shape[0], -1, -1)
        return call(torch.cat([left, xz, right], 1))[:, num_tokens:-num_tokens]


class PromptRule(CallRule):
    """Tokens before all others, whose outputs are cut off."""

    def __init__(self, site, num_tokens):
        super().__init__()
        self.prompt = nn.Parameter(site.new_empty(num_tokens, site.owner.embed_dim).normal_(std=0.1))

    def around(self, call, tokens, *flow):
        prompt = self.prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return each_tensor(call(torch.cat([prompt, tokens], 1)), lambda x: x[:, prompt.shape[1] :])


class ParallelRule(CallRule):
    """A bottleneck beside a linear layer."""

    def __init__(self, site, rank):
        super().__init__()
        self.down = nn.Parameter(site.new_empty(rank, site.owner.in_features).normal_(std=0.1))
        self.up = nn.Parameter(site.new_empty(site.owner.out_features, rank).zero_())

    def around(self, call, x):
        return call(x) + F.linear(F.gelu(F.linear(x, self.down)), self.up)


class MaskedRule(WeightRule):
    """W' = W + mask * delta."""

    def __init__(self, weight):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def effective_weight(self, weight):
        return weight + self.mask * self.delta

    def idle_entries(self, tensor):
        return ~self.mask


class MoreColumns(WeightRule):
    """More states for A (E, N): new columns."""

    def __init__(self, A_log, num_states):
        super().__init__()
        self.columns = nn.Parameter(A_log[:, -num_states:].clone())

    def effective_weight(self, weight):
        return torch.cat([weight, self.columns], 1)


class MoreRows(WeightRule):
    """More states for x_proj (dt | B | C): new rows behind B and behind C, those of C zero at the start."""

    def __init__(self, weight, old_states, num_states):
        super().__init__()
        self.old_states = old_states
        self.B = nn.Parameter(0.1 * torch.randn_like(weight[:num_states]))
        self.C = nn.Parameter(torch.zeros_like(weight[:num_states]))

    def effective_weight(self, weight):
        return torch.cat([weight[: -self.old_states], self.B, weight[-self.old_states :], self.C])


class GateRule(CallRule):
    """Adds to the gate z what this layer and those before it have averaged over the tokens."""

    def __init__(self, site, before):
        super().__init__()
        self.path, self.before = site.path, before
        self.strength = nn.Parameter(site.new_empty(site.owner.in_proj.out_features // 2).zero_())

    def around(self, call, xz, flow):
        x, z = xz.chunk(2, -1)
        flow[self.path] = z.mean(1, keepdim=True) + flow.get(self.before, 0)
        return call(torch.cat([x, z + self.strength.to(z.dtype) * flow[self.path]], -1))


class OffsetRule(WeightRule):
    """W' = W + offset, decayed ten times as strongly as the rest of the run."""

    def __init__(self, weight):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(weight))

    def effective_weight(self, weight):
        return weight + self.offset

    def decay(self, tensor, exempt):
        return 10.0


@dataclass(frozen=True, kw_only=True)
class Affix(Method):
    summary = "tokens around the scan"
    default_targets = "scan()"
    changes_at_start = True
    num_tokens: int = option(2, "tokens at each end")

    def build_rule(self, site):
        return AffixRule(site, self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Prompt(Affix):
    summary = "tokens before the encoder"
    default_targets = "encode()"

    def build_rule(self, site):
        return PromptRule(site, self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    summary = "a bottleneck beside out_proj"
    default_targets = "out_proj()"
    rank: int = option(4, "width of the bottleneck")

    def build_rule(self, site):
        return ParallelRule(site, self.rank)


@dataclass(frozen=True, kw_only=True)
class MoreStates(Method):
    summary = "additional states"
    default_targets = ("A_log", "A_b_log", "x_proj", "x_proj_b")
    num_states: int = option(2, "states beside those of the model")

    def build(self, sites):
        rules, values = {}, {site.path: site.weight for site in sites}
        for path, value in values.items():
            if "x_proj" in path:
                A = path.replace("x_proj_b.weight", "A_b_log").replace("x_proj.weight", "A_log")
                rules[path] = MoreRows(value, values[A].shape[1], self.num_states)
                rules[A] = MoreColumns(values[A], self.num_states)
        return rules

    def merged_options(self, options, sites):
        return {**options, "d_state": options["d_state"] + self.num_states}


@dataclass(frozen=True, kw_only=True)
class Gate(Method):
    summary = "a gate with a state that passes from layer to layer"
    default_targets = "scan()"

    def build(self, sites):
        before = [None, *(site.path for site in sites)]
        return {site.path: GateRule(site, earlier) for site, earlier in zip(sites, before, strict=False)}


@dataclass(frozen=True, kw_only=True)
class Offset(Method):
    summary = "an offset with ten-fold decay"
    default_targets = "D,D_b,A_log"

    def build_rule(self, site):
        return OffsetRule(site.weight)


DEMONSTRATED = {
    "demo_affix": Affix,
    "demo_prompt": Prompt,
    "demo_parallel": Parallel,
    "demo_states": MoreStates,
    "demo_gate": Gate,
    "demo_offset": Offset,
}
FOUR = "demo_states+lora+demo_affix+demo_prompt"
OPTIONS = {FOUR: {"rank": 2, "targets": {"lora": "x_proj[B],in_proj[x]"}}}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """The methods of this file are known while one of its tests runs."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    for name, method in DEMONSTRATED.items():
        register_method(name)(method)


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("method", [*DEMONSTRATED, FOUR, "demo_gate+demo_parallel+demo_offset+sdt"])
def test_every_kind_of_method(method, check):
    check(MethodCase(method, OPTIONS.get(method, {})))


class FullPrecisionRule(MaskedRule):
    """An author's mistake: a buffer that does not have the dtype of the weight."""

    def __init__(self, weight):
        super().__init__(weight)
        self.register_buffer("turn", torch.eye(weight.shape[1]))

    def effective_weight(self, weight):
        return super().effective_weight(weight) @ self.turn


class HalfMaskedRule(MaskedRule):
    """An author's mistake: entries that never train, of which `idle_entries` does not tell."""

    def __init__(self, weight):
        super().__init__(weight)
        self.mask[::2] = False

    def idle_entries(self, tensor):
        return None


class StuckRule(MaskedRule):
    """An author's mistake: a failed expectation without a message."""

    def effective_weight(self, weight):
        if self.training:
            raise AssertionError
        return super().effective_weight(weight)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            FullPrecisionRule,
            "check_half_precision of 'faulty': RuntimeError: .*same dtype.*have the weight's dtype",
        ),
        (
            HalfMaskedRule,
            r"check_every_entry of .*: delta: 512 of 1024 entries got no .*Rule.idle_entries\('delta'\)",
        ),
        (StuckRule, r"check_gradients of 'faulty': failed \(Every trained tensor gets a gradient"),
    ],
)
def test_what_the_checks_tell_an_author(rule, message):
    @register_method("faulty")
    @dataclass(frozen=True, kw_only=True)
    class Faulty(Method):
        summary = "a mistake"
        default_targets = "in_proj"

        def build_rule(self, site):
            return rule(site.weight)

    with pytest.raises(AssertionError, match=message) as caught:
        check_method("faulty")
    assert "\n" not in str(caught.value)


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(images()), torch.tensor([0, 1, 2]))


def test_four_methods_train_together(tmp_path: Path):
    """They train, are saved, loaded and resumed, and the states of one are what the rows of another mean."""
    model = vimtune.inject(build_test_model(), FOUR, **OPTIONS[FOUR])
    assert model.layers[0].mixer.A_log.shape[1] == 18
    assert active_adapter(model).sites["lora"][1] == "layers.0.mixer.x_proj.weight[B]"
    rule = model.layers[0].mixer.x_proj.adapters["weight"]["default"]
    assert rule.rows == (None, (1, 19))  # the grown rows
    optimizer = build_optimizer(adapter_parameters(model), lr=1e-2)
    first = float(loss_of(model))
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        check_gradients(model)
        optimizer.step()
    assert loss_of(model) < 0.7 * first
    vimtune.save_adapter(model, tmp_path / "four.safetensors")
    other = build_test_model()
    vimtune.load_adapter(other, tmp_path / "four.safetensors")
    close(other.eval()(images()), model.eval()(images()), 0)
    with pytest.raises(ValueError, match=r"has a PromptRule at encode\(\), which no weight"):
        vimtune.merge(model)


def test_more_states_merge_into_a_model_that_can_be_created_so(tmp_path: Path):
    model = disturb(vimtune.inject(build_test_model(), "demo_states", num_states=3)).eval()
    expected = model(images())
    assert vimtune.summary(model).total == vimtune.summary(build_test_model()).total + 2 * 2 * 3 * 3 * 32
    vimtune.merge(model, reversible=True)
    assert model.creation["kwargs"]["d_state"] == model.options["d_state"] == 19
    assert model.layers[0].mixer.x_proj.out_features == 1 + 2 * 19
    twin = timm.create_model("test_vim", **model.creation["kwargs"]).eval()
    twin.load_state_dict(model.state_dict())
    close(twin(images()), expected)
    unmerge(model)
    assert model.options["d_state"] == 16 and model.layers[0].mixer.x_proj.out_features == 1 + 2 * 16
    close(model(images()), expected, 0)


@pytest.mark.parametrize("method", ["demo_affix", "demo_prompt", "demo_gate", FOUR])
def test_calls_in_every_way_through_the_model(method):
    """features_only, forward_intermediates, tracing, export and other backends see the rules, too."""
    model = disturb(vimtune.inject(build_test_model(), method, **OPTIONS.get(method, {}))).eval()
    tokens, (last,) = model.forward_intermediates(images(), indices=1, output_fmt="NLC")
    close(tokens, model.forward_features(images()))
    assert last.shape == (3, 16, 16)
    sizes = {"num_classes": 5, "depth": 2, "backend": "torch"}
    features = timm.create_model("test_vim", **sizes, features_only=True, out_indices=(1,))
    vimtune.inject(features, method, **OPTIONS.get(method, {}))
    own = features.model.state_dict()
    features.model.load_state_dict({name: x for name, x in model.state_dict().items() if name in own})
    taken = features.eval()(images())[-1]
    close(taken.flatten(2).transpose(1, 2), last)
    traced = create_feature_extractor(model, {"head": "logits"})  # timm's way to trace with torch.fx
    close(traced(images())["logits"], model(images()))
    program = torch.export.export(model, (images(),))
    close(program.module()(images()), model(images()))
    for backend in ("cpu", "reference"):
        for block in model.layers:
            block.mixer.backend = backend
        close(model(images()), program.module()(images()), 1e-4)


def test_each_rule_has_its_own_decay():
    model = vimtune.inject(build_test_model(), "demo_offset+lora", rank=2)
    groups = build_optimizer(adapter_parameters(model), lr=1e-2, weight_decay=0.1).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for item in adapter_parameters(model):
        expected = 1.0 if item.name.endswith("offset") else 0.1 if item.parameter.dim() > 1 else 0.0
        assert decay[id(item.parameter)] == pytest.approx(expected), item.name


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*DEMONSTRATED, FOUR])
@pytest.mark.parametrize("backend", ["nvrtc", "triton"])
def test_on_a_gpu_the_kernels_stay_and_steps_replay(method, backend):
    """Every backend gives what the definition gives, and a step is replayed as a CUDA graph."""
    model = disturb(vimtune.inject(build_test_model(), method, **OPTIONS.get(method, {}))).cuda().train()
    inputs = images().cuda()
    tensors = [item.parameter for item in adapter_parameters(model)]

    def step(backend: str) -> list[Tensor]:
        for block in model.layers:
            block.mixer.backend = backend
        with torch.autocast("cuda", torch.bfloat16):
            output = model(inputs)
        gradients = torch.autograd.grad(output.float().square().sum(), tensors)
        return [output.detach().float(), *gradients]  # no graph outlives the step: a capture would meet it

    expected = step("reference")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            eager = step(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step(backend)
    graph.replay()
    torch.cuda.synchronize()
    for own, replayed, definition in zip(eager, recorded, expected, strict=True):
        torch.testing.assert_close(replayed, own, atol=1e-5, rtol=1e-4)
        assert (own - definition).norm() <= 0.05 * definition.norm() + 1e-4
