"""What an evaluation of a classifier says of classes, confusions, calibration and mistakes.

N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vimtune.metrics.calibration import (
    HIGHEST,
    LOWEST,
    Bin,
    calibration_error,
    fit_temperature,
    mean_loss,
    reliability,
)
from vimtune.metrics.classes import ClassScores, Confusion, macro_f1, most_confused, score_classes
from vimtune.pages.section import Photo, Picture, Section, Table
from vimtune.tasks.classes.answers import ClassAnswers
from vimtune.tasks.classes.confusion import CONFUSION_PICTURE, confusion_title, draw_confusion_matrix
from vimtune.tasks.classes.reliability import draw_reliability
from vimtune.tasks.details import Details
from vimtune.text import shorten

if TYPE_CHECKING:
    from PIL import Image

HELD_OUT = "val"
"""The split to which temperatures are fitted: it is neither trained on nor the one whose scores are told."""
CONFUSED = 20
"""Pairs of classes that files and pages list."""
SHOWN_CONFUSED = 3
"""Pairs that the final table shows."""
WORST = 24
"""Mistakes that a page shows."""
MAX_NAME = 40
"""Characters of a class name in tables."""
MAX_TEXT = 200
"""Characters of a text in the table of mistakes."""


@dataclass(frozen=True)
class Examples:
    """What the examples of a split are called, and how they are shown."""

    key: str
    """What names an example in files: "path" or "text"."""
    plural: str
    """What they are called, such as "images"."""
    name: Callable[[int], str]
    """Names an example by its number in the split."""
    load: Callable[[int], Image.Image] | None = None
    """Gives an image by its number in the split; None for texts."""


@dataclass(frozen=True)
class Temperature:
    """The temperature of a classifier, and where it comes from."""

    value: float | None
    """None where there is nothing that it could be fitted to."""
    origin: str
    """Half a sentence: to what it was fitted, or why it was not."""


def temperature_of(answers: ClassAnswers, split: str, plural: str, scored: str) -> Temperature:
    """The temperature that fits the examples of a split.

    Args:
        answers: those to the examples, at least one.
        split: its name.
        plural: what the examples are called.
        scored: the split whose scores are told.
    """
    origin = f"fitted to the {len(answers):,} {plural} of {split!r}"
    if split == scored:
        origin += ", which are the ones that are scored here: expect a little less of others"
    value = fit_temperature(answers.logits, answers.labels)
    if value in (LOWEST, HIGHEST):
        origin += "; it lies at the end of what was searched"
    return Temperature(value, origin)


@dataclass(frozen=True)
class ClassDetails(Details):
    """What an evaluation of a classifier says."""

    answers: ClassAnswers
    """What was said of every example."""
    classes: Sequence[str]
    """C names."""
    split: str
    """The split that was scored."""
    examples: Examples
    """What was scored."""
    temperature: Temperature
    """What the logits would have to be divided by."""
    notes: Sequence[str] = ()
    """What a reader of the scores has to know, such as which examples were left out."""

    @cached_property
    def by_class(self) -> list[ClassScores]:
        """Precision, recall and counts of every class."""
        return score_classes(self.answers.confusion)

    @cached_property
    def confused(self) -> list[Confusion]:
        """The most confused pairs of classes."""
        return most_confused(self.answers.confusion, CONFUSED)

    @cached_property
    def bins(self) -> list[Bin]:
        """Answers by their probability."""
        return reliability(self.confidence, self.answers.right)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of each answer, (N,)."""
        return self.answers.confidence()

    @cached_property
    def calibrated_bins(self) -> list[Bin] | None:
        """The same with the temperature; None where there is none."""
        value = self.temperature.value
        return None if value is None else reliability(self.answers.confidence(value), self.answers.right)

    @cached_property
    def wrong(self) -> list[int]:
        """Places among the answers of the wrong ones, the least probable true class first."""
        losses = self.answers.losses.masked_fill(self.answers.right, -1.0)
        order: list[int] = losses.argsort(descending=True, stable=True).tolist()
        return order[: len(self.answers) - int(self.answers.right.sum())]

    def scores(self) -> dict[str, float | None]:
        """Macro F1 and the calibration error, in percent; the temperature, and error and loss with it."""
        value, bins = self.temperature.value, self.calibrated_bins
        labels, logits = self.answers.labels, self.answers.logits
        return {
            "macro_f1": macro_f1(self.by_class),
            "ece": calibration_error(self.bins),
            "temperature": value,
            "calibrated_ece": None if bins is None else calibration_error(bins),
            "calibrated_loss": None if value is None else mean_loss(logits, labels, value),
        }

    def rows(self) -> Iterator[tuple[str, str]]:
        """Macro F1, calibration, and the most confused classes."""
        f1 = macro_f1(self.by_class)
        yield f"macro F1 ({self.split})", "none" if f1 is None else f"{f1:.2f} %"
        error = f"{calibration_error(self.bins):.2f} %"
        if self.calibrated_bins is not None:
            error += f"; {calibration_error(self.calibrated_bins):.2f} % with the temperature"
        yield f"calibration error ({self.split})", error
        value = self.temperature.value
        yield "temperature", f"{'none' if value is None else f'{value:.3f}'}, {self.temperature.origin}"
        title = "most confused"
        for pair in self.confused[:SHOWN_CONFUSED]:
            true, answer = self._name(pair.true), self._name(pair.answer)
            yield title, f"{true} taken for {answer}: {pair.count} of {pair.of}"
            title = ""

    def numbers(self) -> dict[str, Any]:
        """Every class, the most confused pairs, and the reliability, as plain values."""
        plain = ("low", "high", "count", "confidence", "accuracy")
        return {
            "temperature_origin": self.temperature.origin,
            "notes": list(self.notes),
            "classes": [
                {
                    "class": name,
                    "count": own.examples,
                    "answers": own.answers,
                    "precision": own.precision,
                    "recall": own.recall,
                    "f1": own.f1,
                }
                for name, own in zip(self.classes, self.by_class, strict=True)
            ],
            "most_confused": [
                {
                    "true": self.classes[pair.true],
                    "predicted": self.classes[pair.answer],
                    "count": pair.count,
                    "of": pair.of,
                }
                for pair in self.confused
            ],
            "reliability": [{name: getattr(own, name) for name in plain} for own in self.bins],
        }

    def mistakes(self) -> list[dict[str, Any]]:
        """Every wrong answer: which example, its class, the answer, the probabilities of both, the loss, and
        the place of its class among the answers (2 is the second one)."""
        return [self._mistake(place) for place in self.wrong]

    def _mistake(self, place: int) -> dict[str, Any]:
        loss = float(self.answers.losses[place])
        return {
            self.examples.key: self.examples.name(int(self.answers.indices[place])),
            "true": self.classes[int(self.answers.labels[place])],
            "predicted": self.classes[int(self.answers.predicted[place])],
            "probability": float(self.confidence[place]),
            "true_probability": math.exp(-loss),
            "loss": loss,
            "true_rank": int(self.answers.ranks[place]) + 1,
        }

    def sections(self, drawn: Path | None = None) -> list[Section]:
        """Scores, classes, confusions, calibration, mistakes."""
        return [
            self._score_section(),
            self._mistake_section(),
            self._confusion_section(drawn),
            self._class_section(),
            self._calibration_section(),
        ]

    def _name(self, number: int) -> str:
        return shorten(self.classes[number], MAX_NAME)

    def _score_section(self) -> Section:
        count, right = len(self.answers), int(self.answers.right.sum())
        share = 100.0 * right / max(1, count)
        f1 = macro_f1(self.by_class)
        of = "" if f1 is None else f" Macro F1 is {f1:.2f} %."
        plural = self.examples.plural
        return Section(
            title="Scores",
            explanation="Top-1 is the share of right answers. F1 of a class is the harmonic mean of its "
            "precision and its recall, and macro F1 the mean over the classes, in which a small class counts "
            "as much as a large one. Classes that nothing is of and nothing was taken for do not count.",
            findings=[f"Of {count:,} {plural} {right:,} are right: top-1 is {share:.2f} %.{of}", *self.notes],
            numbers={},
        )

    def _mistake_section(self) -> Section:
        worst = [(self._mistake(place), int(self.answers.indices[place])) for place in self.wrong[:WORST]]
        load, key = self.examples.load, self.examples.key
        photos, rows = [], []
        for row, index in worst:
            said = f"{shorten(row['predicted'], MAX_NAME)} {100 * row['probability']:.0f}\N{NO-BREAK SPACE}%"
            share = 100 * row["true_probability"]
            true = f"{shorten(row['true'], MAX_NAME)} {share:.1f}\N{NO-BREAK SPACE}%"
            if load is not None:
                photos.append(Photo(partial(load, index), [said, f"is {true}"], row[key]))
            else:
                rows.append([shorten(row[key], MAX_TEXT), said, true])
        count, plural = len(self.wrong), self.examples.plural
        table = Table("The worst mistakes", ["text", "answer", "is"], rows)
        return Section(
            title="The worst mistakes",
            explanation="Wrong answers, those first in which the true class has the lowest probability. "
            "Below each stand the answer with its probability, and the true class with the probability that "
            "the model gave it. Such a list shows wrong labels, too.",
            findings=[
                f"{count:,} of {len(self.answers):,} {plural} have a wrong answer"
                + (f"; {len(worst)} of them are shown." if len(worst) < count else ".")
            ],
            numbers={},
            photos=photos,
            tables=[table] if rows else [],
        )

    def _confusion_section(self, drawn: Path | None) -> Section:
        confusion, plural = self.answers.confusion, self.examples.plural
        title = confusion_title(confusion, self.split, plural)
        if drawn is None:
            figure: Any = draw_confusion_matrix(confusion, self.classes, title, "class by class")
        else:
            figure = drawn / CONFUSION_PICTURE
        first = next(iter(self.confused), None)
        return Section(
            title="What is taken for what",
            explanation=f"Rows are true classes, columns are answers; a cell has the share of the {plural} "
            "of its row. All that is right lies on the diagonal.",
            findings=["Nothing is taken for anything else."]
            if first is None
            else [
                f"Most often {self._name(first.true)} is taken for {self._name(first.answer)}: {first.count} "
                f"of {first.of} times."
            ],
            numbers={},
            pictures=[Picture("The confusion matrix.", figure)],
            tables=[
                Table(
                    f"The most confused pairs, at most {CONFUSED}",
                    ["true class", "answer", plural, "of"],
                    [
                        [self._name(pair.true), self._name(pair.answer), f"{pair.count:,}", f"{pair.of:,}"]
                        for pair in self.confused
                    ],
                )
            ]
            if self.confused
            else [],
        )

    def _class_section(self) -> Section:
        numbered = enumerate(zip(self.classes, self.by_class, strict=True))
        rows = sorted(numbered, key=lambda row: (row[1][1].f1 is None, row[1][1].f1 or 0.0))
        empty, plural = sum(own.examples == 0 for own in self.by_class), self.examples.plural
        weakest = [f"{shorten(name, MAX_NAME)} ({_percent(own.f1)})" for _, (name, own) in rows[:3]]
        return Section(
            title="Class by class",
            explanation=f"Precision is the share that is right of the {plural} that were taken "
            "for a class, recall the share that is right of those that are of it.",
            findings=[
                f"The lowest F1 have {', '.join(weakest)}.",
                *([f"Of {len(rows):,} classes {empty:,} have no {plural}."] if empty else []),
            ],
            numbers={},
            tables=[
                Table(
                    "The weakest class first",
                    ["class", "number", plural, "answers", "precision", "recall", "F1"],
                    [
                        [
                            shorten(name, MAX_NAME),
                            str(number),
                            f"{own.examples:,}",
                            f"{own.answers:,}",
                            *map(_percent, (own.precision, own.recall, own.f1)),
                        ]
                        for number, (name, own) in rows
                    ],
                )
            ],
        )

    def _calibration_section(self) -> Section:
        lines = {"as it is": self.bins}
        value, error = self.temperature.value, calibration_error(self.bins)
        found = [f"The expected calibration error (ECE) is {error:.2f} %."]
        if self.calibrated_bins is None or value is None:
            found.append(f"There is no temperature: {self.temperature.origin}.")
        else:
            lines["with the temperature"] = self.calibrated_bins
            better = calibration_error(self.calibrated_bins)
            found.append(
                f"The temperature is {value:.3f}, {self.temperature.origin}. With it the error is "
                f"{better:.2f} %: the model is {'too sure' if value > 1 else 'not sure enough'} as it is."
            )
        return Section(
            title="Calibration",
            explanation="A model is calibrated if, of the answers that it gives with probability 80 %, 80 % "
            f"are right. Answers are put into {len(self.bins)} intervals of probability; the ECE is the mean "
            "distance of probability and share of right answers there, weighted by the answers (Guo et al. "
            "2017). To divide the logits by the temperature before the softmax changes no answer.",
            findings=found,
            numbers={},
            pictures=[
                Picture(
                    "Share of right answers by their probability. Below the dotted line the model is too "
                    "sure. The bars count the answers.",
                    draw_reliability(lines),
                )
            ],
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
