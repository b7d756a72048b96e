"""How well every class was recognised. N examples, C classes.

Where every example has one class, all of it follows from the confusion matrix, which holds counts of examples
by true class and answer, `confusion[true, answer]`, (C, C). Where an example may have several labels or none,
each class is counted by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ClassScores:
    """How one class was recognised. Shares are percent, and None where there is nothing to divide by."""

    examples: int
    """How many examples are of this class."""
    answers: int
    """How many examples were taken for this class."""
    right: int
    """How many of the one are among the other."""

    @property
    def precision(self) -> float | None:
        """Of the examples that were taken for this class, the share that is of it."""
        return 100.0 * self.right / self.answers if self.answers else None

    @property
    def recall(self) -> float | None:
        """Of the examples of this class, the share that was taken for it."""
        return 100.0 * self.right / self.examples if self.examples else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; 0 where one of them is 0 or has no value."""
        both = self.examples + self.answers
        return 200.0 * self.right / both if both else None


def score_classes(confusion: Tensor) -> list[ClassScores]:
    """The scores of each of the C classes."""
    examples, answers = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    rows = zip(examples, answers, confusion.diag().tolist(), strict=True)
    return [ClassScores(*row) for row in rows]


def score_labels(predicted: Tensor, labels: Tensor) -> list[ClassScores]:
    """The scores of each of the C classes, of examples that may have several or none.

    Args:
        predicted: bool (N, C), which labels the examples are said to have.
        labels: bool (N, C), which they have.
    """
    counts = (labels.sum(0), predicted.sum(0), (predicted & labels).sum(0))
    return [ClassScores(*row) for row in zip(*(each.tolist() for each in counts), strict=True)]


def micro_f1(scores: Sequence[ClassScores]) -> float | None:
    """The F1 of all classes counted together, in percent; a frequent class counts more than a rare one.

    It is None where nothing is there and nothing was answered.
    """
    sums = ClassScores(
        sum(own.examples for own in scores),
        sum(own.answers for own in scores),
        sum(own.right for own in scores),
    )
    return sums.f1


def macro_f1(scores: Sequence[ClassScores]) -> float | None:
    """The mean F1 over classes, each counted alike, in percent.

    Classes without examples that no example was taken for do not count, as with scikit-learn's
    `f1_score(average="macro")` and the metric of that name in HF evaluate.
    """
    known = [own.f1 for own in scores if own.f1 is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class Confusion:
    """Examples of one class that were taken for another one."""

    true: int
    """Number of their class."""
    answer: int
    """Number of the class that they were taken for."""
    count: int
    """How many they are."""
    of: int
    """How many examples their class has."""


def most_confused(confusion: Tensor, limit: int) -> list[Confusion]:
    """The pairs of classes with the most wrong answers, the most frequent first; at most `limit` of them."""
    wrong = confusion - confusion.diag().diag()
    order = wrong.flatten().sort(descending=True, stable=True).indices[:limit]
    pairs = [divmod(place, len(confusion)) for place in order.tolist()]
    return [
        Confusion(true, answer, int(wrong[true, answer]), int(confusion[true].sum()))
        for true, answer in pairs
        if wrong[true, answer] > 0
    ]
