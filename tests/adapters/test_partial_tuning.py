"""Methods that train a few parameters as they are, with decay towards the pretrained value."""

from __future__ import annotations

import pytest
import torch
from method_cases import disturb

import vimtune
from vimtune.adapters import active_adapter, adapter_parameters
from vimtune.testing.methods import build_test_model
from vimtune.training.optim import build_optimizer

DECAY = {
    "a_tuning": {"A_log": 10, "A_b_log": 10},
    "d_tuning": {"D": 10, "D_b": 10},
    "bias_tuning": {"dt_proj.bias": 100, "dt_proj_b.bias": 100},
    "conv1d_tuning": {"conv1d.weight": 10, "conv1d_b.weight": 10},
    "cls_token_tuning": {"cls_token": 10},
    "pos_embed_tuning": {"pos_embed": 1},
    "ssm": {"A_log": 10, "A_b_log": 10, "D": 10, "D_b": 10, "dt_proj.bias": 100, "dt_proj_b.bias": 100},
}
"""What each method trains, and how strongly it decays towards its start, as multiples of the run's decay."""


def short(path):
    return path.partition("mixer.")[2] or path


@pytest.mark.parametrize("method", DECAY)
def test_what_is_trained_and_how_strongly_it_is_pulled_back(method):
    model = vimtune.inject(build_test_model(), method)
    entries = [item for item in adapter_parameters(model) if item.group == "adapter"]
    assert {short(item.base_name): item.weight_decay for item in entries} == DECAY[method]
    assert all(not item.parameter.any() for item in entries)
    groups = build_optimizer(entries, lr=1e-3, weight_decay=0.01).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for item in entries:
        assert decays[id(item.parameter)] == pytest.approx(0.01 * DECAY[method][short(item.base_name)])


@pytest.mark.parametrize("method", DECAY)
def test_the_effective_value_is_the_sum_of_start_and_difference(method):
    model = build_test_model()
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    disturb(vimtune.inject(model, method))
    differences = {item.base_name: item.parameter for item in adapter_parameters(model)}
    vimtune.merge(model)
    for name, value in model.named_parameters():
        if name.partition(".")[0] != "head":
            assert torch.equal(value, start[name] + differences.get(name, 0)), name


def test_without_a_pull_to_the_start_the_parameters_are_trained_themselves():
    plain = build_test_model()
    model = vimtune.inject(build_test_model(), "ssm", start_decay=0.0, bias_decay=2.0)
    for item in adapter_parameters(model):
        if item.group == "adapter":
            itself = torch.equal(item.parameter, plain.get_parameter(item.base_name))
            assert itself == ("bias" not in item.base_name)
            assert item.weight_decay == (0 if itself else 2)


def test_the_parameters_of_the_scan_beside_lora_on_the_projectors():
    model = vimtune.inject(build_test_model(), "lora+ssm", rank=2)
    sites = active_adapter(model).sites
    assert {short(path) for path in sites["lora"]} == {"in_proj.weight", "out_proj.weight"}
    assert {short(path) for path in sites["ssm"]} == set(DECAY["ssm"])


def test_one_direction_alone():
    model = vimtune.inject(build_test_model(), "a_tuning", targets="A_b_log")
    assert {short(path) for path in active_adapter(model).sites["a_tuning"]} == {"A_b_log"}
