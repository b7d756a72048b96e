"""The picture of some images with right and wrong answers. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vimtune.data import ImageDataset
from vimtune.pages.style import picture_style
from vimtune.tasks.classes.confusion import class_labels
from vimtune.tasks.images.examples import Example
from vimtune.text import shorten
from vimtune.training import pictures

COLUMNS = 8
"""Images side by side in the picture."""
TILE = 1.35
"""Width of an image with its margins in the picture, in inches."""
HEIGHT = 1.25
"""Height of an image with the text below it, as a multiple of its width."""
MARGIN = 0.02
"""Empty border of an image, likewise."""
MAX_SIDE = 224
"""Pixels to which larger images are reduced."""
MAX_NAME = 22
"""Characters of a class name for which there is room below an image."""


def draw_gallery(examples: Sequence[Example], dataset: ImageDataset) -> Figure:
    """Images with the answers below them; wrong answers are red, with the true class below.

    Images that are not square are shown as squares.

    Args:
        examples: which images, and the answers.
        dataset: has the images and the names of the classes.
    """
    names = [shorten(name, MAX_NAME) for name in class_labels(dataset.classes)]
    kinds = ([each for each in examples if each.right is right] for right in (True, False))
    rows = [kind[start : start + COLUMNS] for kind in kinds for start in range(0, len(kind), COLUMNS)]
    with picture_style():
        # One axes for all images is drawn many times as fast as one for each.
        figure = Figure(figsize=(COLUMNS * TILE, HEIGHT * TILE * max(1, len(rows))))
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
        axes.set_axis_off()
        for row, line in enumerate(rows):
            for left, example in enumerate(line):
                top = HEIGHT * row
                image = dataset.load(example.index)
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                place = (left + MARGIN, left + 1 - MARGIN, top + 1 - MARGIN, top + MARGIN)
                axes.imshow(np.asarray(image), extent=place, interpolation="nearest")
                text = names[example.predicted] + ("" if example.right else f"\nis {names[example.label]}")
                color = "black" if example.right else "tab:red"
                axes.text(left + 0.5, top + 1, text, ha="center", va="top", fontsize=7, color=color)
        axes.set(xlim=(0, COLUMNS), ylim=(HEIGHT * max(1, len(rows)), 0), aspect="auto")
        return figure


def write_gallery(path: Path, examples: Sequence[Example], dataset: ImageDataset) -> None:
    """Write the picture of `draw_gallery` to a PNG file."""
    pictures.save_picture(draw_gallery(examples, dataset), path)
