"""Image classification: one class for every image.

This file holds what can be said without torch; `vimtune.tasks.images` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.fields import PositiveAmount, option
from vimtune.tasks.base import Score, register_task
from vimtune.tasks.images.settings import parse_class_weights
from vimtune.tasks.images.task import ImageTask

if TYPE_CHECKING:
    from vimtune.data import ImageDataset
    from vimtune.tasks.classes.details import ClassDetails
    from vimtune.tasks.images.job import ClassJob, OpenedImages
    from vimtune.tasks.images.report import ImageReport
    from vimtune.tasks.images.scoring import ImageTally
    from vimtune.tasks.job import Evaluation


@register_task("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(ImageTask):
    """Say of each image to which of the data set's classes it belongs."""

    summary = "one class for every image; scores: top-1, top-5"
    scores = (Score("top1", "top-1", hub_metric="accuracy"), Score("top5", "top-5"))

    mixup: Annotated[float, Ge(0)] = option(0.0, "mixup alpha, 0 = off", purpose="loss")
    cutmix: Annotated[float, Ge(0)] = option(0.0, "cutmix alpha, 0 = off", purpose="loss")
    class_weights: str | dict[str, Any] = option(
        "none",
        "weights in the loss: none, balanced (by the numbers of images), cat=2,dog=0.5",
        parse=parse_class_weights,
        purpose="loss",
    )
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "label smoothing of the loss", purpose="loss"
    )
    teacher: str | None = option(
        None,
        "learn from this run folder, adapter or merged file as well (distillation)",
        parse=parsers.optional(parsers.absolute_path),
        purpose="loss",
    )
    teacher_targets: Literal["soft", "hard"] = option(
        "soft", "what the teacher gives: soft (probabilities), hard (its best class)", purpose="loss"
    )
    teacher_weight: Annotated[float, Gt(0), Le(1)] = option(
        0.5, "share of the teacher in the loss", purpose="loss"
    )
    teacher_temperature: PositiveAmount = option(
        1.0, "softens the probabilities of teacher and student", purpose="loss"
    )

    @property
    def repeats_itself(self) -> bool:
        """Whether nothing is drawn, and no teacher is asked about the pixels."""
        return super().repeats_itself and not (self.mixup or self.cutmix or self.teacher)

    def build_job(self, opened: OpenedImages) -> ClassJob:
        """The job with cross entropy, mixing and a teacher; see `ImageTask.build_job`."""
        from vimtune.tasks.images.job import build_class_job

        return build_class_job(opened, self)

    def start_tally(self, num_classes: int, num_images: int, complete: bool) -> ImageTally:
        """An empty tally of right and wrong answers; see `ImageTask.start_tally`."""
        from vimtune.tasks.images.scoring import ImageTally

        return ImageTally(num_classes, num_images, complete)

    def build_details(
        self,
        dataset: ImageDataset,
        evaluation: Evaluation,
        held_out: Evaluation | None,
        held_out_note: str,
        notes: Sequence[str] = (),
    ) -> ClassDetails:
        """Classes, confusions, calibration and mistakes; see `ImageTask.build_details`."""
        from vimtune.tasks.images.details import image_details

        return image_details(dataset, evaluation, held_out, held_out_note, notes)

    def report_type(self) -> type[ImageReport]:
        """The report with accuracy per class and the most confused classes."""
        from vimtune.tasks.images.report import ImageReport

        return ImageReport
