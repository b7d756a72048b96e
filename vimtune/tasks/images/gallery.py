"""The picture of some images with right and wrong answers. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from vimtune.data import ImageDataset
from vimtune.pages import style
from vimtune.pages.photos import MAX_NAME, draw_photos
from vimtune.pages.section import Photo
from vimtune.tasks.classes.confusion import class_labels
from vimtune.tasks.images.examples import Example
from vimtune.text import shorten


def draw_gallery(examples: Sequence[Example], dataset: ImageDataset) -> Figure:
    """Images with the answers below them; wrong answers are red, with the true class below.

    Args:
        examples: which images, and the answers.
        dataset: has the images and the names of the classes.
    """
    names = [shorten(name, MAX_NAME) for name in class_labels(dataset.classes)]

    def photo(example: Example) -> Photo:
        lines = [names[example.predicted], *([] if example.right else [f"is {names[example.label]}"])]
        return Photo(partial(dataset.load, example.index), lines, dataset.describe(example.index))

    right, wrong = ([photo(each) for each in examples if each.right is kind] for kind in (True, False))
    return draw_photos([(right, "black"), (wrong, "tab:red")])


def write_gallery(path: Path, examples: Sequence[Example], dataset: ImageDataset) -> None:
    """Write the picture of `draw_gallery` to a PNG file."""
    style.save_picture(draw_gallery(examples, dataset), path)
