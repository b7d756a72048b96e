"""Lists of images in text files, one `path label` a line, as folders of VTAB-1k have them.

A list may come from anybody. Its paths lead to files below the folder of the list and nowhere else, and every
mistake is one line that names file and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vimtune.data.errors import DatasetError, MissingSplitError
from vimtune.data.files.checks import check_files_exist, read_table
from vimtune.text import counted, printable, quote

FILES = {
    "train": "train800.txt",
    "val": "val200.txt",
    "train+val": "train800val200.txt",
    "test": "test.txt",
}
"""The list of each split."""
_TOGETHER = ("train", "val")
"""The splits that "train+val" is made of; their lists serve where it has none of its own."""

MAX_BYTES = 64 * 2**20
"""Longest list that is read: the longest of VTAB-1k have some 70,000 lines."""
MAX_LABEL = 99_999
"""Largest label."""
MAX_PATH = 1024
"""Characters of a path."""


@dataclass(frozen=True)
class ListedImage:
    """One line of a list."""

    path: str
    """Path of the image below the folder of the list."""
    label: int
    """Index of its class."""


@dataclass(frozen=True)
class ImageLists:
    """The lists of one folder."""

    root: Path
    """The folder."""
    splits: dict[str, list[ListedImage]]
    """The images of each split that has a list."""
    num_classes: int
    """How many classes there are, in all lists together."""

    def images(self, split: str) -> list[ListedImage]:
        """The images of a split, which are looked for.

        Raises:
            MissingSplitError: there is no list of it.
            DatasetError: an image is not there.
        """
        parts = self._parts(split)
        images = [image for part in parts for image in self.splits[part]]
        check_files_exist(
            [str(self.root / image.path) for image in images],
            f"{self.names(split)} in {printable(str(self.root))}",
            "Its paths start at the folder of the list.",
        )
        return images

    def names(self, split: str) -> str:
        """The names of the lists that make up a split."""
        return " and ".join(FILES[part] for part in self._parts(split))

    def _parts(self, split: str) -> tuple[str, ...]:
        """The splits with lists of their own that make up a split."""
        if split in self.splits:
            return (split,)
        if split == "train+val" and all(part in self.splits for part in _TOGETHER):
            return _TOGETHER
        there = ", ".join(FILES[part] for part in self.splits)
        raise MissingSplitError(
            f"{printable(str(self.root))} has no {FILES[split]} for the split {split!r}; it has {there}."
        )


def read_lists(root: Path, num_classes: int | None) -> ImageLists:
    """Read all lists of a folder.

    Args:
        root: the folder.
        num_classes: how many classes there are; None where the largest label says it.

    Raises:
        DatasetError: a list that cannot be read or is wrong, or lists that do not fit together.
    """
    splits = {
        split: read_list(root / name, num_classes) for split, name in FILES.items() if (root / name).exists()
    }
    _refuse_shared(root, splits)
    largest = max(image.label for images in splits.values() for image in images)
    return ImageLists(root, splits, largest + 1 if num_classes is None else num_classes)


def read_list(path: Path, num_classes: int | None) -> list[ListedImage]:
    """Read one list.

    Raises:
        DatasetError: it cannot be read, has no line, or a line that is wrong.
    """
    shown = printable(str(path))
    text = read_table(path, MAX_BYTES)
    found: dict[str, int] = {}
    images = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            image = _read_line(line, num_classes)
            if image.path in found:
                raise DatasetError(f"{quote(image.path)} stands in line {found[image.path]} already")
        except DatasetError as error:
            raise DatasetError(f"{shown}, line {number}: {error}.") from None
        found[image.path] = number
        images.append(image)
    if not images:
        raise DatasetError(f"{shown} has no lines: expected `path label` in each.")
    return images


def _read_line(line: str, num_classes: int | None) -> ListedImage:
    """The image of a line; a path may have blanks in it."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise DatasetError(f"expected `path label`, found {quote(line.strip())}")
    text, number = parts[0].strip(), parts[1]
    path = PurePosixPath(text)
    if (
        path.is_absolute()
        or ".." in path.parts
        or path.name == ""
        or len(text) > MAX_PATH
        or any(sign in text for sign in "\\\0")
    ):
        raise DatasetError(f"{quote(text)} is no path of a file below the folder of the list")
    # The length comes first: Python refuses to read thousands of digits.
    if not (number.isascii() and number.isdigit() and len(number) <= 6 and int(number) <= MAX_LABEL):
        raise DatasetError(f"expected a label from 0 to {MAX_LABEL}, found {quote(number)}")
    if num_classes is not None and int(number) >= num_classes:
        raise DatasetError(
            f"expected a label from 0 to {num_classes - 1}, because this task has {num_classes} classes; "
            f"found {number}"
        )
    return ListedImage(str(path), int(number))


def _refuse_shared(root: Path, splits: dict[str, list[ListedImage]]) -> None:
    """Refuse lists in which an image is in two of the splits, or "train+val" is not those two together."""
    shown = printable(str(root))
    for one, other in (("train", "val"), ("train", "test"), ("val", "test"), ("train+val", "test")):
        shared = {image.path for image in splits.get(one, ())} & {i.path for i in splits.get(other, ())}
        if shared:
            raise DatasetError(
                f"{shown}: {counted(len(shared), 'images')} both in {FILES[one]} and in {FILES[other]}, such "
                f"as {quote(min(shared))}: expected every image in one of them."
            )
    if not all(part in splits for part in (*_TOGETHER, "train+val")):
        return
    # Some copies keep the images of each list in a folder of its own, so that only the labels can tell.
    apart = sorted(image.label for part in _TOGETHER for image in splits[part])
    if apart != sorted(image.label for image in splits["train+val"]):
        names = " and ".join(FILES[part] for part in _TOGETHER)
        raise DatasetError(f"{shown}: {FILES['train+val']} does not have the labels of {names} together.")
