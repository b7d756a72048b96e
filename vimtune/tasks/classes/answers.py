"""What a classifier has said of every example. B batch, N examples, C classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vimtune.metrics.calibration import log_probabilities
from vimtune.tasks.classes.calibration import Questions


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

    @property
    def questions(self) -> Questions:
        """Which class each example is of; what is judged are the answers."""
        return Questions(self.logits, self.labels, self.predicted)

    @cached_property
    def losses(self) -> Tensor:
        """Cross entropy of each example, (N,) double: minus the logarithm of its class's probability."""
        return -log_probabilities(self.logits, self.labels)


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
