"""What every image data set offers, and the registry that finds it by name."""

from __future__ import annotations

import hashlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
from PIL import Image

from vimtune.data.errors import DatasetError, ImageReadError
from vimtune.data.images import load_image
from vimtune.schema import check
from vimtune.text import quote, unicode_text
from vimtune.utils import require_summary, suggest

SPLITS = ("train", "val", "test", "train+val")
DEFAULT_DATA_DIR = "data"
EMBEDDED_ALTERNATIVE = "No files at hand? `--dataset synthetic_flowers` is embedded and needs none."


class ImageDataset(ABC):
    """Images with integer labels.

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
        split: one of `SPLITS`.
        classes: human-readable class names; label `i` means `classes[i]`.
        targets: the label of every image.
        source: one line saying which data are really used, with the number of images and classes.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    split: str
    classes: list[str]
    targets: list[int]
    source: str

    def __len__(self) -> int:
        return len(self.targets)

    def label(self, index: int) -> int:
        """Class index of image `index`."""
        return self.targets[index]

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB.

        Raises:
            CorruptImageError: the file cannot be read or decoded.
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
        return _hash_lines(f"{self.label(i)} {self.describe(i)}" for i in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source})"


def _hash_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


class FileDataset(ImageDataset):
    """A data set whose images are files. Subclasses pass what they found to `_set_files`."""

    root: Path
    paths: list[str]

    def _set_files(
        self,
        split: str,
        root: Path,
        paths: Sequence[str],
        targets: Sequence[int],
        classes: Sequence[str],
        source: str,
        notes: Sequence[str] = (),
    ) -> None:
        """Take the images at `paths`, all of them below the folder `root`; `source` ends with `notes`.

        `classes` may be names of folders: what is not Unicode in them is written out, once and here, so that
        every file that names the classes gives the same names back.
        """
        self.split = split
        self.root = root
        self.paths = list(paths)
        self.targets = [int(target) for target in targets]
        self.classes = [unicode_text(name) for name in classes]
        self.source = "; ".join(
            [f"{source}, {len(self.paths)} images of {len(self.classes)} classes", *notes]
        )

    def load(self, index: int) -> Image.Image:
        return load_image(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]

    def fingerprint(self) -> str:
        """Hash of every image's label, path below the folder of the data, and size in bytes.

        It changes when an image is renamed, moved, added, removed, or replaced by one of another size. A
        replacement of the same size is not noticed: to read all contents would take as long as an epoch, and
        the times of modification differ between copies of the same data.

        Raises:
            ImageReadError: an image is gone or cannot be looked at.
        """
        root = os.path.join(self.root, "")
        return _hash_lines(
            f"{label} {_size(path)} {path.removeprefix(root)}"
            for label, path in zip(self.targets, self.paths, strict=True)
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ImageReadError(path, error.strerror or str(error)) from error


# --------------------------------------------------------------------------- registry

_REGISTRY: dict[str, type[ImageDataset]] = {}
_COMMON = ("self", "split", "data_dir", "seed", "img_size", "download")
"""Parameters that every data set has; the others are its options."""


def register_dataset(name: str) -> Callable[[type[ImageDataset]], type[ImageDataset]]:
    """Class decorator: make an `ImageDataset` available as `create_dataset(name, ...)`.

    `ImageDataset` says what the class must offer.
    """

    def register(cls: type[ImageDataset]) -> type[ImageDataset]:
        assert name not in _REGISTRY, f"data set {name!r} registered twice"
        require_summary(cls, f"data set {name!r}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def list_datasets() -> dict[str, str]:
    """Names of all data sets with a one-line description each."""
    return {name: _REGISTRY[name].summary for name in sorted(_REGISTRY)}


def dataset_class(name: str) -> type[ImageDataset]:
    """The class of the data set `name`."""
    if name not in _REGISTRY:
        raise DatasetError(
            f"unknown data set {quote(name)}; choose from {', '.join(list_datasets())}."
            f"{suggest(name, _REGISTRY)}"
        )
    return _REGISTRY[name]


def dataset_summary(name: str) -> str:
    """One-line description of the data set `name`."""
    return dataset_class(name).summary


def dataset_options(name: str) -> dict[str, Any]:
    """Options of a data set (`dataset_kwargs`) with their defaults."""
    parameters = inspect.signature(dataset_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _COMMON}


def create_dataset(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    img_size: tuple[int, int] = (64, 64),
    download: bool = True,
    **dataset_kwargs: Any,
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        name: see `list_datasets()`.
        split: "train", "val", "test" or "train+val".
        data_dir: where the files are or go; default `./data`. Generators ignore it.
        seed: fixes splits that are drawn, and the images of generators.
        img_size: (height, width) of generated images; files keep their own size.
        download: fetch missing data where the owner offers a download.
        dataset_kwargs: options of this data set, see `dataset_options(name)`.

    Raises:
        DatasetError: unknown name, split or option, an option of the wrong type or out of its range, or
            missing or unusable data.
        MissingSplitError: the data set has no such split.
    """
    cls = dataset_class(name)
    if split not in SPLITS:
        raise DatasetError(
            f"unknown split {quote(split)}; choose from {', '.join(SPLITS)}.{suggest(split, SPLITS)}"
        )
    options = _check_options(cls, dataset_kwargs)
    root = None if data_dir is None else Path(data_dir).expanduser()
    make: Callable[..., ImageDataset] = cls
    dataset = make(split, root, seed=seed, img_size=img_size, download=download, **options)
    _refuse_degenerate(dataset)
    return dataset


def _check_options(cls: type[ImageDataset], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, compared with the annotations of the class's options."""
    options = dataset_options(cls.name)
    for key in given:
        if key not in options:
            known = ", ".join(options) or "none"
            raise DatasetError(
                f"data set {cls.name!r} has no option {quote(key)}; its options: {known}."
                f"{suggest(key, options)}"
            )
    types = get_type_hints(cls.__init__, include_extras=True)
    return {
        key: check(types[key], value, f"data set {cls.name!r}: {key}={quote(value)}", DatasetError)
        for key, value in given.items()
    }


def _refuse_degenerate(dataset: ImageDataset) -> None:
    if not dataset.targets:
        raise DatasetError(f"the data set is empty: {dataset.source}.")
    if len(dataset.classes) < 2:
        raise DatasetError(f"a classifier needs at least 2 classes: {dataset.source}.")
    lowest, highest = min(dataset.targets), max(dataset.targets)
    if lowest < 0 or highest >= len(dataset.classes):
        raise DatasetError(
            f"labels {lowest} to {highest} do not fit {len(dataset.classes)} classes: {dataset.source}."
        )


# --------------------------------------------------------------------------- helpers for data sets


def locate_root(data_dir: Path | None, folder_names: Sequence[str], marker: str) -> tuple[Path, bool]:
    """Find the folder that holds `marker`: `data_dir` itself or one of `folder_names` inside it.

    Returns:
        (folder, found). When nothing is found, the folder is where a download should go:
        `data_dir` if it carries one of the names already, else its first named sub-folder.
    """
    base = Path(DEFAULT_DATA_DIR) if data_dir is None else data_dir
    if data_dir is not None and not data_dir.is_dir():
        # A new folder for a download is fine; a path of which nothing exists is a slip.
        if data_dir.exists():
            raise DatasetError(f"data_dir {str(data_dir)!r} is a file; give the folder with the data.")
        if not data_dir.absolute().parent.is_dir():
            raise DatasetError(f"data_dir {str(data_dir)!r} does not exist. {EMBEDDED_ALTERNATIVE}")
    for candidate in (base, *(base / name for name in folder_names)):
        if (candidate / marker).exists():
            return candidate, True
    return (base if base.name in folder_names else base / folder_names[0]), False


def stratified_split(targets: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Draw disjoint parts with the same class proportions; the remainder is the last part.

    Each class gives `round(fraction * count)` images to every part (at least one where the class has
    enough images for all parts), and always keeps one for the remainder. Classes are drawn
    independently, so adding images to one class does not move the others.

    Args:
        targets: class of every image.
        fractions: share of each drawn part, in (0, 1), sum below 1.
        seed: the split is a pure function of `targets`, `fractions` and `seed`.

    Returns:
        `len(fractions) + 1` sorted lists of indices.
    """
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    labels = np.asarray(targets)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        left = len(order)
        for part, fraction in zip(parts, fractions, strict=False):
            minimum = 1 if len(order) > len(fractions) and fraction > 0 else 0
            take = min(max(round(fraction * len(order)), minimum), left - 1)
            part.extend(order[len(order) - left : len(order) - left + take].tolist())
            left -= take
        parts[-1].extend(order[len(order) - left :].tolist())
    return [sorted(part) for part in parts]
