"""Images with any number of labels: loss, scores and report. B batch, N images of a split, C classes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vimtune.files import atomic_write
from vimtune.metrics.ranking import average_precision
from vimtune.pages.section import Section, Table
from vimtune.run_folder import writing
from vimtune.tasks.details import Details
from vimtune.tasks.images.job import ImageJob, OpenedImages
from vimtune.tasks.job import Evaluation, Forward, Loader, Outcome, Tally, Tensors
from vimtune.tasks.report import Report, ScoreReport
from vimtune.text import csv_cell, printable, shorten

if TYPE_CHECKING:
    from vimtune.tasks.multilabel import MultiLabel

SHOWN = 3
"""Classes that the final table shows, those with the lowest average precision."""
MAX_NAME = 40
"""Characters of a class name in the final table."""


def binary_losses(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross entropy in fp32, a mean over the classes of an image and a sum over images: a scalar.

    Args:
        logits: (B, C).
        targets: (B, C), 1 for a label that an image has.
        weights: (C,), those of the images that have the label; None for 1.
    """
    total = F.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=weights, reduction="sum")
    return total / logits.shape[1]


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
            **shared, **ScoreReport.values(outcome), per_class=per_class, num_classes=len(self.classes)
        )

    def details(self, outcome: Outcome) -> TagDetails:
        """The average precision of every class."""
        assert isinstance(outcome.evaluation, TagEvaluation)
        return TagDetails(outcome.evaluation, self.classes)

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


@dataclass(frozen=True)
class TagEvaluation(Evaluation):
    """Scores over all images of a split."""

    per_class: list[float | None]
    """Average precision of each class in percent; None for one that no image has."""
    counts: Tensor
    """int64 (C, 3): how many images have a label, for how many it is predicted, how often that is right."""


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
        logits, labels = (self.totals[name][times > 0] for name in ("logits", "labels"))
        return tag_evaluation(logits, labels, float(self.totals["loss"]))


def tag_evaluation(logits: Tensor, labels: Tensor, loss: float) -> TagEvaluation:
    """The scores that follow from answers.

    mAP is the mean of the average precisions of all classes that an image has. A label is predicted where its
    probability is at least a half; F1 is that of all predictions together (micro).

    Args:
        logits: (N, C).
        labels: (N, C), 1 for a label that an image has.
        loss: summed over the images.
    """
    precisions = average_precision(logits, labels > 0)
    per_class = [None if value.isnan() else 100.0 * float(value) for value in precisions]
    known = [value for value in per_class if value is not None]
    predicted, own = logits >= 0, labels > 0
    counts = torch.stack([own.sum(0), predicted.sum(0), (predicted & own).sum(0)], 1)
    has, says, right = counts.sum(0).tolist()
    scores = {
        "map": sum(known) / len(known) if known else None,
        "f1": 200.0 * right / (has + says) if has + says else None,
    }
    count = len(logits)
    return TagEvaluation(loss / max(1, count), scores, count, per_class, counts)


@dataclass(frozen=True, kw_only=True)
class TagReport(ScoreReport):
    """Result of the training on images with any number of labels.

    `per_class` is the average precision of each class in percent, None for one that no image of `split` has.
    """

    per_class: dict[str, float | None]
    num_classes: int

    def detail_rows(self) -> Iterator[tuple[str, str]]:
        """The classes with the lowest average precision."""
        title = "lowest AP"
        known = [(value, name) for name, value in self.per_class.items() if value is not None]
        for value, name in sorted(known)[:SHOWN]:
            yield title, f"{shorten(name, MAX_NAME)}: {value:.2f} %"
            title = ""


@dataclass(frozen=True)
class ClassRow:
    """What was found of a class; rates in percent, None where nothing is counted."""

    name: str
    images: int
    """How many images have the label."""
    average_precision: float | None
    precision: float | None
    """Which of the predicted labels are right, at a probability of a half."""
    recall: float | None
    """Which of the labels are predicted, at a probability of a half."""


def class_rows(evaluation: TagEvaluation, classes: Sequence[str]) -> list[ClassRow]:
    """A row for each class."""

    def percent(part: int, whole: int) -> float | None:
        return 100.0 * part / whole if whole else None

    found = zip(classes, evaluation.per_class, evaluation.counts.tolist(), strict=True)
    return [
        ClassRow(name, has, value, percent(right, says), percent(right, has))
        for name, value, (has, says, right) in found
    ]


def _shown(value: float | None) -> str:
    """A rate in a table."""
    return "" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class TagDetails(Details):
    """What an evaluation says of every class."""

    evaluation: TagEvaluation
    classes: Sequence[str]
    """C names."""
    notes: Sequence[str] = ()
    """What a reader of the scores has to know."""

    def numbers(self) -> dict[str, Any]:
        """Every class, as plain values."""
        return {
            "notes": list(self.notes),
            "classes": [
                {
                    "class": row.name,
                    "count": row.images,
                    "average_precision": row.average_precision,
                    "precision": row.precision,
                    "recall": row.recall,
                }
                for row in class_rows(self.evaluation, self.classes)
            ],
        }

    def sections(self, drawn: Path | None = None) -> dict[str, Section]:
        """ "classes": a table of them, the weakest one first."""
        del drawn
        rows = class_rows(self.evaluation, self.classes)
        rows.sort(key=lambda row: 101.0 if row.average_precision is None else row.average_precision)
        cells = [
            (
                printable(row.name),
                f"{row.images:,}",
                *map(_shown, (row.average_precision, row.precision, row.recall)),
            )
            for row in rows
        ]
        heading = ("class", "images", "average precision, %", "precision, %", "recall, %")
        return {
            "classes": Section(
                title="Classes",
                explanation="Average precision is the area under precision over recall of a class; precision "
                "and recall are those of labels whose probability is at least a half.",
                findings=list(self.notes),
                numbers={},
                tables=[Table("From the weakest class on.", heading, cells)],
            )
        }


def write_classes(evaluation: TagEvaluation, classes: Sequence[str], path: Path) -> None:
    """Write a row for each class as CSV: average precision, and at a probability of a half precision and
    recall, all in percent."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["number", "class", "images", "average_precision", "precision", "recall"])
            for number, row in enumerate(class_rows(evaluation, classes)):
                rates = map(_shown, (row.average_precision, row.precision, row.recall))
                writer.writerow([number, csv_cell(printable(row.name)), row.images, *rates])

    with writing(path):
        atomic_write(path, write)
