"""Scores of a classifier of images: what it says of every image of a split. B batch, N images, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.tasks.classes.answers import ClassAnswers, rank_answers
from vimtune.tasks.job import Evaluation, Forward, Tally, Tensors

TOP = 5
"""Number of best answers among which the right one has to be for the second score, top-5."""


@dataclass(frozen=True)
class ImageEvaluation(Evaluation):
    """Scores over all images of a split."""

    answers: ClassAnswers
    """What was said of every image."""

    @property
    def confusion(self) -> Tensor:
        """Counts of images by true class and answer, `confusion[true, predicted]`, (C, C) int64."""
        return self.answers.confusion

    @property
    def per_class(self) -> list[float | None]:
        """Percent of each class's images that were answered right; None for a class without images."""
        right, total = self.confusion.diag().tolist(), self.confusion.sum(1).tolist()
        return [100.0 * r / t if t else None for r, t in zip(right, total, strict=True)]


def evaluation_of(answers: ClassAnswers, loss: float) -> ImageEvaluation:
    """The scores that follow from answers.

    Args:
        answers: what was said of every image.
        loss: cross entropy summed over the images.
    """
    count = len(answers)
    hits = int((answers.ranks < TOP).sum())
    scores = {
        "top1": 100.0 * int(answers.right.sum()) / max(1, count),
        # Of five classes or fewer every answer would be among the best five.
        "top5": 100.0 * hits / max(1, count) if answers.logits.shape[1] > TOP else None,
    }
    return ImageEvaluation(loss / max(1, count), scores, count, answers)


class ImageTally(Tally):
    """Notes the answers to every image at its place in the split, wherever it is scored, and sums the cross
    entropy."""

    def __init__(self, num_classes: int, num_images: int, complete: bool = True) -> None:
        """An empty tally.

        Args:
            num_classes: C.
            num_images: N, how many images the split has.
            complete: whether all of them have to be scored; else some may be left out.
        """
        self.num_classes, self.complete = num_classes, complete
        self.totals = {
            "times": torch.zeros(num_images, dtype=torch.int64),
            "pairs": torch.zeros(num_images, dtype=torch.int64),
            "ranks": torch.zeros(num_images, dtype=torch.int64),
            "logits": torch.zeros(num_images, num_classes),
            "loss": torch.zeros((), dtype=torch.float64),
        }

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Look at the answers to "images" (B, 3, H, W), whose classes are "labels" (B,).

        Returns:
            "places" (B,), the numbers of the images in the split, as they were given; "pairs" (B,), the
            places of true class and answer in the flat confusion matrix; "ranks" (B,); "logits" (B, C); and
            "loss", a scalar summed over the images.
        """
        labels = tensors["labels"]
        logits = forward(tensors["images"]).float()
        predicted, ranks = rank_answers(logits, labels)
        return {
            "places": tensors["places"],
            "pairs": labels * self.num_classes + predicted,
            "ranks": ranks,
            "logits": logits,
            "loss": F.cross_entropy(logits, labels, reduction="sum"),
        }

    def count(self, judged: Tensors) -> None:
        """Note a batch."""
        places = judged["places"]
        self.totals["loss"] += judged["loss"]
        self.totals["times"].index_add_(0, places, torch.ones_like(places))
        for name in ("pairs", "ranks", "logits"):
            self.totals[name][places] = judged[name]

    def evaluation(self) -> ImageEvaluation:
        """The scores of what was noted."""
        totals, times = self.totals, self.totals["times"]
        assert not (times > 1).any(), "an evaluation counts no image twice"
        assert not self.complete or bool(times.all()), "an evaluation counts every image"
        indices = times.nonzero()[:, 0]
        pairs, ranks, logits = (totals[name][indices] for name in ("pairs", "ranks", "logits"))
        answers = ClassAnswers(indices, pairs // self.num_classes, pairs % self.num_classes, ranks, logits)
        return evaluation_of(answers, float(totals["loss"]))
