"""Calibration: the error of cases that can be counted by hand, and a temperature that no other one beats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vimtune.metrics.calibration import (
    HIGHEST,
    LOWEST,
    calibration_error,
    fit_temperature,
    mean_loss,
    reliability,
    yes_or_no,
)


def test_a_case_by_hand() -> None:
    confidence = torch.tensor([0.85, 0.85, 0.85, 0.85, 0.55, 0.55])
    right = torch.tensor([True, True, False, False, True, True])
    bins = reliability(confidence, right, 10)
    filled = {round(own.high, 1): own for own in bins if own.count}
    assert list(filled) == [0.6, 0.9]
    assert (filled[0.9].count, filled[0.9].accuracy, filled[0.6].accuracy) == (4, 0.5, 1.0)
    # Four of six answers are 0.35 too sure, the other two are 0.45 not sure enough.
    assert calibration_error(bins) == pytest.approx(100 * (4 * 0.35 + 2 * 0.45) / 6)


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_error_is_its_definition(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator, dtype=torch.float64)
    right = torch.rand(500, generator=generator) < 0.4
    found = reliability(confidence, right, bins)
    expected = 0.0
    for number in range(bins):
        inside = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        assert found[number].count == int(inside.sum())
        if inside.any():
            gap = (confidence[inside].mean() - right[inside].double().mean()).abs()
            expected += float(inside.double().mean() * gap)
    assert calibration_error(found) == pytest.approx(100 * expected)


def test_the_ends_of_the_scale_have_a_place() -> None:
    found = reliability(torch.tensor([0.0, 1.0]), torch.tensor([False, True]), 5)
    assert [own.count for own in found] == [1, 0, 0, 0, 1] and calibration_error(found) == 0
    assert calibration_error(reliability(torch.empty(0), torch.empty(0, dtype=torch.bool))) == 0


@pytest.mark.parametrize("sharpness", [0.05, 0.5, 1.0, 4.0, 30.0])
def test_no_temperature_has_a_lower_loss(sharpness: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 7, generator=generator)
    labels = torch.multinomial((1.7 * logits).softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(sharpness * logits, labels)
    lowest = mean_loss(sharpness * logits, labels, found)
    assert lowest == pytest.approx(F.cross_entropy(sharpness * logits.double() / found, labels).item())
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert mean_loss(sharpness * logits, labels, factor * found) > lowest
    # Logits that are so many times as sharp have a temperature that many times as high.
    assert found == pytest.approx(sharpness * fit_temperature(logits, labels), rel=1e-6)


def test_questions_of_yes_or_no_have_the_binary_loss_and_its_best_temperature() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(600, generator=generator)
    truth = (torch.rand(600, generator=generator) < (0.4 * logits).sigmoid()).long()

    def binary_loss(temperature: float) -> float:
        scaled = logits.double() / temperature
        return F.binary_cross_entropy_with_logits(scaled, truth.double()).item()

    found = fit_temperature(yes_or_no(logits), truth)
    for temperature in (1.0, found):
        assert mean_loss(yes_or_no(logits), truth, temperature) == pytest.approx(binary_loss(temperature))
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert binary_loss(factor * found) > binary_loss(found)
    assert found == pytest.approx(2.5, rel=0.2)  # The labels were drawn from logits that are so much smaller.


def test_logits_that_are_always_right_or_say_nothing_end_the_search() -> None:
    labels = torch.arange(6)
    assert fit_temperature(F.one_hot(labels).float(), labels) == LOWEST
    assert fit_temperature(-F.one_hot(labels).float(), labels) == HIGHEST
    assert LOWEST <= fit_temperature(torch.zeros(6, 6), labels) <= HIGHEST
    with pytest.raises(ValueError, match="no examples"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_many_examples_are_as_few() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(50, 3, generator=generator), torch.arange(50) % 3
    many = fit_temperature(3 * logits.repeat(400, 1), labels.repeat(400))
    assert many == pytest.approx(fit_temperature(3 * logits, labels), rel=1e-6)
