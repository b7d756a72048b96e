"""Images with any number of labels: loss, scores and report. B batch, N images of a split, C classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vimtune.metrics.calibration import calibration_error
from vimtune.metrics.classes import macro_f1
from vimtune.tasks.images.batches import ImageBatches
from vimtune.tasks.images.features import FeatureBatches
from vimtune.tasks.images.job import ImageJob, OpenedImages
from vimtune.tasks.images.tag_details import (
    TagDetails,
    label_questions,
    tag_details,
    weakest_rows,
    write_classes,
)
from vimtune.tasks.images.tag_scoring import TagEvaluation, TagTally, binary_losses
from vimtune.tasks.job import Evaluation, Forward, Loader, Outcome, Tensors
from vimtune.tasks.report import Report, ScoreReport, percent_rows

if TYPE_CHECKING:
    from vimtune.tasks.multilabel import MultiLabel


def positive_weights(tags: Sequence[tuple[int, ...]], num_classes: int) -> Tensor:
    """How many images lack a label for each that has it, (C,) fp32; 1 for a label of none or of all."""
    numbers = torch.tensor([tag for own in tags for tag in own], dtype=torch.int64)
    have = torch.bincount(numbers, minlength=num_classes).double()
    lack = len(tags) - have
    return torch.where((have > 0) & (lack > 0), lack / have.clamp(min=1), 1.0).float()


@dataclass(kw_only=True)
class TagJob(ImageJob):
    """A classifier that judges every class by itself, on its data."""

    weights: Tensor | None
    """Weight in the loss of the images that have a label, (C,); None for 1."""

    def loss(self, forward: Forward, tensors: Tensors) -> Tensor:
        """Binary cross entropy summed over the images."""
        return binary_losses(forward(tensors["images"]), tensors["labels"], self.weights)

    def start_tally(self, loader: Loader) -> TagTally:
        """An empty tally of probabilities and labels."""
        return TagTally(len(self.classes), loader.num_examples, self.counts_all)

    def build_report(self, shared: Mapping[str, Any], outcome: Outcome) -> TagReport:
        """The report with the average precision of each class."""
        found = outcome.evaluation
        assert isinstance(found, TagEvaluation), "the tally gives one"
        per_class = dict(zip(self.classes, found.per_class, strict=True))
        return TagReport(
            **shared,
            **ScoreReport.values(outcome),
            per_class=per_class,
            num_classes=len(self.classes),
            macro_f1=macro_f1(found.by_class),
            ece=calibration_error(label_questions(found).bins()),
        )

    def details(self, outcome: Outcome) -> TagDetails:
        """Every class, calibration and the mistakes."""
        assert isinstance(self.final, ImageBatches | FeatureBatches)
        return tag_details(self.final.dataset, outcome.evaluation, *self.held_out(outcome))

    def result_files(self, report: Report, evaluation: Evaluation) -> dict[str, Callable[[Path], None]]:
        """A table of the classes."""
        assert isinstance(evaluation, TagEvaluation)
        return {"classes.csv": partial(write_classes, evaluation, self.classes)}


def build_tag_job(opened: OpenedImages, task: MultiLabel) -> TagJob:
    """The job of a task on what was opened."""
    tags, weights = opened.train_set.tags, None
    assert tags is not None, "the task was compared with the data"
    if task.class_weights == "balanced":
        weights = positive_weights(tags, len(opened.train_set.classes)).to(opened.processes.device)
    return TagJob(**opened.shared, weights=weights)


@dataclass(frozen=True, kw_only=True)
class TagReport(ScoreReport):
    """Result of the training on images with any number of labels.

    `per_class` is the average precision of each class in percent, None for one that no image of `split` has.
    """

    per_class: dict[str, float | None]
    num_classes: int
    macro_f1: float | None = None
    """Mean F1 of the classes at a probability of a half, in percent; None in reports of earlier versions."""
    ece: float | None = None
    """Expected calibration error over all labels of all images, in percent; None in reports of earlier
    versions."""

    def further_scores(self) -> Iterator[tuple[str, str]]:
        """Macro F1 and the calibration error."""
        return percent_rows({"macro F1": self.macro_f1, "expected calibration error": self.ece})

    def detail_rows(self) -> Iterator[tuple[str, str]]:
        """The classes with the lowest average precision."""
        return weakest_rows(self.per_class)
