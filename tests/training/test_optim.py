"""Parameter groups, the learning-rate curve and the moving average."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import vimtune
from vimtune import adapters
from vimtune.runtime.seeds import seed_generators
from vimtune.training.optim import (
    CosineSchedule,
    WeightAverage,
    build_optimizer,
    set_learning_rate,
    skip_unless_finite,
    skips_by_itself,
)


def test_groups_follow_head_and_weight_decay():
    model = timm.create_model("test_vim", num_classes=5)
    vimtune.inject(model, "full")
    entries = list(adapters.adapter_parameters(model))
    optimizer = build_optimizer(entries, lr=1e-3, head_lr=5e-3, weight_decay=0.1, betas=(0.8, 0.9))
    settings = {
        parameter: (group["peak_lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(settings) == len(entries) == sum(p.requires_grad for p in model.parameters())
    for entry in entries:
        lr = 5e-3 if entry.base_name.startswith("head.") else 1e-3
        exempt = entry.parameter.dim() == 1 or entry.base_name in model.no_weight_decay()
        decay = 0.0 if exempt else 0.1
        assert settings[entry.parameter] == (lr, decay, (0.8, 0.9)), entry.name


def test_nothing_to_train():
    with pytest.raises(ValueError, match="trains no tensor"):
        build_optimizer([], lr=1e-3)


def test_schedule_warms_up_and_falls_to_its_end():
    schedule = CosineSchedule(total_steps=100, warmup_steps=10, min_lr=1e-5)
    rates = [schedule(step, 1e-3) for step in range(100)]
    assert 0 < rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[99] > 1e-5 and schedule(100, 1e-3) == schedule(500, 1e-3) == 1e-5


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (5, 0)])
def test_schedule_of_very_short_runs(total, warmup):
    schedule = CosineSchedule(total_steps=total, warmup_steps=warmup, min_lr=0.0)
    assert all(0 < schedule(step, 1e-3) <= 1e-3 for step in range(total))


def test_each_group_has_its_own_peak():
    optimizer = torch.optim.AdamW(
        [
            {"params": [nn.Parameter(torch.ones(1))], "peak_lr": peak, "lr_multiple": 1.0}
            for peak in (1e-3, 1e-2, 1e-6)
        ]
    )
    schedule = CosineSchedule(total_steps=10, warmup_steps=0, min_lr=1e-5)
    assert set_learning_rate(optimizer, schedule, 5) == pytest.approx((1e-3 + 1e-5) / 2)
    set_learning_rate(optimizer, schedule, 10)
    # A peak below min_lr stays where it is instead of rising.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-5, 1e-6])


def test_average_of_weights():
    weight = nn.Parameter(torch.zeros(2))
    average = WeightAverage({"w": weight}, decay=0.5)
    expected = 0.0
    for step in range(6):
        with torch.no_grad():
            weight.fill_(step + 1.0)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1.0)
    with average.applied():
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert weight.tolist() == [6.0, 6.0]
    other = WeightAverage({"w": weight}, decay=0.5)
    other.restore(average.tensors)
    assert torch.equal(other.tensors["w"], average.tensors["w"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fused_updates_are_skipped_whole(device, bad):
    def start():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, device=device))
        return weight, torch.optim.AdamW([weight], lr=0.1, fused=True)

    (weight, optimizer), (expected, plain) = start(), start()
    assert skips_by_itself(optimizer) and not skips_by_itself(torch.optim.AdamW([weight], lr=0.1))
    for step, value in enumerate([1.0, bad, 3.0, bad]):
        gradient = torch.full((5,), value * (step + 1), device=device)
        weight.grad, expected.grad = gradient, gradient
        skip_unless_finite(optimizer, torch.tensor([2.0, value], device=device))
        optimizer.step()
        if math.isfinite(value):
            plain.step()
    assert torch.equal(weight, expected)
    ours, theirs = optimizer.state[weight], plain.state[expected]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert float(ours["step"]) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_seeding_is_that_of_torch(device):
    torch.manual_seed(17)
    expected = torch.rand(3), torch.rand(3, device=device)
    seed_generators(17, torch.device(device, 0 if device == "cuda" else None))
    assert all(map(torch.equal, (torch.rand(3), torch.rand(3, device=device)), expected))
