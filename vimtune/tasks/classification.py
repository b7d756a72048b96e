"""Image classification: one class for every image.

This file holds what can be said without torch; `vimtune.tasks.images` does the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.tasks.base import Score, Task, register_task

if TYPE_CHECKING:
    from vimtune.recipe import Recipe
    from vimtune.tasks.images.job import ImageJob
    from vimtune.tasks.images.report import ImageReport
    from vimtune.train.distributed import Processes


@register_task("classification")
@dataclass(frozen=True)
class Classification(Task):
    """Say of each image to which of the data set's classes it belongs."""

    summary = "one class for every image; scores: top-1, top-5"
    unit = "images"
    short_unit = "img"
    examples = "images"
    scores = (Score("top1", "top-1"), Score("top5", "top-5"))

    def open(self, recipe: Recipe, processes: Processes) -> ImageJob:
        """Open the image data set and the model of `recipe`; see `Task.open`."""
        from vimtune.tasks.images.job import open_images

        return open_images(recipe, processes)

    def report_type(self) -> type[ImageReport]:
        """The report with accuracy per class and the most confused classes."""
        from vimtune.tasks.images.report import ImageReport

        return ImageReport
