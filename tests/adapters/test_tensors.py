"""What an adapter holds: trained tensors and their decay, buffers, and rules that no weight expresses."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import timm
import torch
from method_cases import CASES, disturb, label, options_for
from timm.optim import param_groups_weight_decay
from torch import nn

import vimtune
from vimtune.adapters import (
    CallRule,
    Method,
    WeightRule,
    adapter_parameters,
    adapter_state_dict,
    load_adapter_state_dict,
    register_method,
)
from vimtune.methods import METHODS


def plain():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, depth=2, backend="torch").eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class MaskedRule(WeightRule):
    """Trains the entries that a buffer chooses."""

    def __init__(self, weight):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("mask", torch.rand_like(weight) < 0.5)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def effective_weight(self, weight):
        return weight + self.mask * self.delta


class GatedRule(CallRule):
    """Scales the input of a layer, always: no weight of ours."""

    def __init__(self, site):
        super().__init__()
        self.gate = nn.Parameter(site.new_empty(site.owner.in_features).fill_(1))

    def around(self, call, x):
        return call(x * self.gate * x.sigmoid())


@pytest.fixture
def methods(monkeypatch):
    """Two more methods, for the length of a test."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))

    @register_method("masked")
    @dataclass(frozen=True, kw_only=True)
    class Masked(Method):
        summary = "a mask"

        def build_rule(self, site):
            return MaskedRule(site.weight)

    @register_method("gated")
    @dataclass(frozen=True, kw_only=True)
    class Gated(Method):
        summary = "a gate"
        default_targets = ("in_proj()", "out_proj()")

        def build_rule(self, site):
            return GatedRule(site)


# --- buffers


def test_buffers_are_saved_loaded_and_merged_with_the_parameters(methods, tmp_path):
    model = disturb(vimtune.inject(plain(), "masked"))
    expected = model(images())
    state = adapter_state_dict(model)
    masks = [key for key in state if key.endswith(".mask")]
    assert len(masks) == 4 and not any(key.endswith("scratch") for key in state)
    assert not any(item.name.endswith("mask") for item in adapter_parameters(model))

    other = vimtune.inject(plain(), "masked")
    load_adapter_state_dict(other, state)
    assert torch.equal(other(images()), expected)
    vimtune.save_adapter(model, tmp_path / "a.safetensors")
    other = plain()
    vimtune.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(images()), expected)
    torch.testing.assert_close(vimtune.merge(copy.deepcopy(model))(images()), expected)
    around = nn.Sequential(vimtune.inject(plain(), "masked"))
    around.load_state_dict({f"0.{key}": value for key, value in plain().state_dict().items()})
    assert all(x.device.type == "meta" for x in adapter_state_dict(model.to("meta")).values())


def test_a_buffer_is_never_converted_or_left_out(methods):
    model = vimtune.inject(plain(), "masked")
    state = adapter_state_dict(model)
    key = next(key for key in state if key.endswith(".mask"))
    with pytest.raises(ValueError, match=r"is of torch.float32, expected torch.bool"):
        load_adapter_state_dict(model, {**state, key: state[key].float()})
    del state[key]
    with pytest.raises(ValueError, match=f"missing {key}"):
        load_adapter_state_dict(model, state)


def test_a_buffer_of_a_chain(methods):
    model = disturb(vimtune.inject(plain(), "lora+masked", rank=2))
    other = vimtune.inject(plain(), "lora+masked", rank=2)
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(other(images()), model(images()))


# --- rules that act in evaluation


def test_merge_refuses_what_no_weight_expresses(methods):
    model = disturb(vimtune.inject(plain(), "gated")).train()
    expected, before = model(images()), copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError,
        match=r"'default' \(gated\) has a GatedRule at layers.0.mixer.in_proj\(\), which",
    ):
        vimtune.merge(model)
    assert list(model.state_dict()) == list(before) and vimtune.list_adapters(model) == ["default"]
    assert torch.equal(model(images()), expected)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match=r"only reads the weight of layers.0.mixer.x_proj"):
        vimtune.inject(plain(), "gated", targets="x_proj()")


# --- weight decay


@pytest.fixture(params=CASES, ids=label)
def case(request):
    return request.param


def test_scales_and_biases_never_decay(case):
    model = vimtune.inject(plain(), case[0], **options_for(*case))
    for item in adapter_parameters(model):
        matrix = item.parameter.dim() > 1
        assert item.weight_decay == (matrix and item.base_name not in model.no_weight_decay()), item.name


SSM = ("A_log", "A_b_log", "D", "D_b")


@pytest.mark.parametrize("method", ["full", "ft", "full+lora"])
def test_parameters_of_the_scan_never_decay(method):
    options = {"targets": "A_log,A_b_log,D,D_b,in_proj"} if method == "ft" else {}
    if method == "full+lora":
        options = {"rank": 2, "targets": {"lora": "A_log,in_proj"}}
    model = vimtune.inject(plain(), method, **options)
    decays = {}
    for item in adapter_parameters(model):
        decays.setdefault(item.base_name, set()).add(item.weight_decay)
    for name in SSM:
        assert decays[f"layers.0.mixer.{name}"] == {False}
    assert decays["layers.0.mixer.in_proj.weight"] == {True}


@pytest.mark.parametrize("adapted", [False, True])
def test_optimizers_of_timm_do_not_decay_them_either(adapted):
    model = vimtune.inject(plain(), "full") if adapted else plain()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    found = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert any("in_proj" in name for name in found)
    assert not any(part in (*SSM, "pos_embed", "cls_token") for name in found for part in name.split("."))


def test_a_mixer_alone_says_what_does_not_decay():
    model = nn.Sequential(plain().layers[0].mixer)
    vimtune.inject(model, "ft", targets="A_log,in_proj")
    decays = {item.base_name: item.weight_decay for item in adapter_parameters(model)}
    assert decays == {"0.A_log": 0, "0.A_b_log": 0, "0.in_proj.weight": 1}


def test_marks_of_mamba_ssm_are_honoured():
    model = nn.Module()
    model.A_log = nn.Parameter(torch.zeros(4, 4))
    model.other = nn.Parameter(torch.zeros(4, 4))
    model.A_log._no_weight_decay = True
    vimtune.inject(model, "ft", targets="A_log,other")
    assert {item.base_name: item.weight_decay for item in adapter_parameters(model)} == {
        "A_log": False,
        "other": True,
    }


def test_a_rule_decides_what_decays(methods, monkeypatch):
    monkeypatch.setattr(MaskedRule, "decay", lambda self, tensor, exempt: 0 if tensor == "delta" else 1)
    model = vimtune.inject(plain(), "lora+masked", rank=2)
    for item in adapter_parameters(model):
        assert item.weight_decay == ("delta" not in item.name and item.parameter.dim() > 1)


# --- disabled


def test_disabled_puts_back_what_was_there():
    model = vimtune.inject(plain(), "lora", rank=2, num_classes=3)
    frozen = [item.parameter for item in adapter_parameters(model) if item.name.endswith("lora_A")]
    for parameter in frozen:  # LoRA-FA, say
        parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), vimtune.disabled(model) as inside:
        assert inside is model and model.num_classes == 5
        raise RuntimeError("inside")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.num_classes == 3
    vimtune.set_adapter(model, None)
    with vimtune.disabled(model):
        pass
    assert model.num_classes == 5 and not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_deleted_within_disabled_stays_deleted():
    model = vimtune.inject(plain(), "lora", rank=2)
    with vimtune.disabled(model):
        vimtune.delete_adapter(model, "default")
    assert vimtune.list_adapters(model) == [] and all(p.requires_grad for p in model.parameters())
    vimtune.inject(model, "lora", rank=2)
    with vimtune.disabled(model):
        vimtune.delete_adapter(model, "default")
        vimtune.inject(model, "bitfit", name="other")
    assert {item.group for item in adapter_parameters(model)} == {"head", "adapter"}


def test_copies_switch_for_themselves():
    """As the documentation of `set_adapter` advises threads that want different adapters."""
    model = disturb(vimtune.inject(plain(), "lora", rank=2))
    expected, twin = model(images()), copy.deepcopy(model)
    vimtune.set_adapter(twin, None)
    assert torch.equal(model(images()), expected) and not torch.equal(twin(images()), expected)
