"""The picture of some images with right and wrong answers. C classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vimtune.tasks.images.confusion import class_labels
from vimtune.tasks.images.examples import Gallery
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
MAX_NAME = 22
"""Characters of a class name for which there is room below an image."""


def draw_gallery(
    gallery: Gallery, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Figure:
    """Images with the answers below them; wrong answers are red, with the true class below.

    Images that are not square are shown as squares.

    Args:
        gallery: the images.
        classes: C names.
        mean: that of each channel by which the images are normalised.
        std: likewise.
    """
    names = [shorten(name, MAX_NAME) for name in class_labels(classes)]
    lines = [
        kept[start : start + COLUMNS]
        for kept in (gallery.right, gallery.wrong)
        for start in range(0, len(kept), COLUMNS)
    ]
    with pictures.picture_style():
        # One axes for all images is drawn many times as fast as one for each.
        figure = Figure(figsize=(COLUMNS * TILE, HEIGHT * TILE * max(1, len(lines))))
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
        axes.set_axis_off()
        for row, line in enumerate(lines):
            for left, example in enumerate(line):
                top = HEIGHT * row
                right = example.label == example.predicted
                text = names[example.predicted] + ("" if right else f"\nis {names[example.label]}")
                place = (left + MARGIN, left + 1 - MARGIN, top + 1 - MARGIN, top + MARGIN)
                axes.imshow(_pixels(example.image, mean, std), extent=place, interpolation="nearest")
                color = "black" if right else "tab:red"
                axes.text(left + 0.5, top + 1, text, ha="center", va="top", fontsize=7, color=color)
        axes.set(xlim=(0, COLUMNS), ylim=(HEIGHT * max(1, len(lines)), 0), aspect="auto")
        return figure


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image (3, H, W) as pixels (H, W, 3) from 0 to 1."""
    scale, shift = (torch.tensor(list(values)).view(3, 1, 1) for values in (std, mean))
    pixels: np.ndarray = (image * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels


def write_gallery(
    path: Path, gallery: Gallery, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write the picture of `draw_gallery` to a PNG file."""
    pictures.save_picture(draw_gallery(gallery, classes, mean, std), path)
