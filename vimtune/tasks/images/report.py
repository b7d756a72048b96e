"""The report of an image classifier: accuracies, accuracy per class, and which classes are confused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vimtune.metrics.calibration import calibration_error
from vimtune.metrics.classes import macro_f1, most_confused, score_classes
from vimtune.tasks.images.scoring import ImageEvaluation
from vimtune.tasks.job import Outcome
from vimtune.tasks.report import Report, percent_rows
from vimtune.text import shorten

MOST_CONFUSED = 10
"""Number of pairs of classes that the report lists."""
SHOWN_CONFUSED = 3
"""Number of them that the final table shows."""
MAX_NAME = 40
"""Characters of a class name in the final table."""


@dataclass(frozen=True, kw_only=True)
class ImageReport(Report):
    """Result of the training of an image classifier. Accuracies are percent.

    `top1`, `top5` and `per_class` are scores of the saved adapter on `split`; `top5` is None for five classes
    or fewer. `best_top1` is the score on `selection_split` by which the epoch of the adapter was chosen,
    `last_top1` that of the last epoch. `images_per_second` counts training alone, over all processes.
    `most_confused` lists pairs of classes, the most frequent first: of the `of` images of the class `true`,
    `images` were taken for the class `predicted`.
    """

    top1: float
    top5: float | None
    per_class: dict[str, float | None]
    most_confused: list[dict[str, Any]]
    num_images: int
    num_classes: int
    best_top1: float
    last_top1: float
    images_per_second: float
    num_workers: dict[str, int] | None = None
    """How many processes prepared the images of each split; None in reports of earlier versions."""
    macro_f1: float | None = None
    """Mean F1 of the classes, in percent; None in reports of earlier versions."""
    ece: float | None = None
    """Expected calibration error, in percent; None in reports of earlier versions."""

    def scores_by_name(self) -> dict[str, float | None]:
        """Top-1 and top-5."""
        return {"top1": self.top1, "top5": self.top5}

    def num_scored(self) -> int:
        """`num_images`."""
        return self.num_images

    def further_scores(self) -> Iterator[tuple[str, str]]:
        """Macro F1 and the calibration error."""
        return percent_rows({"macro F1": self.macro_f1, "expected calibration error": self.ece})

    def score_rows(self) -> Iterator[tuple[str, str]]:
        """Top-1 and top-5."""
        yield f"top-1 ({self.split})", f"{self.top1:.2f} %"
        none = f"not counted: there are only {self.num_classes} classes"
        yield f"top-5 ({self.split})", none if self.top5 is None else f"{self.top5:.2f} %"

    def selected_by(self) -> str:
        """Top-1 in the best epoch."""
        return f"{self.selection_split} top-1 {self.best_top1:.2f} %"

    def speed(self) -> str:
        """Images per second."""
        return f"{self.images_per_second:.0f} img/s"

    def detail_rows(self) -> Iterator[tuple[str, str]]:
        """The most confused classes."""
        title = "most confused"
        for pair in self.most_confused[:SHOWN_CONFUSED]:
            true, predicted = shorten(pair["true"], MAX_NAME), shorten(pair["predicted"], MAX_NAME)
            yield title, f"{true} taken for {predicted}: {pair['images']} of {pair['of']}"
            title = ""


def build_image_report(
    shared: Mapping[str, Any],
    outcome: Outcome,
    classes: Sequence[str],
    num_workers: dict[str, int] | None = None,
) -> ImageReport:
    """The report of a run.

    Args:
        shared: values of the fields of `Report`.
        outcome: what the run has reached; its evaluation is an `ImageEvaluation`.
        classes: C names.
        num_workers: how many processes prepared the images of each split.
    """
    found = outcome.evaluation
    assert isinstance(found, ImageEvaluation), "the tally of images gives one"
    return ImageReport(
        **shared,
        top1=_percent(found.scores),
        top5=found.scores["top5"],
        per_class=dict(zip(classes, found.per_class, strict=True)),
        most_confused=[
            {
                "true": classes[pair.true],
                "predicted": classes[pair.answer],
                "images": pair.count,
                "of": pair.of,
            }
            for pair in most_confused(found.confusion, MOST_CONFUSED)
        ],
        num_images=found.count,
        num_classes=len(classes),
        best_top1=_percent(outcome.best),
        last_top1=_percent(outcome.last),
        images_per_second=outcome.rate,
        num_workers=num_workers,
        macro_f1=macro_f1(score_classes(found.confusion)),
        ece=calibration_error(found.answers.questions.bins()),
    )


def _percent(scores: Mapping[str, float | None]) -> float:
    """Top-1, which every evaluation has."""
    top1 = scores["top1"]
    assert top1 is not None
    return top1
