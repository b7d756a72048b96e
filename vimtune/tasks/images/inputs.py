"""What a user may ask an image model about: files, folders, and images in memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import numpy as np
from PIL import Image

from vimtune.data import CorruptImageError, ImageReadError
from vimtune.data.files import images
from vimtune.text import printable, quote

logger = logging.getLogger(__name__)

Content = bytes | bytearray | memoryview
"""What a file holds."""

Picture = str | os.PathLike[str] | Content | IO[bytes] | Image.Image | np.ndarray
"""A file or a folder by its path; the content of a file; a binary file that is open, which is read from its
beginning where it can be rewound; an image of Pillow; or an array as `vimtune.data.files.images.read_picture`
takes it."""

_EXPECTED = (
    "the path of an image or folder, bytes, a file opened as binary, an image of Pillow, or an array of numpy"
)
"""What `Picture` is, for messages."""

Unreadable = CorruptImageError | ImageReadError
"""Why nothing is said of an image."""


@dataclass(frozen=True)
class Asked:
    """One image that is asked about."""

    name: str
    """Its path, or its place among the inputs, such as "inputs[2]"."""
    picture: str | os.PathLike[str] | bytes | Image.Image | np.ndarray
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
    if _is_one(pictures):
        pictures = [pictures]
    elif not isinstance(pictures, Iterable):
        raise ValueError(f"inputs = {quote(pictures)}: expected {_EXPECTED}; or several of these")
    found: list[Asked] = []
    for number, picture in enumerate(pictures):
        if not isinstance(picture, str | os.PathLike):
            name = f"inputs[{number}]"
            found.append(Asked(name, _in_memory(picture, name)))
        elif os.path.isdir(picture):
            found += [Asked(path, path, in_folder=True) for path in images_in(Path(picture))]
        else:
            found.append(Asked(os.fspath(picture), picture))
    return found


def _is_one(pictures: Picture | Iterable[Picture]) -> TypeGuard[Picture]:
    """Whether this is one picture, although it may have parts, as an open file has lines."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim < 4
    return isinstance(pictures, str | os.PathLike | Content | Image.Image) or hasattr(pictures, "read")


def _in_memory(picture: Any, name: str) -> bytes | Image.Image | np.ndarray:
    """A picture that has no path. Files are read at once, because they may be closed before their turn.

    Raises:
        ValueError: it is none; `name` is what the message calls it.
    """
    if isinstance(picture, Image.Image | np.ndarray):
        return picture
    content = picture
    if hasattr(picture, "read"):
        try:
            if getattr(picture, "seekable", bool)():
                picture.seek(0)
            content = picture.read()
        except (OSError, ValueError) as error:  # The latter is what a closed file raises.
            raise ValueError(f"{name} = {quote(picture)} cannot be read: {printable(str(error))}") from error
    if not isinstance(content, Content):
        raise ValueError(f"{name} = {quote(picture)}: expected {_EXPECTED}")
    return bytes(content)


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
