"""Image classification: one class for every image.

This file holds what can be said without torch; `vimtune.tasks.images` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from vimtune import parsers
from vimtune.fields import PositiveAmount, option
from vimtune.tasks.base import Score, Task, register_task
from vimtune.tasks.components import PredictOptions
from vimtune.tasks.images.settings import ImagePredictOptions, parse_class_weights
from vimtune.text import quote

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vimtune.recipe import Recipe
    from vimtune.tasks.images.job import ImageJob
    from vimtune.tasks.images.predictor import ImagePredictor
    from vimtune.tasks.images.report import ImageReport
    from vimtune.tasks.job import Trial
    from vimtune.tasks.merging import Merged, Precision
    from vimtune.training.distributed import Processes


@register_task("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Say of each image to which of the data set's classes it belongs."""

    summary = "one class for every image; scores: top-1, top-5"
    unit = "images"
    short_unit = "img"
    examples = "images"
    scores = (Score("top1", "top-1"), Score("top5", "top-5"))
    predict_options: ClassVar[type[PredictOptions]] = ImagePredictOptions

    augmentation: Literal["none", "light", "medium", "strong"] = option(
        "light", "augmentation: none, light, medium, strong"
    )
    transforms: Literal["albumentations", "torchvision"] = option(
        "albumentations", "library of the transforms: albumentations, torchvision"
    )
    mixup: Annotated[float, Ge(0)] = option(0.0, "mixup alpha, 0 = off")
    cutmix: Annotated[float, Ge(0)] = option(0.0, "cutmix alpha, 0 = off")
    class_weights: str | dict[str, Any] = option(
        "none",
        "weights in the loss: none, balanced (by the numbers of images), cat=2,dog=0.5",
        parse=parse_class_weights,
    )
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = option(0.0, "label smoothing of the loss")
    teacher: str | None = option(
        None,
        "learn from this run folder, adapter or merged file as well (distillation)",
        parse=parsers.optional(parsers.absolute_path),
    )
    teacher_targets: Literal["soft", "hard"] = option(
        "soft", "what the teacher gives: soft (probabilities), hard (its best class)"
    )
    teacher_weight: Annotated[float, Gt(0), Le(1)] = option(0.5, "share of the teacher in the loss")
    teacher_temperature: PositiveAmount = option(1.0, "softens the probabilities of teacher and student")

    def open(self, recipe: Recipe, processes: Processes) -> ImageJob:
        """Open the image data set and the model of `recipe`; see `Task.open`."""
        from vimtune.tasks.images.job import open_images

        return open_images(recipe, self, processes)

    def open_base(self, recipe: Recipe, processes: Processes) -> nn.Module:
        """The backbone with its weights; see `Task.open_base`."""
        from vimtune.tasks.images.job import open_base

        return open_base(recipe, processes)

    def open_trial(
        self, recipe: Recipe, processes: Processes, split: str, adapter: Path | None, force: bool
    ) -> Trial:
        """Open the images to score and the model; see `Task.open_trial`."""
        from vimtune.tasks.images.trial import open_trial

        return open_trial(recipe, processes, split, adapter, force)

    def read_inputs(self, inputs: Sequence[str], classes: Sequence[str]) -> list[Path]:
        """The images among files and folders; see `Task.read_inputs`."""
        from vimtune.tasks.images.predictor import find_images

        del classes
        return find_images([Path(parsers.path(each)) for each in inputs])

    def open_predictor(
        self, adapter: Path, base: Mapping[str, Any], device: torch.device, backend: str, force: bool
    ) -> ImagePredictor:
        """Create the model of an adapter file or a merged file; see `Task.open_predictor`."""
        from vimtune.tasks.images.predictor import load_image_predictor

        checkpoint = _checkpoint_of(base)
        return load_image_predictor(
            adapter, checkpoint=checkpoint, device=device, backend=backend, force=force
        )

    def merge(
        self,
        adapter: Path,
        output: Path,
        base: Mapping[str, Any],
        device: torch.device,
        backend: str,
        force: bool,
        precision: Precision,
    ) -> Merged:
        """Write plain weights that timm loads; see `Task.merge`."""
        from vimtune.tasks.images.merging import merge_images

        return merge_images(adapter, output, _checkpoint_of(base), device, backend, force, precision)

    def report_type(self) -> type[ImageReport]:
        """The report with accuracy per class and the most confused classes."""
        from vimtune.tasks.images.report import ImageReport

        return ImageReport


def _checkpoint_of(base: Mapping[str, Any]) -> Path | None:
    """The file of base weights that a user gives for an adapter of images; None if there is none.

    Raises:
        ValueError: something else is given.
    """
    for name in base:
        if name != "checkpoint":
            raise ValueError(
                f"{name} = {quote(base[name])}: an adapter of images says itself which model it needs; "
                "its weights may be given as checkpoint"
            )
    return base.get("checkpoint")
