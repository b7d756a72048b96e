"""Scores of a classifier that judges every class by itself. B batch, N images of a split, C classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.metrics.classes import ClassScores, micro_f1, score_labels
from vimtune.metrics.ranking import average_precision
from vimtune.tasks.job import Evaluation, Forward, Tally, Tensors


def binary_losses(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross entropy in fp32, a mean over the classes of an image and a sum over images: a scalar.

    Args:
        logits: (B, C).
        targets: (B, C), 1 for a label that an image has.
        weights: (C,), those of the images that have the label; None for 1.
    """
    total = F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights, reduction="sum")
    return total / logits.shape[1]


@dataclass(frozen=True)
class TagEvaluation(Evaluation):
    """Scores over all images of a split."""

    per_class: list[float | None]
    """Average precision of each class in percent; None for one that no image has."""
    by_class: list[ClassScores]
    """How many images have each label, for how many it is predicted, and what follows from that."""
    indices: Tensor
    """Numbers of the images in the split, (N,)."""
    logits: Tensor
    """(N, C) fp32."""
    labels: Tensor
    """(N, C) bool."""


class TagTally(Tally):
    """Notes the logits and the labels of every image at its place in the split, wherever it is scored, and
    sums the loss."""

    def __init__(self, num_classes: int, num_images: int, complete: bool = True) -> None:
        """An empty tally.

        Args:
            num_classes: C.
            num_images: N, how many images the split has.
            complete: whether all of them have to be scored; else some may be left out.
        """
        self.complete = complete
        self.totals = {
            "times": torch.zeros(num_images, dtype=torch.int64),
            "labels": torch.zeros(num_images, num_classes),
            "logits": torch.zeros(num_images, num_classes),
            "loss": torch.zeros((), dtype=torch.float64),
        }

    def judge(self, forward: Forward, tensors: Tensors) -> Tensors:
        """Look at the answers to "images" (B, 3, H, W) with "labels" (B, C), 1 for those that an image has.

        Returns:
            "places" (B,), the numbers of the images in the split, as they were given; "labels" and "logits"
            (B, C); and "loss", a scalar summed over the images.
        """
        labels = tensors["labels"]
        logits = forward(tensors["images"]).float()
        loss = binary_losses(logits, labels)
        return {"places": tensors["places"], "labels": labels, "logits": logits, "loss": loss}

    def count(self, judged: Tensors) -> None:
        """Note a batch."""
        places = judged["places"]
        self.totals["loss"] += judged["loss"]
        self.totals["times"].index_add_(0, places, torch.ones_like(places))
        for name in ("labels", "logits"):
            self.totals[name][places] = judged[name]

    def evaluation(self) -> TagEvaluation:
        """The scores of what was noted."""
        times = self.totals["times"]
        assert not (times > 1).any(), "an evaluation counts no image twice"
        assert not self.complete or bool(times.all()), "an evaluation counts every image"
        indices = times.nonzero()[:, 0]
        logits, labels = (self.totals[name][indices] for name in ("logits", "labels"))
        return tag_evaluation(logits, labels, float(self.totals["loss"]), indices)


def tag_evaluation(logits: Tensor, labels: Tensor, loss: float, indices: Tensor) -> TagEvaluation:
    """The scores that follow from answers.

    mAP is the mean of the average precisions of all classes that an image has. A label is predicted where its
    probability is at least a half; "f1" is that of all predictions together (micro F1).

    Args:
        logits: (N, C).
        labels: (N, C), 1 for a label that an image has.
        loss: summed over the images.
        indices: numbers of the images in the split, (N,).
    """
    precisions = average_precision(logits, labels > 0)
    per_class = [None if value.isnan() else 100.0 * float(value) for value in precisions]
    known = [value for value in per_class if value is not None]
    own = labels > 0
    by_class = score_labels(logits >= 0, own)
    scores = {
        "map": sum(known) / len(known) if known else None,
        "f1": micro_f1(by_class),
    }
    count = len(logits)
    return TagEvaluation(loss / max(1, count), scores, count, per_class, by_class, indices, logits, own)
