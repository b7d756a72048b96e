"""What an evaluation of a classifier says of classes, confusions, calibration and mistakes.

N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vimtune.metrics.classes import ClassScores, Confusion, macro_f1, most_confused, score_classes
from vimtune.pages.section import Section
from vimtune.tasks.classes.answers import ClassAnswers
from vimtune.tasks.classes.calibration import Calibration, Temperature
from vimtune.tasks.details import Details
from vimtune.text import shorten

if TYPE_CHECKING:
    from PIL import Image

CONFUSED = 20
"""Pairs of classes that files and pages list."""
WORST = 24
"""Mistakes that a page shows."""
SHOWN_CONFUSED = 3
"""Pairs that the final table shows."""
MAX_NAME = 40
"""Characters of a class name in tables."""


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
    share: str = "top-1"
    """What the share of right answers is called."""


def macro_row(by_class: Sequence[ClassScores], split: str) -> Iterator[tuple[str, str]]:
    """The line of a final table about macro F1."""
    f1 = macro_f1(by_class)
    yield f"macro F1 ({split})", "none" if f1 is None else f"{f1:.2f} %"


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

    @cached_property
    def by_class(self) -> list[ClassScores]:
        """Precision, recall and counts of every class."""
        return score_classes(self.answers.confusion)

    @cached_property
    def confused(self) -> list[Confusion]:
        """The most confused pairs of classes."""
        return most_confused(self.answers.confusion, CONFUSED)

    @cached_property
    def calibration(self) -> Calibration:
        """Whether the probabilities of the answers are to be believed."""
        return Calibration(self.answers.questions, self.temperature)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of each answer, (N,)."""
        return self.answers.questions.probabilities()

    @cached_property
    def wrong(self) -> list[int]:
        """Places among the answers of the wrong ones, the least probable true class first."""
        losses = self.answers.losses.masked_fill(self.answers.right, -1.0)
        order: list[int] = losses.argsort(descending=True, stable=True).tolist()
        return order[: len(self.answers) - int(self.answers.right.sum())]

    def scores(self) -> dict[str, float | None]:
        """Macro F1 and the calibration error, in percent; the temperature, and error and loss with it."""
        return {"macro_f1": macro_f1(self.by_class), **self.calibration.scores()}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Macro F1, calibration, and the most confused classes."""
        yield from macro_row(self.by_class, self.split)
        yield from self.calibration.rows(self.split)
        title = "most confused"
        for pair in self.confused[:SHOWN_CONFUSED]:
            true, answer = self.short_name(pair.true), self.short_name(pair.answer)
            yield title, f"{true} taken for {answer}: {pair.count} of {pair.of}"
            title = ""

    def numbers(self) -> dict[str, Any]:
        """Every class, the most confused pairs, and the reliability, as plain values."""
        return {
            **super().numbers(),
            **self.calibration.numbers(),
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
        }

    def mistake_columns(self) -> tuple[str, ...]:
        """The example as its task calls it, then what every classifier has."""
        own = ("true", "predicted", "probability", "true_probability", "loss", "true_rank")
        return (self.examples.key, *own)

    def mistakes(self) -> list[dict[str, Any]]:
        """Every wrong answer: which example, its class, the answer, the probabilities of both, the loss, and
        the place of its class among the answers (2 is the second one)."""
        return [self.mistake(place) for place in self.wrong]

    def mistake(self, place: int) -> dict[str, Any]:
        """One of `mistakes`, by its place among the answers."""
        loss = float(self.answers.losses[place])
        values = (
            self.examples.name(int(self.answers.indices[place])),
            self.classes[int(self.answers.labels[place])],
            self.classes[int(self.answers.predicted[place])],
            float(self.confidence[place]),
            math.exp(-loss),
            loss,
            int(self.answers.ranks[place]) + 1,
        )
        return dict(zip(self.mistake_columns(), values, strict=True))

    def sections(self, drawn: Path | None = None) -> dict[str, Section]:
        """ "scores", "mistakes", "confusions", "classes" and "calibration"."""
        # This comes late, because drawing takes long to import.
        from vimtune.tasks.classes.page import class_sections

        return class_sections(self, drawn)

    def short_name(self, number: int) -> str:
        """Name of a class for tables."""
        return shorten(self.classes[number], MAX_NAME)
