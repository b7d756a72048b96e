"""Data sets, transforms and loaders.

A new data set is one file beside these with a class under `@register_dataset("name")`, and its name in the
import below.
"""

from vimtune.data import caltech, cars, flowers, folder, synthetic  # noqa: F401  (each registers itself)
from vimtune.data.base import (
    SPLITS,
    FileDataset,
    ImageDataset,
    create_dataset,
    dataset_class,
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
from vimtune.data.images import FoundImages, find_images, load_image
from vimtune.data.loader import ImageLoader, create_loader
from vimtune.data.transforms import (
    Transform,
    build_transform,
    model_preprocessing,
    read_transform,
)
from vimtune.preprocessing import LIBRARIES, PRESETS

__all__ = [
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
    "dataset_options",
    "dataset_summary",
    "find_images",
    "list_datasets",
    "load_image",
    "model_preprocessing",
    "read_transform",
    "register_dataset",
]
