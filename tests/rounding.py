"""Results that are equal but for rounding, which differs from processor to processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDING = 1e-4
"""By how much results of a model of a few layers may differ in fp32, as a part of the largest value."""


def assert_near(actual: Any, expected: Any, tolerance: float = ROUNDING) -> None:
    """Compare tensors, or lists or dictionaries of them, with the largest value of each as the measure.

    A sum of large terms that is nearly 0 has the error of its terms, so that an error relative to each value
    says little, and what is absolutely small depends on the model.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, Sequence):
        for one, other in zip(actual, expected, strict=True):
            assert_near(one, other, tolerance)
        return
    assert isinstance(expected, Tensor)
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)
