"""What a classifier has said of every example. B batch, N examples, C classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_ROWS = 8192
"""Examples whose softmax is computed together."""


@dataclass(frozen=True)
class ClassAnswers:
    """What a classifier has said of N examples, on the CPU."""

    indices: Tensor
    """Which examples of their split they are, (N,) int64, in ascending order: some may have been left out."""
    labels: Tensor
    """Their classes, (N,) int64."""
    predicted: Tensor
    """The answers, (N,) int64."""
    ranks: Tensor
    """How many classes come before the right one, (N,) int64; 0 where the answer is right."""
    logits: Tensor
    """Logits, (N, C) fp32."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> Tensor:
        """Which answers are right, (N,) bool."""
        return self.labels == self.predicted

    @cached_property
    def confusion(self) -> Tensor:
        """Counts of examples by true class and answer, `confusion[true, predicted]`, (C, C) int64."""
        classes = self.logits.shape[1]
        counts = torch.bincount(self.labels * classes + self.predicted, minlength=classes**2)
        return counts.view(classes, classes)

    @cached_property
    def losses(self) -> Tensor:
        """Cross entropy of each example, (N,) double: minus the logarithm of its class's probability."""
        return -self._log_probabilities(self.labels, 1.0)

    def confidence(self, temperature: float = 1.0) -> Tensor:
        """Probability of each answer, (N,) double, where a temperature divides the logits."""
        return self._log_probabilities(self.predicted, temperature).exp()

    def _log_probabilities(self, classes: Tensor, temperature: float) -> Tensor:
        """Of one class (N,) for each example."""
        parts = zip(self.logits.split(_ROWS), classes.split(_ROWS), strict=True)
        found = [
            (part.double() / temperature).log_softmax(1).gather(1, own[:, None])[:, 0] for part, own in parts
        ]
        return torch.cat(found)


def answers_of(logits: Tensor, labels: Tensor) -> ClassAnswers:
    """The answers to all examples of a split.

    Args:
        logits: (N, C) on the CPU.
        labels: (N,), the right classes.
    """
    predicted, ranks = rank_answers(logits, labels)
    return ClassAnswers(torch.arange(len(labels)), labels, predicted, ranks, logits)


def rank_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best class of each example, and how many classes come before the right one.

    Among classes of equal logits the one of lowest index comes first, on every device; in bf16 such ties are
    common.

    Args:
        logits: (B, C).
        labels: (B,), the right classes.

    Returns:
        Two int64 tensors (B,).
    """
    index = torch.arange(logits.shape[1], device=logits.device)
    highest = logits.amax(1, keepdim=True)
    predicted = torch.where(logits == highest, index, logits.shape[1]).amin(1)
    own = logits.gather(1, labels[:, None])
    before = (logits > own) | ((logits == own) & (index < labels[:, None]))
    return predicted, before.sum(1)
