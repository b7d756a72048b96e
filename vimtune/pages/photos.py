"""Photographs side by side, as one picture: of a section, of a data set, or of any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from vimtune.pages.section import Photo, Picture
from vimtune.pages.style import picture_style
from vimtune.text import counted, quote, shorten

if TYPE_CHECKING:
    from PIL import Image

    from vimtune.data import ImageDataset

COLUMNS = 8
"""Images side by side in a picture."""
TILE = 1.35
"""Width of an image with its margins in the picture, in inches."""
HEIGHT = 1.25
"""Height of an image with the text below it, as a multiple of its width."""
MARGIN = 0.02
"""Empty border of an image, likewise."""
MAX_SIDE = 224
"""Pixels to which larger images are reduced."""
MAX_NAME = 22
"""Characters of a name below an image."""
SIZE, ROOM = 7.0, 22
"""Size of the letters below an image, in points, and how many have room in a line. A longer line has smaller
ones."""
MAX_LINE = 34
"""Characters of a line of a user, who may put any text there."""


def draw_photos(groups: Sequence[tuple[Sequence[Photo], str]], columns: int = COLUMNS) -> Figure:
    """Photographs with their lines below them. Those that are not square are shown as squares.

    Args:
        groups: photographs, and the colour of the lines below them; each group begins a new row.
        columns: how many stand side by side.
    """
    rows = [(kind[n : n + columns], color) for kind, color in groups for n in range(0, len(kind), columns)]
    with picture_style():
        # One axes for all images is drawn many times as fast as one for each.
        figure = Figure(figsize=(columns * TILE, HEIGHT * TILE * max(1, len(rows))))
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
        axes.set_axis_off()
        for row, (line, color) in enumerate(rows):
            for left, photo in enumerate(line):
                top = HEIGHT * row
                image = photo.load()
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                place = (left + MARGIN, left + 1 - MARGIN, top + 1 - MARGIN, top + MARGIN)
                axes.imshow(np.asarray(image), extent=place, interpolation="nearest")
                text, longest = "\n".join(photo.lines), max(map(len, photo.lines), default=0)
                size = SIZE * min(1.0, ROOM / max(1, longest))
                axes.text(left + 0.5, top + 1, text, ha="center", va="top", fontsize=size, color=color)
        axes.set(xlim=(0, columns), ylim=(HEIGHT * max(1, len(rows)), 0), aspect="auto")
        return figure


def draw_images(
    images: Sequence[Image.Image], captions: Sequence[str] = (), *, columns: int = COLUMNS
) -> Picture:
    """Images side by side as one picture, which a notebook shows.

    Args:
        images: images of Pillow, at least one.
        captions: a text below each, of one or two lines; none if empty.
        columns: how many stand side by side at most.

    Raises:
        ValueError: no images, other numbers of images and captions, or `columns` is below 1.
    """
    from PIL import Image

    images = list(images) if isinstance(images, Iterable) else [images]
    if not images:
        raise ValueError("there are no images to draw: expected at least one")
    for number, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"images[{number}] = {quote(image)}: expected an image of Pillow; PIL.Image.open reads a "
                "file, PIL.Image.fromarray takes an array"
            )
    if captions and len(captions) != len(images):
        raise ValueError(
            f"{counted(len(captions), 'captions')} for {counted(len(images), 'images')}: expected one each"
        )
    if columns < 1:
        raise ValueError(f"columns = {columns}: expected at least 1")
    photos = [
        Photo(
            partial(image.convert, "RGB"), [shorten(line, MAX_LINE) for line in (text or "").splitlines()], ""
        )
        for image, text in zip_longest(images, captions)
    ]
    return Picture("", draw_photos([(photos, "black")], min(columns, len(photos))))


def draw_dataset(dataset: ImageDataset, *, classes: int = COLUMNS, each: int = 3) -> Picture:
    """The first images of the first classes of a data set, a class to a column, which a notebook shows.

    Args:
        dataset: of which images are loaded; `vimtune.create_dataset` makes one.
        classes: how many classes at most.
        each: how many images of each at most.

    Raises:
        ValueError: the data set has no images.
        CorruptImageError: one of them cannot be decoded.
    """
    columns: list[list[int]] = [[] for _ in range(min(classes, len(dataset.classes)))]
    for index, label in enumerate(dataset.targets):
        if 0 <= label < len(columns) and len(columns[label]) < each:
            columns[label].append(index)
    shown = [index for row in zip_longest(*filter(None, columns)) for index in row if index is not None]
    tags = dataset.tags or [(label,) for label in dataset.targets]
    names = [", ".join(dataset.classes[label] for label in tags[index]) for index in shown]
    width = sum(map(bool, columns))
    return draw_images([dataset.load(index) for index in shown], names, columns=max(1, width))
