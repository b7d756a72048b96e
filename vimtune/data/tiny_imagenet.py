"""Tiny-ImageNet-200 (Le & Yang 2015): 200 classes of ImageNet at 64 x 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Len, Lt

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import check_files_exist, plain_name, read_table
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE, locate_root
from vimtune.data.files.span import Span
from vimtune.data.splitting import stratified_split
from vimtune.text import printable, quote

_FOLDER = "tiny-imagenet-200"
"""The folder in the official archive."""
_FOLDERS = [_FOLDER, "tiny_imagenet"]
"""Names of the folder below `data_dir`."""
_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
"""Where the data set is downloaded from."""
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
"""Checksum of the downloaded file."""
_LAYOUT = (
    f"Expected <data-dir>/{_FOLDER}/ with wnids.txt, words.txt, train/<wnid>/images/*.JPEG and "
    f"val/val_annotations.txt with val/images/*.JPEG (from {_URL}), or a folder of packed images with "
    "wnids.json, class_names.json, train_*.npz and val.npz."
)
"""The sentence that tells a user where the files are expected."""
_MAX_BYTES = 64 * 2**20
"""Longest table that is read; words.txt, which names all of WordNet, has 3 MB."""

ClassTexts = Annotated[list[Annotated[str, Len(1, 1000)]], Len(2, 100_000)]
"""One text for each class."""


@dataclass
class _Images:
    """Images of one official part: the file of each, its label, and, of packed ones, the part of the file."""

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def of(self, indices: Sequence[int]) -> _Images:
        """Some of the images."""
        spans = [self.spans[i] for i in indices] if self.spans else []
        return _Images([self.paths[i] for i in indices], [self.labels[i] for i in indices], spans)


@register_dataset("tiny_imagenet")
class TinyImageNet(FileDataset):
    """200 classes: 100,000 official training images, and 10,000 of the official validation set to test on.

    The labels of the official test images were never published, so the official validation set is the test
    split, as everywhere in the literature. "val" is a stratified `val_fraction` of the training images drawn
    with `seed`, "train" the others, "train+val" all of them.

    The folder is that of the official archive, or one of packed images (`vimtune.data.files.packed`). The
    classes are in the order of their WordNet numbers and have the first of their names there.
    """

    summary = "Tiny-ImageNet-200, 64 px (200 classes; downloads 248 MB)"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05,
    ) -> None:
        del img_size  # The images have a size of their own.
        root, packed = _find(data_dir, download)
        official = "val" if split == "test" else "train"
        classes, images = (_read_packed_folder if packed else _read_folder)(root, official)
        drawn = ""
        if split in ("train", "val"):
            val, train = stratified_split(images.labels, [val_fraction], seed)
            images = images.of(val if split == "val" else train)
            drawn = f" (val: {val_fraction:.0%} of the official train, seed {seed})"
        kind = "packed, " if packed else ""
        self._set_files(
            split,
            root,
            images.paths,
            images.labels,
            [names.split(",")[0].strip() for names in classes],
            f"Tiny-ImageNet {split} part{drawn}, {kind}from {printable(str(root))}",
            spans=images.spans or None,
        )


def _find(data_dir: Path | None, download: bool) -> tuple[Path, bool]:
    """The folder of the data, and whether it is one of packed images."""
    for marker in ("wnids.json", "wnids.txt"):
        root, found = locate_root(data_dir, _FOLDERS, marker)
        if found:
            return root, marker == "wnids.json"
    if not download:
        raise DatasetError(
            f"Tiny-ImageNet is not in {printable(str(root))}. {_LAYOUT} {EMBEDDED_ALTERNATIVE}"
        )
    return _download(root), False


def _download(root: Path) -> Path:
    """Fetch the official archive; returns the folder of its files, which is `root` or lies in it."""
    from vimtune.data.files.archives import extract_archive
    from vimtune.download import DownloadError, download_file, download_lock

    place = root.parent if root.name == _FOLDER else root
    try:
        with download_lock(place):
            if not (place / _FOLDER / "wnids.txt").exists():
                archive = download_file(_URL, place / f"{_FOLDER}.zip", _MD5)
                extract_archive(archive, place, _FOLDER)
                archive.unlink()
    except DownloadError as error:
        raise DatasetError(
            f"Tiny-ImageNet is not in {printable(str(root))} and: {error} {_LAYOUT} {EMBEDDED_ALTERNATIVE}"
        ) from error
    return place / _FOLDER


def _read_packed_folder(root: Path, official: str) -> tuple[list[str], _Images]:
    """Names of the classes and images of an official part, "train" or "val", in a folder of packed images."""
    # This comes late, because data sets are listed without numpy.
    from vimtune.data.files.packed import read_packed
    from vimtune.schema import load_json

    def texts(name: str) -> list[str]:
        path = root / name
        found: list[str] = load_json(
            ClassTexts, read_table(path, _MAX_BYTES, _LAYOUT), printable(str(path)), DatasetError
        )
        return found

    wnids, names = texts("wnids.json"), texts("class_names.json")
    if len(names) != len(wnids):
        raise DatasetError(
            f"{printable(str(root))} has {len(wnids)} classes in wnids.json and {len(names)} in "
            f"class_names.json. {_LAYOUT}"
        )
    files = sorted(root.glob("train_*.npz")) if official == "train" else [root / "val.npz"]
    if not files:
        raise DatasetError(f"{printable(str(root))} has no train_*.npz. {_LAYOUT}")
    images = _Images()
    for file in files:
        part = read_packed(file, len(wnids))
        images.paths += [part.path] * len(part.spans)
        images.labels += part.labels
        images.spans += part.spans
    return names, images


def _read_folder(root: Path, official: str) -> tuple[list[str], _Images]:
    """Names of the classes and images of an official part, "train" or "val", in the official folder."""
    shown = printable(str(root))
    wnids = sorted(plain_name(wnid, f"wnids.txt in {shown}") for (wnid,) in _rows(root / "wnids.txt", 1))
    if len(set(wnids)) < len(wnids):
        raise DatasetError(f"wnids.txt in {shown} names a class twice. {_LAYOUT}")
    words = {wnid: names for wnid, names in _rows(root / "words.txt", 2)}
    if unnamed := [wnid for wnid in wnids if not words.get(wnid)]:
        raise DatasetError(f"words.txt in {shown} has no name for {quote(unnamed[0])}. {_LAYOUT}")
    images = _training_images(root, wnids) if official == "train" else _annotated_images(root, wnids)
    return [words[wnid] for wnid in wnids], images


def _training_images(root: Path, wnids: Sequence[str]) -> _Images:
    """The images in the folders of the classes."""
    images = _Images()
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        found = sorted(str(path) for path in folder.glob("*.JPEG"))
        if not found:
            raise DatasetError(f"{printable(str(folder))} has no images. {_LAYOUT}")
        images.paths += found
        images.labels += [label] * len(found)
    return images


def _annotated_images(root: Path, wnids: Sequence[str]) -> _Images:
    """The images that val_annotations.txt lists, in its order."""
    table = root / "val" / "val_annotations.txt"
    numbers = {wnid: label for label, wnid in enumerate(wnids)}
    images, shown = _Images(), printable(str(table))
    for name, wnid, *_ in _rows(table, 2, more=True):
        if wnid not in numbers:
            raise DatasetError(f"{shown}: {quote(wnid)} is no class of wnids.txt. {_LAYOUT}")
        images.paths.append(str(root / "val" / "images" / plain_name(name, shown)))
        images.labels.append(numbers[wnid])
    if len(set(images.paths)) < len(images.paths):
        raise DatasetError(f"{shown} names an image twice. {_LAYOUT}")
    check_files_exist(images.paths, f"Tiny-ImageNet in {printable(str(root))}", _LAYOUT)
    return images


def _rows(path: Path, columns: int, more: bool = False) -> list[list[str]]:
    """The lines of a table whose columns are parted by tabs.

    Args:
        path: the file.
        columns: how many columns a line has.
        more: whether a line may have more columns than that.
    """
    rows = [line.split("\t") for line in read_table(path, _MAX_BYTES, _LAYOUT).splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) < columns or (len(row) > columns and not more):
            raise DatasetError(
                f"{printable(str(path))}: row {number} has {len(row)} columns instead of {columns}. {_LAYOUT}"
            )
    return rows
