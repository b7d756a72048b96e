"""How the images of a data set are named and shown in what an evaluation says of them."""

from __future__ import annotations

from vimtune.data import ImageDataset
from vimtune.tasks.classes.details import Examples


def image_examples(dataset: ImageDataset) -> Examples:
    """The images of a data set, for the details of an evaluation."""
    return Examples("path", "images", dataset.describe, dataset.load)
