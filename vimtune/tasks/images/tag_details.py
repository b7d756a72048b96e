"""What an evaluation of images with any number of labels says beyond its scores. N images, C classes."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vimtune.data import ImageDataset
from vimtune.files import atomic_write
from vimtune.metrics.calibration import yes_or_no
from vimtune.metrics.classes import ClassScores, macro_f1
from vimtune.pages.section import Photo, Section, Table
from vimtune.run_folder import writing
from vimtune.tasks.classes.calibration import (
    HELD_OUT,
    Calibration,
    Questions,
    Temperature,
    temperature_of,
)
from vimtune.tasks.classes.details import MAX_NAME, WORST, macro_row
from vimtune.tasks.details import Details
from vimtune.tasks.images.details import unread_notes
from vimtune.tasks.images.tag_scoring import TagEvaluation
from vimtune.tasks.job import Evaluation
from vimtune.text import counted, printable, shorten, table_cell

SHOWN = 3
"""Classes that the final table shows, those with the lowest average precision."""


@dataclass(frozen=True)
class ClassRow:
    """What was found of a class; rates in percent, None where nothing is counted."""

    name: str
    average_precision: float | None
    found: ClassScores
    """Images that have the label and those for which it is predicted, at a probability of a half."""

    @property
    def rates(self) -> tuple[float | None, ...]:
        """Average precision, precision, recall and F1."""
        return self.average_precision, self.found.precision, self.found.recall, self.found.f1


def class_rows(evaluation: TagEvaluation, classes: Sequence[str]) -> list[ClassRow]:
    """A row for each class."""
    return list(map(ClassRow, classes, evaluation.per_class, evaluation.by_class))


def weakest_rows(per_class: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """The lines of a final table about the classes with the lowest average precision.

    Args:
        per_class: average precision by name of the class, in percent; None for one that no image has.
    """
    title = "lowest AP"
    known = [(value, name) for name, value in per_class.items() if value is not None]
    for value, name in sorted(known)[:SHOWN]:
        yield title, f"{shorten(name, MAX_NAME)}: {value:.2f} %"
        title = ""


def label_questions(evaluation: TagEvaluation) -> Questions:
    """Whether each image has each label, as N C questions with the answers no and yes; what is judged is the
    probability of yes."""
    logits, truth = evaluation.logits.flatten(), evaluation.labels.flatten().long()
    return Questions(yes_or_no(logits), truth, torch.ones_like(truth))


def tag_details(
    dataset: ImageDataset,
    evaluation: Evaluation,
    held_out: Evaluation | None,
    held_out_note: str,
    notes: Sequence[str] = (),
) -> TagDetails:
    """The details of an evaluation; the arguments are those of `ImageTask.build_details`."""
    assert isinstance(evaluation, TagEvaluation)
    temperature = Temperature(None, held_out_note)
    if held_out is not None:
        assert isinstance(held_out, TagEvaluation)
        count = counted(held_out.count, "images")
        questions = label_questions(held_out)
        temperature = temperature_of(questions, HELD_OUT, count, dataset.split, held_out_note)
    notes = [*notes, *unread_notes(dataset, evaluation)]
    return TagDetails(evaluation, dataset, temperature, notes=notes)


def _shown(value: float | None) -> str:
    """A rate in a table."""
    return "" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class TagDetails(Details):
    """What an evaluation says of every class, and where it is wrong."""

    evaluation: TagEvaluation
    dataset: ImageDataset
    """The images that were scored."""
    temperature: Temperature
    """What the logits would have to be divided by."""

    @cached_property
    def calibration(self) -> Calibration:
        """Whether the probabilities of the labels are to be believed."""
        return Calibration(label_questions(self.evaluation), self.temperature)

    def scores(self) -> dict[str, float | None]:
        """Macro F1 and the calibration error, in percent; the temperature, and error and loss with it."""
        return {"macro_f1": macro_f1(self.evaluation.by_class), **self.calibration.scores()}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Macro F1, calibration, and the classes with the lowest average precision."""
        yield from macro_row(self.evaluation.by_class, self.dataset.split)
        yield from self.calibration.rows(self.dataset.split)
        yield from weakest_rows(dict(zip(self.dataset.classes, self.evaluation.per_class, strict=True)))

    @cached_property
    def wrong(self) -> list[tuple[int, int]]:
        """(place among the scored images, class) of every label that is predicted and not there, or there and
        not predicted, at a probability of a half; those first in which the model is surest."""
        logits = self.evaluation.logits
        places = ((logits >= 0) != self.evaluation.labels).nonzero()
        surest = logits[places[:, 0], places[:, 1]].abs().argsort(descending=True, stable=True)
        return [(place, label) for place, label in places[surest].tolist()]

    def mistake_columns(self) -> tuple[str, ...]:
        """The image, a class, whether the image has it, and what the model says of that."""
        return ("path", "class", "labelled", "probability", "loss")

    def mistakes(self) -> Sequence[dict[str, Any]]:
        """Every wrong label: which image, the class, whether the image has it, the probability that the model
        gives it, and the loss."""
        return [self._mistake(place, label) for place, label in self.wrong]

    def _mistake(self, place: int, label: int) -> dict[str, Any]:
        logit, has = self.evaluation.logits[place, label], bool(self.evaluation.labels[place, label])
        values = (
            self.dataset.describe(int(self.evaluation.indices[place])),
            self.dataset.classes[label],
            "yes" if has else "no",
            float(logit.sigmoid()),
            float(F.softplus(-logit if has else logit)),
        )
        return dict(zip(self.mistake_columns(), values, strict=True))

    def numbers(self) -> dict[str, Any]:
        """Every class, and the reliability, as plain values."""
        return {
            **super().numbers(),
            **self.calibration.numbers(),
            "classes": [
                {
                    "class": row.name,
                    "count": row.found.examples,
                    "answers": row.found.answers,
                    "average_precision": row.average_precision,
                    "precision": row.found.precision,
                    "recall": row.found.recall,
                    "f1": row.found.f1,
                }
                for row in class_rows(self.evaluation, self.dataset.classes)
            ],
        }

    def sections(self, drawn: Path | None = None) -> dict[str, Section]:
        """ "scores"; "mistakes": the worst ones as pictures; "classes": a table of them, the weakest one
        first; "calibration"."""
        del drawn
        # This comes late, because drawing takes long to import.
        from vimtune.tasks.classes.reliability import LABELS, calibration_section

        return {
            "scores": self._score_section(),
            "mistakes": self._mistake_section(),
            "classes": self._class_section(),
            "calibration": calibration_section(self.calibration, LABELS),
        }

    def _score_section(self) -> Section:
        own = self.evaluation.scores
        named = {"mAP": own["map"], "Micro F1": own["f1"], "Macro F1": macro_f1(self.evaluation.by_class)}
        shown = [f"{name} is {value:.2f} %." for name, value in named.items() if value is not None]
        return Section(
            title="Scores",
            explanation="mAP is the mean of the average precisions of the classes that an image "
            "has, and needs no threshold. A label is predicted where its probability is at least a half. "
            "F1 is the harmonic mean of precision and recall: micro F1 that of all labels counted together, "
            "in which a frequent class counts more, and macro F1 the mean over the classes, in which a rare "
            "class counts as much. Classes that no image has and that are predicted for none do not count.",
            findings=[*([" ".join(shown)] if shown else []), *self.notes],
            numbers={},
        )

    def _mistake_section(self) -> Section:
        photos = []
        for place, label in self.wrong[:WORST]:
            row = self._mistake(place, label)
            share = f"{100 * row['probability']:.0f}\N{NO-BREAK SPACE}%"
            lines = [
                f"{shorten(row['class'], MAX_NAME)} {share}",
                "is labelled so" if row["labelled"] == "yes" else "is not labelled so",
            ]
            index = int(self.evaluation.indices[place])
            photos.append(Photo(partial(self.dataset.load, index), lines, row["path"]))
        count, images = len(self.wrong), len({place for place, _ in self.wrong})
        return Section(
            title="The worst mistakes",
            explanation="Labels that are predicted (at a probability of at least a half) and not there, or "
            "there and not predicted, those first in which the model is surest. Below each image stand the "
            "class with its probability, and whether the image is labelled so. Such a list shows wrong and "
            "missing labels, too.",
            findings=[
                f"{count:,} labels of {images:,} of {self.evaluation.count:,} images are wrong"
                + (f"; {len(photos)} of them are shown." if len(photos) < count else ".")
            ],
            numbers={},
            photos=photos,
        )

    def _class_section(self) -> Section:
        rows = class_rows(self.evaluation, self.dataset.classes)
        rows.sort(key=lambda row: 101.0 if row.average_precision is None else row.average_precision)
        cells = [
            (
                printable(row.name),
                f"{row.found.examples:,}",
                f"{row.found.answers:,}",
                *map(_shown, row.rates),
            )
            for row in rows
        ]
        rates = (f"{name}, %" for name in ("average precision", "precision", "recall", "F1"))
        return Section(
            title="Classes",
            explanation="Average precision is the area under precision over recall of a class; answers, "
            "precision, recall and F1 are those of labels whose probability is at least a half.",
            findings=[],
            numbers={},
            tables=[Table("From the weakest class on.", ("class", "images", "answers", *rates), cells)],
        )


def write_classes(evaluation: TagEvaluation, classes: Sequence[str], path: Path) -> None:
    """Write a row for each class as CSV: average precision, and at a probability of a half the number of
    answers, precision, recall and F1; rates are percent."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            counts, rates = ("images", "answers"), ("average_precision", "precision", "recall", "f1")
            writer.writerow(["number", "class", *counts, *rates])
            for number, row in enumerate(class_rows(evaluation, classes)):
                values = (row.found.examples, row.found.answers, *map(_shown, row.rates))
                writer.writerow([number, table_cell(row.name), *values])

    with writing(path):
        atomic_write(path, write)
