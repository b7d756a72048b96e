"""Some images of an evaluation with the answers to them, right ones and wrong ones. B batch, C classes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 16
"""Images that are kept of those with right answers, and of those with wrong ones."""


@dataclass(frozen=True)
class Example:
    """An image and the answer to it."""

    image: Tensor
    """The model's input, (3, H, W), on the CPU."""
    label: int
    """Its class."""
    predicted: int
    """The answer."""


class Gallery:
    """Keeps the first images that were answered right, and the first that were not, of as many classes as
    possible."""

    def __init__(self, num_classes: int) -> None:
        """An empty gallery for images of C classes."""
        self.right: list[Example] = []
        self.wrong: list[Example] = []
        self._of_each_class = math.ceil(KEPT / num_classes)
        self._counts: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}

    def add(self, images: Tensor, labels: Tensor, predicted: Tensor) -> None:
        """Look at the images (B, 3, H, W) of a batch with their labels and answers, both (B,)."""
        if len(self.right) == len(self.wrong) == KEPT:
            return
        pairs = torch.stack([labels, predicted]).tolist()
        for index, (label, answer) in enumerate(zip(*pairs, strict=True)):
            right = label == answer
            kept, counts = self.right if right else self.wrong, self._counts[right]
            if len(kept) < KEPT and counts[label] < self._of_each_class:
                counts[label] += 1
                kept.append(Example(images[index].float().cpu(), label, answer))
