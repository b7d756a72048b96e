"""What a user may ask an image model about: files, folders, and images in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vimtune.data import CorruptImageError, ImageReadError
from vimtune.data.files import images
from vimtune.text import printable, quote

logger = logging.getLogger(__name__)

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A file or a folder by its path; the content of a file; an image of Pillow; or an array as
`vimtune.data.files.images.read_picture` takes it."""

Unreadable = CorruptImageError | ImageReadError
"""Why nothing is said of an image."""


@dataclass(frozen=True)
class Asked:
    """One image that is asked about."""

    name: str
    """Its path, or its place among the inputs, such as "inputs[2]"."""
    picture: Picture
    in_folder: bool = False
    """Whether it was found in a folder, and not named by itself: such images may be left out."""

    def read(self) -> Image.Image | Unreadable:
        """The image as RGB, or why it cannot be read."""
        try:
            if isinstance(self.picture, bytes | Image.Image | np.ndarray):
                return images.read_picture(self.picture, self.name)
            return images.load_image(self.picture)
        except (CorruptImageError, ImageReadError) as error:
            return error


def asked_about(pictures: Picture | Iterable[Picture]) -> list[Asked]:
    """The images that a user names: one, or several.

    Raises:
        ValueError: something that is no picture, or a folder without images.
    """
    if isinstance(pictures, str | os.PathLike | bytes | Image.Image) or (
        isinstance(pictures, np.ndarray) and pictures.ndim < 4
    ):
        pictures = [pictures]
    found: list[Asked] = []
    for number, picture in enumerate(pictures):
        if isinstance(picture, bytes | Image.Image | np.ndarray):
            found.append(Asked(f"inputs[{number}]", picture))
        elif not isinstance(picture, str | os.PathLike):
            raise ValueError(
                f"inputs[{number}] is a {type(picture).__name__}: expected the path of an image or a folder, "
                "bytes, an image of Pillow, or an array of numpy"
            )
        elif os.path.isdir(picture):
            found += [Asked(path, path, in_folder=True) for path in images_in(Path(picture))]
        else:
            found.append(Asked(os.fspath(picture), picture))
    return found


def leave_out_of_folder(asked: Asked, error: Unreadable) -> None:
    """What is done about an image that cannot be read unless somebody says something else: one of a folder is
    left out with a warning.

    Raises:
        CorruptImageError, ImageReadError: it was named by itself.
    """
    if not asked.in_folder:
        raise error
    logger.warning("left out %s: %s", printable(error.path), printable(error.reason))


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Image files among `inputs`; folders are searched as those of training data are, in sorted order.

    Raises:
        ValueError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found += map(Path, images_in(path))
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"no such image or folder: {quote(str(path))}")
    return found


def images_in(folder: Path) -> list[str]:
    """The image files of a folder and its sub-folders, sorted; a warning names what is left out.

    Images of formats that cannot be read here are among them, so that whoever reads them tells of them as of
    damaged ones.

    Raises:
        ValueError: there are none that can be read.
    """
    inside, shown = images.find_images(folder), quote(str(folder))
    if not inside.paths:
        left_out = images.describe_left_out(inside.left_out, folder)
        also = f" It has {left_out}." if left_out else ""
        raise ValueError(f"no images in {shown}.{also} Image types: {' '.join(images.EXTENSIONS)}")
    others = {reason: paths for reason, paths in inside.left_out.items() if reason not in inside.unreadable}
    if others:
        logger.warning("left out in %s: %s", shown, images.describe_left_out(others, folder))
    unreadable = [path for reason in inside.unreadable for path in inside.left_out[reason]]
    return sorted(inside.paths + unreadable)
