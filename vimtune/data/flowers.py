"""Oxford Flowers-102 (Nilsback & Zisserman, 2008) in its official split."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import check_files_exist, whole_numbers
from vimtune.data.files.placement import EMBEDDED_ALTERNATIVE, locate_root

_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
"""The folder that the files are downloaded from."""
_MD5 = {
    "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
    "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
    "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
}
"""Checksum of each downloaded file, by its name."""
NUM_CLASSES = 102
"""Number of species."""
_SPLIT_KEYS = {"train": ("trnid",), "val": ("valid",), "test": ("tstid",), "train+val": ("trnid", "valid")}
"""The variables of setid.mat that make up each split."""
_LAYOUT = (
    "Expected <data-dir>/flowers-102/ with jpg/image_00001.jpg ... image_08189.jpg, imagelabels.mat and "
    f"setid.mat (102flowers.tgz and the .mat files of {_URL})."
)
"""The sentence that tells a user where the files are expected."""


@register_dataset("flowers")
class Flowers(FileDataset):
    """102 British flowers: 1020 train, 1020 val, 6149 test images; 2040 in train+val."""

    summary = "Oxford Flowers-102, official split (102 classes; downloads 345 MB)"

    def __init__(
        self, split: str, data_dir: Path | None, *, seed: int, img_size: tuple[int, int], download: bool
    ) -> None:
        del seed, img_size  # The split is fixed, and the images have sizes of their own.
        root, found = locate_root(data_dir, ["flowers-102", "flowers/flowers-102"], "setid.mat")
        if not (found and (root / "imagelabels.mat").exists() and (root / "jpg").is_dir()):
            if not download:
                raise DatasetError(f"Flowers-102 is not in {root}. {_LAYOUT} {EMBEDDED_ALTERNATIVE}")
            _download(root)
        ids, labels = _read_split(root, split)
        paths = [str(root / "jpg" / f"image_{i:05d}.jpg") for i in ids]
        classes = (
            files("vimtune.data").joinpath("flowers_classes.txt").read_text(encoding="utf-8").splitlines()
        )
        check_files_exist(
            paths, f"Flowers-102 in {root}", f"Delete {root / 'jpg'} to download it again. {_LAYOUT}"
        )
        self._set_files(
            split,
            root,
            paths,
            [labels[i - 1] - 1 for i in ids],
            classes,
            f"Flowers-102 official {split} split from {root}",
        )


def _read_split(root: Path, split: str) -> tuple[list[int], list[int]]:
    """Image numbers of a split (1-based) and the labels (1-based) of all images."""
    # This comes late, because data sets are listed without numpy.
    from vimtune.data.files.mat import read_mat

    try:
        labels = read_mat(root / "imagelabels.mat", ["labels"])["labels"]
        labels = whole_numbers(labels, 1, NUM_CLASSES, "the labels of imagelabels.mat")
        sets = read_mat(root / "setid.mat", ["trnid", "valid", "tstid"])
        parts = {k: whole_numbers(ids, 1, len(labels), f"{k} of setid.mat") for k, ids in sets.items()}
        numbers = [number for ids in parts.values() for number in ids]
        if len(set(numbers)) < len(numbers):
            raise DatasetError("setid.mat has an image in two splits.")
    except DatasetError as error:
        advice = f"Delete setid.mat and imagelabels.mat in {root} to download them again."
        raise DatasetError(f"{error} {advice}") from error
    return [number for key in _SPLIT_KEYS[split] for number in parts[key]], labels


def _download(root: Path) -> None:
    from vimtune.data.files.archives import extract_archive
    from vimtune.download import DownloadError, download_file, download_lock

    try:
        with download_lock(root):
            for name in ("imagelabels.mat", "setid.mat"):
                download_file(_URL + name, root / name, _MD5[name])
            if not (root / "jpg").is_dir():
                archive = download_file(
                    _URL + "102flowers.tgz", root / "102flowers.tgz", _MD5["102flowers.tgz"]
                )
                extract_archive(archive, root, "jpg")
                archive.unlink()
    except DownloadError as error:
        raise DatasetError(
            f"Flowers-102 is not in {root} and: {error} {_LAYOUT} {EMBEDDED_ALTERNATIVE}"
        ) from error
