"""Scores of a classifier: right answers, counted by true class and answer. B batch, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.tasks.images.examples import Example, Examples
from vimtune.tasks.job import Evaluation, Forward, Tally, Tensors

TOP = 5
"""Number of best answers among which the right one has to be for the second score, top-5."""


@dataclass(frozen=True)
class ImageEvaluation(Evaluation):
    """Scores over all images of a split."""

    confusion: Tensor
    """Counts of images by true class and answer, `confusion[true, predicted]`, (C, C) int64."""
    examples: Sequence[Example] = ()
    """Some of the images that this process has scored."""

    @property
    def per_class(self) -> list[float | None]:
        """Percent of each class's images that were answered right; None for a class without images."""
        right, total = self.confusion.diag().tolist(), self.confusion.sum(1).tolist()
        return [100.0 * r / t if t else None for r, t in zip(right, total, strict=True)]


def evaluation_of(
    confusion: Tensor, top5_hits: int, loss: float, examples: Sequence[Example] = ()
) -> ImageEvaluation:
    """The scores that follow from counts.

    Args:
        confusion: counts of images by true class and answer, (C, C).
        top5_hits: number of images whose class was among the five best answers.
        loss: cross entropy summed over the images.
        examples: some of the images.
    """
    count = int(confusion.sum())
    right = int(confusion.diag().sum())
    scores = {
        "top1": 100.0 * right / max(1, count),
        # Of five classes or fewer every answer would be among the best five.
        "top5": 100.0 * top5_hits / max(1, count) if len(confusion) > TOP else None,
    }
    return ImageEvaluation(loss / max(1, count), scores, count, confusion, examples)


class ImageTally(Tally):
    """Counts answers and sums the cross entropy."""

    def __init__(self, num_classes: int, expected: int | None = None) -> None:
        """An empty tally.

        Args:
            num_classes: C.
            expected: how many images all processes together have to count; None if some may be left out.
        """
        self.num_classes, self.expected = num_classes, expected
        self.examples = Examples(num_classes)
        self.totals = {
            "confusion": torch.zeros(num_classes, num_classes, dtype=torch.int64),
            "top5_hits": torch.zeros((), dtype=torch.int64),
            "loss": torch.zeros((), dtype=torch.float64),
        }

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Look at the answers to "images" (B, 3, H, W), whose classes are "labels" (B,).

        Returns:
            "pairs" (B,), the places of true class and answer in the flat confusion matrix; "top5_hits" and
            "loss", scalars summed over the images.
        """
        labels = tensors["labels"]
        logits = forward(tensors["images"]).float()
        predicted, ranks = rank_answers(logits, labels)
        return {
            "pairs": labels * self.num_classes + predicted,
            "top5_hits": (ranks < TOP).sum(),
            "loss": F.cross_entropy(logits, labels, reduction="sum"),
        }

    def count(self, judged: Tensors) -> None:
        """Add a batch to the sums."""
        self.totals["loss"] += judged["loss"]
        self.totals["top5_hits"] += judged["top5_hits"]
        self.examples.add(judged["pairs"])
        counts = torch.bincount(judged["pairs"], minlength=self.num_classes**2)
        self.totals["confusion"] += counts.view(self.num_classes, -1)

    def evaluation(self) -> ImageEvaluation:
        """The scores of what was counted."""
        totals = self.totals
        found = evaluation_of(
            totals["confusion"], int(totals["top5_hits"]), float(totals["loss"]), self.examples.chosen
        )
        assert self.expected in (None, found.count), "an evaluation counts every image exactly once"
        return found


def rank_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The best class of each image, and how many classes come before the right one.

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


def most_confused(confusion: Tensor, classes: Sequence[str], limit: int) -> list[dict[str, object]]:
    """The pairs of classes with the most wrong answers, the most frequent first.

    Args:
        confusion: counts of images by true class and answer, (C, C).
        classes: C names.
        limit: the most pairs that are returned.

    Returns:
        Mappings: of the `of` images of the class `true`, `images` were taken for the class `predicted`.
    """
    wrong = confusion - confusion.diag().diag()
    order = wrong.flatten().sort(descending=True, stable=True).indices[:limit]
    pairs = [divmod(place, len(classes)) for place in order.tolist()]
    return [
        {
            "true": classes[true],
            "predicted": classes[predicted],
            "images": int(wrong[true, predicted]),
            "of": int(confusion[true].sum()),
        }
        for true, predicted in pairs
        if wrong[true, predicted] > 0
    ]
