"""Rules for calls that say what remains of them in a merged model: parameters that it did not have before."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import vimtune
from vimtune.adapters import register_method, unmerge
from vimtune.adapters.rules.affix import AffixRule
from vimtune.methods import METHODS
from vimtune.methods.affix import Affix
from vimtune.testing.methods import build_test_model, close, disturb


class Doubled(Affix):
    """An author's mistake: rules that are not the only ones that fold into their parameters."""

    summary = "affix once more"


class UnboundedRule(AffixRule):
    """Leaves behind a state that is not finite."""

    def fold(self, owner: nn.Module) -> dict[str, Tensor]:
        values = owner.starts_behind(self.tokens())
        return {**values, "initial_state_b": values["initial_state_b"] * float("inf")}


class Unbounded(Affix):
    """An author's mistake: `UnboundedRule` at every scan."""

    summary = "a state that is not finite"

    def build(self, sites):
        return {site.path: UnboundedRule(site, 1, 32, 2, None) for site in sites}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """The methods of this file are known while one of its tests runs."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    for name, method in {"doubled": Doubled, "unbounded": Unbounded}.items():
        register_method(name)(method)


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("num_tokens", [1, 3, 7])
@pytest.mark.parametrize(
    "others, options",
    [
        ("", {}),
        ("", {"hidden": 3}),
        ("+additional_scan", {"num_states": 2}),
        ("+lora", {"rank": 1, "targets": {"lora": "x_proj,dt_proj,x_proj_b,dt_proj_b,in_proj"}}),
        ("+ft", {"targets": {"ft": "A_log,A_b_log,conv1d,conv1d_b,D"}}),
    ],
)
def test_the_merged_model_begins_with_what_the_tokens_leave_behind(others, options, num_tokens):
    """With the merged weights of everything else, also where only some layers have tokens."""
    layers = {"affix": [1]} if others else None
    model = vimtune.inject(
        build_test_model(), "affix" + others, layers=layers, num_tokens=num_tokens, **options
    )
    disturb(model).eval()
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        vimtune.merge(model.train()).eval()
    names = [name for name, _ in model.named_parameters() if "initial_state" in name or "conv_tail" in name]
    assert len(names) == 8 and model.creation["kwargs"]["initial_state"] is True
    assert bool(model.layers[0].mixer.initial_state.any()) == (layers is None)
    close(model(images()), expected)
    twin = timm.create_model("test_vim", **model.creation["kwargs"]).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images()), model(images()))
    for backend in ("cpu", "reference"):
        for block in twin.layers:
            block.mixer.backend = backend
        close(twin(images()), expected)


def test_an_adapter_of_a_merged_model_is_merged_again():
    """Its tokens stand before the image and behind those that the model begins with."""
    model = vimtune.merge(disturb(vimtune.inject(build_test_model(), "affix", num_tokens=2), 1))
    before = model(images()).detach()
    vimtune.inject(model, "affix+ft", num_tokens=1, targets={"ft": "initial_state,conv_tail_b"})
    disturb(model.eval(), 2)
    expected = model(images())
    assert not torch.allclose(expected, before, atol=1e-3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vimtune.merge(model, reversible=True)
    close(model(images()), expected)
    unmerge(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    close(model(images()), expected, 0)


def test_what_a_model_begins_with_is_trained_like_any_weight():
    model = timm.create_model("test_vim", num_classes=5, depth=2, initial_state=True)
    plain = timm.create_model("test_vim", num_classes=5, depth=2)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    close(model.eval()(images()), plain.eval()(images()))
    model.train()(images()).square().sum().backward()
    starts = [p for name, p in model.named_parameters() if "initial_state" in name or "conv_tail" in name]
    assert len(starts) == 8 and all(p.grad is not None and p.grad.any() for p in starts)
    names = {name.rpartition(".")[2] for name in model.no_weight_decay()}
    assert {"initial_state", "initial_state_b", "conv_tail", "conv_tail_b"} <= names


def test_no_states_are_added_to_a_model_that_begins_with_a_state():
    model = timm.create_model("test_vim", initial_state=True)
    with pytest.raises(
        ValueError, match=r"begins with a state for the 16 that it has \(initial_state=True\)"
    ):
        vimtune.inject(model, "additional_scan")


def test_two_rules_for_the_same_parameter_are_refused():
    model = vimtune.inject(build_test_model(), "affix+doubled")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"fold into layers\.0\.mixer\.initial_state; nothing was merged"):
        vimtune.merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_state_that_is_not_finite_is_refused():
    model = vimtune.inject(build_test_model(), "unbounded")
    with pytest.raises(ValueError, match=r"makes layers\.0\.mixer\.initial_state_b non-finite; nothing was"):
        vimtune.merge(model)
    assert model.layers[0].mixer.initial_state is None and not model.options["initial_state"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("way", ["script", "trace", "export", "fx", "compile"])
def test_every_way_through_the_model_sees_what_it_begins_with(way):
    model = vimtune.merge(disturb(vimtune.inject(build_test_model(), "affix"))).eval()
    expected = model(images())
    if way == "script":
        other = torch.jit.script(model)
    elif way == "trace":
        other = torch.jit.trace(model, images(), check_trace=False)  # the check would run the model itself
    elif way == "export":
        other = torch.export.export(model, (images(),)).module()
    elif way == "compile":
        other = torch.compile(model, backend="aot_eager")
    else:
        traced = timm.models.create_feature_extractor(model, {"head": "logits"})
        other = lambda x: traced(x)["logits"]  # noqa: E731
    close(other(images()), expected)
