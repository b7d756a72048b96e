"""Adapters made of adapters, against sums of dense weights."""

from __future__ import annotations

import pytest
import torch

import vimtune
from vimtune.adapters.slots import iter_weight_slots
from vimtune.testing.methods import build_test_model, close, disturb


def with_adapters(**adapters):
    model = build_test_model()
    for seed, (name, (method, options)) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        disturb(vimtune.inject(model, method, name=name, **options), seed)
    return model.eval()


def weights(model, name):
    """Every weight that some adapter changes, as it is under one of them."""
    vimtune.set_adapter(model, name)
    return {
        path: slot.evaluated(slot.place[0]._parameters[own])
        for path, _, own, slot in iter_weight_slots(model)
    }


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


ADAPTERS = {
    "a": ("lora", {"rank": 2, "num_classes": 3}),
    "b": ("lora", {"rank": 3, "targets": ["in_proj[x]", "out_proj", "x_proj"], "start": "pissa"}),
    "c": ("dora", {"rank": 2}),
    "d": ("ssm", {}),
}


@pytest.fixture(scope="module")
def model():
    """A model with all of them, of which the last one is active; tests leave it as it was."""
    return with_adapters(**ADAPTERS, p=("prompt", {}), g=("additional_scan", {"num_states": 2}))


@pytest.mark.parametrize(
    "coefficients",
    [{"a": 0.25, "b": 0.75}, {"a": 1.0, "b": -1.0}, {"a": 0.5, "c": 0.7, "d": -2}, {"b": -1}, {"d": 3.0}],
)
def test_sums_are_those_of_the_weights(model, coefficients):
    base = weights(model, None)
    parts = {name: weights(model, name) for name in coefficients}
    head = next(iter(coefficients))
    vimtune.combine(model, coefficients, name="sum", head=head)
    assert vimtune.adapters.active_adapter(model).name == "sum"
    found = weights(model, "sum")
    for path, value in base.items():
        if path.startswith("head."):
            assert torch.equal(found[path], parts[head][path])
        else:
            close(
                found[path], value + sum(c * (parts[name][path] - value) for name, c in coefficients.items())
            )
    vimtune.delete_adapter(model, "sum")
    vimtune.set_adapter(model, "g")


def test_sums_have_files_like_others(tmp_path, model):
    vimtune.combine(model, {"a": 0.5, "c": 0.7, "d": -2}, name="sum", head="a")
    vimtune.save_adapter(model, tmp_path / "sum.safetensors")
    again = build_test_model().eval()
    info = vimtune.load_adapter(again, tmp_path / "sum.safetensors")
    assert info.method == "ft" and info.num_classes == 3
    close(again(images()), model(images()), 0)
    vimtune.delete_adapter(model, "sum")
    vimtune.set_adapter(model, "g")


def test_low_rank_adapters_stay_low_rank():
    model = with_adapters(
        a=("lora", {"rank": 2, "targets": ["in_proj", "x_proj"]}),
        b=("lora", {"rank": 3}),
        c=("lora", {"rank": 8}),
    )
    small = vimtune.adapters.active_adapter(vimtune.combine(model, {"a": 1, "b": 1}, name="small", head="a"))
    ranks = small.options["lora"]["rank"]
    assert small.method == "lora" and {path.split(".")[-2]: ranks[path] for path in ranks} == {
        "in_proj": 5, "x_proj": 2, "x_proj_b": 2, "out_proj": 3,
    }  # fmt: skip
    large = vimtune.adapters.active_adapter(vimtune.combine(model, {"b": 1, "c": 1}, name="large", head="b"))
    # 11 (16 + 64) numbers are fewer than 16 * 64, 11 (32 + 16) are more than 32 * 16.
    assert large.method == "lora+ft" and large.options["lora"]["rank"] == 11
    assert {path.split(".")[-2] for path in large.sites["ft"]} == {"out_proj"}


@pytest.mark.parametrize("how", ["exact", "tensors"])
def test_averages_of_what_is_linear_are_the_same_either_way(how):
    model = with_adapters(**{name: ("full", {}) for name in ("a", "b")})
    parts = [weights(model, name) for name in ("a", "b")]
    found = weights(vimtune.combine(model, {"a": 0.25, "b": 0.75}, name="soup", how=how), "soup")
    for path, value in found.items():
        close(value, 0.25 * parts[0][path] + 0.75 * parts[1][path])


def test_tensors_of_prompts_average():
    model = with_adapters(**{name: ("lora+prompt", {"rank": 2}) for name in ("a", "b")})
    states = [vimtune.adapters.adapter_state_dict(model, name) for name in ("a", "b")]
    found = vimtune.adapters.adapter_state_dict(
        vimtune.combine(model, {"a": 0.5, "b": 0.5}, name="soup", how="tensors")
    )
    assert found.keys() == states[0].keys()
    for key, value in found.items():
        close(value, (states[0][key] + states[1][key]) / 2)


@pytest.mark.parametrize(
    ("coefficients", "options", "message"),
    [
        ({}, {}, "no adapter is named"),
        ({"a": float("nan")}, {}, "the coefficient of 'a' is nan: expected a finite number"),
        ({"a": True}, {}, "expected a finite number"),
        ({"nobody": 1.0}, {}, "no adapter named 'nobody'"),
        ({"a": 0.5, "b": 0.5}, {}, r"have 3 and 5 classes\. Say whose head .* head='a'"),
        ({"b": 0.5, "c": 0.2}, {}, "coefficients sum to 0.7 and not to 1"),
        ({"b": 1.0}, {"head": "a"}, "head = 'a': expected one of the adapters b"),
        ({"b": 1.0}, {"how": "exactly"}, "how = 'exactly': expected exact or tensors. Did you mean 'exact'"),
        ({"b": 1.0}, {"name": "a"}, "already has an adapter 'a'"),
        ({"b": 0.5, "c": 0.5}, {"how": "tensors"}, "do not have the same method"),
        ({"b": 2.0}, {"how": "tensors", "head": "b"}, "an average of tensors needs 1"),
        ({"p": 1.0}, {}, "has a PromptRule at encode"),
        ({"g": 1.0}, {}, "changes the size of"),
    ],
)
def test_what_does_not_sum_is_refused(model, coefficients, options, message):
    before = vimtune.list_adapters(model)
    with pytest.raises(ValueError, match=message):
        vimtune.combine(model, coefficients, **{"name": "sum", **options})
    assert vimtune.list_adapters(model) == before and vimtune.adapters.active_adapter(model).name == "g"
