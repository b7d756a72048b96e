"""Whether the probabilities of a classifier are to be believed, and a temperature that makes them so.

Of the answers that a calibrated classifier gives with probability 0.8, four in five are right. A temperature
T divides the logits before the softmax. It changes no answer, only how sure the model says it is (Guo et al.
2017, arXiv 1706.04599).

Where an image may have any number of labels, each label of each image is a question of its own, with the
answers no and yes: `yes_or_no` makes logits of two classes of it, for which everything here holds as well.

N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15
"""Intervals of probability, of equal width, as Guo et al. have them."""
LOWEST, HIGHEST = 0.01, 100.0
"""Temperatures between which the best one is sought. It lies at an end where the logits have all answers
right, or say nothing."""
_STEPS = 60
"""Steps of the search are no more than this; some ten are usual."""
_EXACT = 1e-9
"""Relative width of the interval at which it ends."""
_ROWS = 8192
"""Examples that are looked at together: in double precision all of them may not fit the memory."""


@dataclass(frozen=True)
class Bin:
    """The answers whose probability lies in one interval."""

    low: float
    """Probabilities above this,"""
    high: float
    """and up to this."""
    count: int
    """How many answers."""
    confidence: float
    """Mean of their probabilities; 0 where there are none."""
    accuracy: float
    """Share of them that is right; 0 where there are none."""


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[Bin]:
    """Answers by their probability.

    Args:
        confidence: probability of each answer, (N,) in [0, 1].
        right: whether it is right, (N,) bool.
        bins: number of intervals.
    """
    values = confidence.double()
    # An interval has its upper end, not its lower one: 1 lies in the last interval, and 0 in the first.
    places = (values * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(places, minlength=bins)
    sums = torch.bincount(places, values, minlength=bins)
    hits = torch.bincount(places, right.double(), minlength=bins)
    rows = zip(counts.tolist(), sums.tolist(), hits.tolist(), strict=True)
    return [
        Bin(number / bins, (number + 1) / bins, count, total / max(1, count), hit / max(1, count))
        for number, (count, total, hit) in enumerate(rows)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (ECE) in percent: how far probability and share of right answers lie
    apart, as a mean over the answers."""
    count = sum(own.count for own in bins)
    return 100.0 * sum(own.count * abs(own.confidence - own.accuracy) for own in bins) / max(1, count)


def yes_or_no(logits: Tensor) -> Tensor:
    """Logits (M, 2) of the answers no and yes to M questions whose probability of yes is the sigmoid of
    `logits` (M,): the softmax of 0 and z has the sigmoid of z as its second part, and the cross entropy of it
    is the binary one."""
    return torch.stack([torch.zeros_like(logits), logits], 1)


def log_probabilities(logits: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """Logarithm of the probability of one class (N,) of each example, (N,) double, where a temperature
    divides the logits (N, C)."""
    parts = zip(logits.split(_ROWS), classes.split(_ROWS), strict=True)
    return torch.cat(
        [(part.double() / temperature).log_softmax(1).gather(1, own[:, None])[:, 0] for part, own in parts]
    )


def mean_loss(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Cross entropy of logits (N, C) divided by a temperature, as a mean over N examples of classes (N,)."""
    return -float(log_probabilities(logits, labels, temperature).sum()) / max(1, len(labels))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with which logits (N, C) have the lowest cross entropy with the classes (N,).

    In b = 1 / T the cross entropy is convex: its slope is the mean of E_p[z] - z_label, where p is the
    softmax of b z, and its curvature the mean variance of z under p. The root of the slope is found by
    Newton's steps, and by halving the interval where one would leave it.

    Raises:
        ValueError: no example.
    """
    if len(labels) == 0:
        raise ValueError("a temperature cannot be fitted to no examples")
    low, high = 1.0 / HIGHEST, 1.0 / LOWEST
    if _slope(logits, labels, high)[0] <= 0:
        return LOWEST
    if _slope(logits, labels, low)[0] >= 0:
        return HIGHEST
    place = 1.0
    for _ in range(_STEPS):
        slope, curvature = _slope(logits, labels, place)
        low, high = (place, high) if slope < 0 else (low, place)
        step = place - slope / curvature if curvature > 0 else low
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - place) <= _EXACT * place:
            break
        place = following
    return 1.0 / place


def _slope(logits: Tensor, labels: Tensor, factor: float) -> tuple[float, float]:
    """First and second derivative of the mean cross entropy by the factor of the logits."""
    slope = curvature = 0.0
    for part, own in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        values = part.double()
        shares = (factor * values).softmax(1)
        means = (shares * values).sum(1)
        slope += float((means - values.gather(1, own[:, None])[:, 0]).sum())
        curvature += float((shares * (values - means[:, None]).square()).sum())
    return slope / len(labels), curvature / len(labels)
