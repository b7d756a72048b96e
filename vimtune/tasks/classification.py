"""Image classification: one class for every image.

This file holds what can be said without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from vimtune.fields import option
from vimtune.tasks.base import Task, register_task


@register_task("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Say of each image to which of the data set's classes it belongs."""

    summary = "one class for every image; scores: top-1, top-5"

    augmentation: Literal["none", "light", "strong"] = option("light", "augmentation: none, light, strong")
    transforms: Literal["albumentations", "torchvision"] = option(
        "albumentations", "library of the transforms: albumentations, torchvision"
    )
    mixup: Annotated[float, Ge(0)] = option(0.0, "mixup alpha, 0 = off")
    cutmix: Annotated[float, Ge(0)] = option(0.0, "cutmix alpha, 0 = off")
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = option(0.0, "label smoothing of the loss")
