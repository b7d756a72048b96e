"""Data sets, transforms and loaders.

A new data set is one file beside these with a class under `@register_dataset("name")`, and its name in the
import below. Data sets are listed, and their options checked, without importing torch, numpy or
Pillow, so that the command line answers at once; what needs these is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vimtune.data import caltech, cars, flowers, synthetic, tiny_imagenet, vtab  # noqa: F401  (they register)
from vimtune.data.base import SPLITS, FileDataset, ImageDataset
from vimtune.data.datasets import (
    DATASETS,
    create_dataset,
    dataset_class,
    dataset_option_problems,
    dataset_options,
    dataset_summary,
    list_datasets,
    register_dataset,
)
from vimtune.data.errors import (
    CorruptImageError,
    DatasetError,
    ImageReadError,
    MissingSplitError,
    TooManyCorruptError,
    WorkerError,
)
from vimtune.data.own import folder, hf, table  # noqa: F401
from vimtune.late_names import late_names

if TYPE_CHECKING:
    from vimtune.data.files.images import FoundImages, find_images, load_image
    from vimtune.data.loading.image_loader import ImageLoader
    from vimtune.data.loading.loader import create_loader
    from vimtune.data.transforms import Transform, build_transform, model_preprocessing, read_transform
    from vimtune.preprocessing import LIBRARIES, PRESETS

__all__ = [
    "DATASETS",
    "LIBRARIES",
    "PRESETS",
    "SPLITS",
    "CorruptImageError",
    "DatasetError",
    "FileDataset",
    "FoundImages",
    "ImageDataset",
    "ImageLoader",
    "ImageReadError",
    "MissingSplitError",
    "TooManyCorruptError",
    "Transform",
    "WorkerError",
    "build_transform",
    "create_dataset",
    "create_loader",
    "dataset_class",
    "dataset_option_problems",
    "dataset_options",
    "dataset_summary",
    "find_images",
    "list_datasets",
    "load_image",
    "model_preprocessing",
    "read_transform",
    "register_dataset",
]

_HOMES = {
    "vimtune.data.files.images": ("FoundImages", "find_images", "load_image"),
    "vimtune.data.loading.image_loader": ("ImageLoader",),
    "vimtune.data.loading.loader": ("create_loader",),
    "vimtune.data.transforms": ("Transform", "build_transform", "model_preprocessing", "read_transform"),
    "vimtune.preprocessing": ("LIBRARIES", "PRESETS"),
}
"""Modules that define the names which are imported on first use."""

__getattr__, __dir__ = late_names(__name__, _HOMES)
