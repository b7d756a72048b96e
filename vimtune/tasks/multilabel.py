"""Images with any number of labels each: every class is a question of its own.

This file holds what can be said without torch; `vimtune.tasks.images` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vimtune.fields import option
from vimtune.tasks.base import Score, register_task
from vimtune.tasks.components import PredictOptions
from vimtune.tasks.images.settings import TagPredictOptions
from vimtune.tasks.images.task import ImageTask

if TYPE_CHECKING:
    from vimtune.data import ImageDataset
    from vimtune.tasks.images.job import OpenedImages
    from vimtune.tasks.images.tag_details import TagDetails
    from vimtune.tasks.images.tag_predictor import TagPredictor
    from vimtune.tasks.images.tag_scoring import TagTally
    from vimtune.tasks.images.tags import TagJob, TagReport
    from vimtune.tasks.job import Evaluation


@register_task("multilabel")
@dataclass(frozen=True, kw_only=True)
class MultiLabel(ImageTask):
    """Say of each image which of the data set's classes it shows: several, one or none."""

    summary = "any number of classes for every image (data set csv); scores: mAP, micro F1"
    scores = (Score("map", "mAP", short="mAP"), Score("f1", "micro F1", short="micro F1"))
    predict_options: ClassVar[type[PredictOptions]] = TagPredictOptions
    several_labels = True

    class_weights: Literal["none", "balanced"] = option(
        "none",
        "weights of the images that have a label: none, balanced (as much as those without it)",
        purpose="loss",
    )

    def build_job(self, opened: OpenedImages) -> TagJob:
        """The job with binary cross entropy; see `ImageTask.build_job`."""
        from vimtune.tasks.images.tags import build_tag_job

        return build_tag_job(opened, self)

    def start_tally(self, num_classes: int, num_images: int, complete: bool) -> TagTally:
        """An empty tally of probabilities and labels; see `ImageTask.start_tally`."""
        from vimtune.tasks.images.tag_scoring import TagTally

        return TagTally(num_classes, num_images, complete)

    def build_details(
        self,
        dataset: ImageDataset,
        evaluation: Evaluation,
        held_out: Evaluation | None,
        held_out_note: str,
        notes: Sequence[str] = (),
    ) -> TagDetails:
        """Every class, calibration and the mistakes; see `ImageTask.build_details`."""
        from vimtune.tasks.images.tag_details import tag_details

        return tag_details(dataset, evaluation, held_out, held_out_note, notes)

    def predictor_type(self) -> type[TagPredictor]:
        """What decides which labels an image has; see `ImageTask.predictor_type`."""
        from vimtune.tasks.images.tag_predictor import TagPredictor

        return TagPredictor

    def report_type(self) -> type[TagReport]:
        """The report with the average precision of each class."""
        from vimtune.tasks.images.tags import TagReport

        return TagReport
