"""Metrics of an order, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vimtune.metrics.ranking import average_precision


def defined(scores: list[float], positive: list[bool]) -> float:
    """Average precision as its definition says it, one threshold after the other."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = [own for score, own in zip(scores, positive, strict=True) if score >= threshold]
        now = sum(found) / sum(positive)
        area += (now - recall) * sum(found) / len(found)
        recall = now
    return area


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_average_precision_is_the_area_that_its_definition_says(rows) -> None:
    scores, positive = [float(score) for score, _ in rows], [own for _, own in rows]
    # A second class must not disturb the first one.
    other = torch.tensor([own for own in positive[::-1]])
    found = average_precision(
        torch.tensor([scores, scores[::-1]]).T, torch.stack([torch.tensor(positive), other], 1)
    )
    if any(positive):
        assert found.tolist() == pytest.approx([defined(scores, positive)] * 2, rel=1e-9)
    else:
        assert all(map(math.isnan, found.tolist()))


def test_the_best_order_has_all_and_equal_scores_have_the_share() -> None:
    positive = torch.tensor([[True], [True], [False], [False]])
    assert average_precision(torch.tensor([[4.0], [3], [2], [1]]), positive).item() == 1.0
    assert average_precision(torch.zeros(4, 1), positive).item() == 0.5
    assert average_precision(-torch.tensor([[4.0], [3], [2], [1]]), positive).item() == pytest.approx(5 / 12)
