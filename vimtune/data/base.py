"""What every image data set offers: the classes from which data sets derive."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vimtune.data.errors import ImageReadError
from vimtune.data.files.span import Span
from vimtune.image_kinds import ImageKind
from vimtune.text import counted, unicode_text

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "val", "test", "train+val")
"""Names of the splits; "train+val" is those two together."""


class ImageDataset(ABC):
    """Images with integer labels: one for each, or where `tags` are set any number of them.

    What a data set owes (tests/data/test_data_registry.py holds every registered one to it):

    - Its class is called with `(split, data_dir, *, seed, img_size, download, **options)` and sets the
      attributes below. `split` is one of `SPLITS`; `data_dir` is a Path, or None where the user named none.
    - Its options are keyword-only parameters with a default and an annotation that says type and range, such
      as `Annotated[int, Ge(1)]`. Values are checked against it before the class is called.
    - The same arguments give the same images in the same order. What is drawn at random depends on `seed`
      alone. No image is in two of the splits train, val and test; "train+val" is those two together.
    - A split that does not exist raises `MissingSplitError`. All else that is wrong with arguments or files
      raises `DatasetError` in one line: what was found, what was expected, what to do next.
    - A data set made of files derives from `FileDataset`. Where they are missing and not to be downloaded,
      the error names the folder that was searched and says which files belong into "<data-dir>"; nothing is
      written.

    Attributes:
        name: the registry's name.
        summary: one line for tables.
        needs_data_dir: whether the user has to say where the files are, because there is no usual place.
        reads_files: whether there are files at all, so that `data_dir` means something.
        kind: what kind of images they are, which is compared with that of the weights at the start.
        split: one of `SPLITS`.
        classes: human-readable class names; label `i` means `classes[i]`.
        targets: the label of every image; where it may have several, the rarest of them, by which images are
            drawn and balanced, and -1 for none.
        tags: all labels of every image where it may have several, in ascending order; None where each has
            one.
        source: one line saying which data are really used, with the number of images and classes.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    kind: ClassVar[ImageKind] = "photographs"
    needs_data_dir: ClassVar[bool] = False
    reads_files: ClassVar[bool] = True

    split: str
    classes: list[str]
    targets: list[int]
    tags: list[tuple[int, ...]] | None = None
    source: str

    def __len__(self) -> int:
        return len(self.targets)

    def label(self, index: int) -> int:
        """Class index of image `index`; of several the one that `targets` has."""
        return self.targets[index]

    def labels_text(self, index: int) -> str:
        """All class indices of image `index` for a fingerprint."""
        return str(self.label(index)) if self.tags is None else ",".join(map(str, self.tags[index]))

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB.

        Raises:
            CorruptImageError: the file cannot be read or decoded; `path` is what `describe` says.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name image `index` in messages: its path, or how it was generated."""

    def fingerprint(self) -> str:
        """Hash of which images the split holds, in which order and with which labels.

        A run that is resumed compares it: the same fingerprint means the same images. It depends neither on
        where the data lie nor on the options that led to the split. This default is a hash of `describe` and
        `label` of every image; a generator adds to it what its images depend on.
        """
        return hash_lines(f"{self.labels_text(i)} {self.describe(i)}" for i in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source})"


def hash_lines(lines: Iterable[str]) -> str:
    """SHA-256 of lines, as a fingerprint."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


class FileDataset(ImageDataset):
    """A data set whose images are files. Subclasses pass what they found to `_set_files`.

    Attributes:
        root: folder below which all images lie.
        paths: the file of every image.
        spans: the part of its file that every image is; None where each has a file of its own.
    """

    root: Path
    paths: list[str]
    spans: list[Span] | None

    def _set_files(
        self,
        split: str,
        root: Path,
        paths: Sequence[str],
        targets: Sequence[int],
        classes: Sequence[str],
        source: str,
        notes: Sequence[str] = (),
        spans: Sequence[Span] | None = None,
        tags: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Take the images at `paths`, all of them below the folder `root`; `source` ends with `notes`.

        `classes` may be names of folders: what is not Unicode in them is written out, once and here, so that
        every file that names the classes gives the same names back.
        """
        self.split = split
        self.root = root
        self.paths = list(paths)
        self.spans = None if spans is None else list(spans)
        self.targets = [int(target) for target in targets]
        self.tags = None if tags is None else list(tags)
        self.classes = [unicode_text(name) for name in classes]
        self.source = "; ".join(
            [
                f"{source}, {counted(len(self.paths), 'images')} of {counted(len(self.classes), 'classes')}",
                *notes,
            ]
        )

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB."""
        # This comes late, because data sets are listed without Pillow.
        from vimtune.data.files.images import load_image

        return load_image(self.paths[index], None if self.spans is None else self.spans[index])

    def describe(self, index: int) -> str:
        """The path of image `index`, and which part of the file it is."""
        path = self.paths[index]
        return path if self.spans is None else self.spans[index].within(path)

    def fingerprint(self) -> str:
        """Hash of every image's label, path below the folder of the data, and size in bytes.

        Of an image that is a part of a file, the path says which part. The hash changes when an image is
        renamed, moved, added, removed, or replaced by one of another size. A replacement of the same size is
        not noticed: to read all contents would take as long as an epoch, and the times of modification differ
        between copies of the same data.

        Raises:
            ImageReadError: an image is gone or cannot be looked at.
        """
        root = os.path.join(self.root, "")
        sizes = map(_size, self.paths) if self.spans is None else (span.size for span in self.spans)
        names = (self.describe(index).removeprefix(root) for index in range(len(self)))
        return hash_lines(
            f"{self.labels_text(index)} {size} {name.replace(os.sep, '/')}"
            for index, (size, name) in enumerate(zip(sizes, names, strict=True))
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ImageReadError(path, error.strerror or str(error)) from error
