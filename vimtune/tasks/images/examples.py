"""Which images of an evaluation are shown with the answers to them, right ones and wrong ones. C classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from vimtune.tasks.classes.answers import ClassAnswers

KEPT = 16
"""Images that are shown of those with right answers, and of those with wrong ones."""


@dataclass(frozen=True)
class Example:
    """An image that was scored."""

    index: int
    """Number of the image in its split."""
    label: int
    """Its class."""
    predicted: int
    """The answer."""

    @property
    def right(self) -> bool:
        """Whether the answer is its class."""
        return self.label == self.predicted


def choose_examples(answers: ClassAnswers) -> list[Example]:
    """The first images with right answers and the first with wrong ones, of as many classes as possible."""
    of_each_class = math.ceil(KEPT / answers.logits.shape[1])
    kept: Counter[bool] = Counter()
    kept_of_class: Counter[tuple[bool, int]] = Counter()
    chosen = []
    rows = zip(answers.indices.tolist(), answers.labels.tolist(), answers.predicted.tolist(), strict=True)
    for row in rows:
        example = Example(*row)
        kind = example.right, example.label
        if kept[example.right] < KEPT and kept_of_class[kind] < of_each_class:
            kept[example.right] += 1
            kept_of_class[kind] += 1
            chosen.append(example)
    return chosen
