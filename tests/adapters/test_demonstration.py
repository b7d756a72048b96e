"""What an author of methods can write in a few lines, without touching the package.

A sparse rule whose mask is a buffer chosen from gradients passes the checks of every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimtune
from vimtune.adapters import (
    Method,
    WeightRule,
    register_method,
    settle,
    settles,
)
from vimtune.methods import METHODS, option
from vimtune.testing import METHOD_CHECKS, MethodCase, check_method
from vimtune.testing.methods import build_test_model, close, disturb


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


@dataclass(frozen=True, kw_only=True)
class Masked(Method):
    summary = "the entries with the largest gradients"
    default_targets = "x_proj[B|C],A_log"
    share: float = option(0.25, "share of the entries that trains")

    def build_rule(self, site):
        return MaskedRule(site.weight)

    def settle(self, rules: Mapping[str, MaskedRule], batches: Iterable) -> None:
        next(iter(batches))()
        for rule in rules.values():
            size = rule.delta.grad.abs()
            rule.mask.copy_(size > size.quantile(1 - self.share))


DEMONSTRATED = {"demo_masked": Masked}


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    """The methods of this file are known while one of its tests runs."""
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    for name, method in DEMONSTRATED.items():
        register_method(name)(method)


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("method", [*DEMONSTRATED, "parallel_adapter+ssm+demo_masked"])
def test_every_kind_of_method(method, check):
    check(MethodCase(method))


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


def test_a_mask_is_chosen_once_from_gradients(tmp_path: Path):
    model = vimtune.inject(build_test_model(), "demo_masked")
    assert settles(model) and not settles(vimtune.inject(build_test_model(), "lora", rank=2))

    def batch() -> float:
        loss = loss_of(model)
        loss.backward()
        return float(loss)

    settle(model, iter([batch]))
    masks = [rule.mask for rule in model.modules() if isinstance(rule, MaskedRule)]
    assert len(masks) == 12 and all(0.2 < mask.float().mean() < 0.3 for mask in masks)
    disturb(model)
    vimtune.save_adapter(model, tmp_path / "masked.safetensors")
    other = build_test_model()
    vimtune.load_adapter(other, tmp_path / "masked.safetensors")
    close(other.eval()(images()), model.eval()(images()), 0)
    close(vimtune.merge(model)(images()), other(images()))
