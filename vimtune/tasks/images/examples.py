"""Which images of an evaluation are shown with the answers to them, right ones and wrong ones. C classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from torch import Tensor

KEPT = 16
"""Images that are shown of those with right answers, and of those with wrong ones."""


@dataclass(frozen=True)
class Example:
    """An image that was scored."""

    position: int
    """Number of the image in the order in which this process has scored them."""
    label: int
    """Its class."""
    predicted: int
    """The answer."""

    @property
    def right(self) -> bool:
        """Whether the answer is its class."""
        return self.label == self.predicted


class Examples:
    """Chooses the first images that were answered right, and the first that were not, of as many classes as
    possible."""

    def __init__(self, num_classes: int) -> None:
        """No images yet, of C classes."""
        self.chosen: list[Example] = []
        self._num_classes = num_classes
        self._of_each_class = math.ceil(KEPT / num_classes)
        self._seen = 0
        self._kept: Counter[bool] = Counter()
        self._kept_of_class: Counter[tuple[bool, int]] = Counter()

    def add(self, pairs: Tensor) -> None:
        """Look at the answers of a batch: class * C + answer of each image (B,), on the CPU."""
        first = self._seen
        self._seen += len(pairs)
        if self._kept[True] == self._kept[False] == KEPT:
            return
        for position, pair in enumerate(pairs.tolist(), first):
            example = Example(position, *divmod(pair, self._num_classes))
            kind = example.right, example.label
            if self._kept[example.right] < KEPT and self._kept_of_class[kind] < self._of_each_class:
                self._kept[example.right] += 1
                self._kept_of_class[kind] += 1
                self.chosen.append(example)
