"""Whether images that are to be scored were trained on: such scores say little about new images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from vimtune.data import DatasetError, ImageDataset
from vimtune.data.datasets import reads_files
from vimtune.data.subset import DrawnImages
from vimtune.models.merged import is_merged_file
from vimtune.tasks.images.job import open_dataset
from vimtune.tasks.images.settings import DataSettings
from vimtune.tasks.origin import data_of_run


def trained_images(
    adapter: Path | None, images: ImageDataset, data: DataSettings | None, img_size: tuple[int, int]
) -> list[int]:
    """The indices of images that an adapter was trained on; none where nobody knows, such as of an adapter
    file without its run folder, which does not say where its images lay.

    Args:
        adapter: its file; None for a model without one.
        images: those that are to be scored.
        data: the data set of which they are a split; None for a folder.
        img_size: of the model.
    """
    run = None if adapter is None or is_merged_file(adapter) else data_of_run(adapter, DataSettings)
    if run is None:
        return []
    same = data is not None and _divided(data) == _divided(run)
    if same and images.split not in run.train_split.split("+"):
        return []  # No image is in two splits, and the files need not be looked for.
    if not same and not reads_files(run.dataset):
        return []  # What is generated otherwise is another image, whatever it is called.
    try:
        # What is wanted beside the scores is not worth a download.
        trained = open_dataset(dataclasses.replace(run, download=False), run.train_split, img_size)
    except DatasetError:  # It is gone since.
        return []
    known = {_identity(trained.describe(index)) for index in range(len(trained))}
    return [index for index in range(len(images)) if _identity(images.describe(index)) in known]


def without_images(images: ImageDataset, left_out: Collection[int]) -> ImageDataset:
    """Images without those of some indices, which may be none but not all."""
    if not left_out:
        return images
    out = frozenset(left_out)
    kept = [index for index in range(len(images)) if index not in out]
    return DrawnImages(images.split, [(images, kept)], "which were not trained on")


def _divided(data: DataSettings) -> list[object]:
    """What decides which image is in which split."""
    return [getattr(data, name) for name in (*data.naming, *data.dividing, "train_size")]


def _identity(description: str) -> tuple[int, int] | str:
    """The file of an image, by whatever path; what describes it where that is no path alone."""
    try:
        found = os.stat(description)
    except (OSError, ValueError):
        return description
    return found.st_dev, found.st_ino
