"""Caltech-101 (Fei-Fei et al., 2004) with the split that ships beside this file.

There is no official split. `caltech101_split.json` fixes one in the customary form: 30 images of each of
the 102 categories (BACKGROUND_Google included) for training, all others for test. Of the 30, the first 25
drawn are "train" and the last 5 "val"; "train+val" is all 30. It was drawn by `draw_split` below with seed 0;
`python -m vimtune.data.caltech <101_ObjectCategories>` prints it again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vimtune.data.base import EMBEDDED_ALTERNATIVE, FileDataset, locate_root, register_dataset
from vimtune.data.checks import check_files_exist, plain_name
from vimtune.data.download import DownloadError, download_file, download_lock, extract_archive
from vimtune.data.errors import DatasetError
from vimtune.schema import STRICT, Count, load_json
from vimtune.text import quote

SPLIT_SEED = 0
NUM_TRAIN = 25
NUM_VAL = 5
_FOLDER = "101_ObjectCategories"
_URL = "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip"
_MD5 = "3138e1922a9193bfa496528edbbc45d0"
_LAYOUT = (
    f"Expected <data-dir>/caltech101/{_FOLDER}/<category>/image_0001.jpg ... for 102 categories "
    f"({_FOLDER}.tar.gz inside {_URL})."
)


@register_dataset("caltech")
class Caltech(FileDataset):
    """102 categories: 2550 train, 510 val, 6084 test images; 3060 in train+val."""

    summary = "Caltech-101, 30 images per class for training (102 classes; downloads 137 MB)"

    def __init__(
        self, split: str, data_dir: Path | None, *, seed: int, img_size: tuple[int, int], download: bool
    ) -> None:
        del seed, img_size  # shipped split, real files
        root, found = locate_root(data_dir, ["caltech101", "caltech-101"], _FOLDER)
        if not found and root.name == _FOLDER and root.is_dir():
            root = root.parent
        elif not found:
            if not download:
                raise DatasetError(f"Caltech-101 is not in {root}. {_LAYOUT} {EMBEDDED_ALTERNATIVE}")
            _download(root)
        paths, targets = [], []
        categories = load_split().categories
        for label, (category, entry) in enumerate(categories.items()):
            for number in select_numbers(entry, split):
                paths.append(str(root / _FOLDER / category / f"image_{number:04d}.jpg"))
                targets.append(label)
        check_files_exist(paths, f"Caltech-101 in {root}", _LAYOUT)
        names = [readable_name(category) for category in categories]
        source = f"Caltech-101 {split} part of vimtune's split (30 per class, seed {SPLIT_SEED}) from {root}"
        self._set_files(split, root, paths, targets, names, source)


@dataclass
class Category:
    """Numbers of the images of a category; those in neither list are for tests."""

    __pydantic_config__: ClassVar[Any] = STRICT
    count: Count
    train: list[int]
    val: list[int]


@dataclass
class Split:
    """A split of all categories, as its JSON file holds it."""

    __pydantic_config__: ClassVar[Any] = STRICT
    seed: Count
    categories: dict[str, Category]


def load_split() -> Split:
    """The shipped split."""
    text = files("vimtune.data").joinpath("caltech101_split.json").read_text(encoding="utf-8")
    split = load_json(Split, text, "caltech101_split.json", DatasetError)
    for name, category in split.categories.items():
        plain_name(name, "caltech101_split.json")
        used = [*category.train, *category.val]
        if len(set(used)) < len(used) or not set(used) <= set(range(1, category.count + 1)):
            raise DatasetError(
                f"caltech101_split.json names images of {quote(name)} twice, or beyond its count."
            )
    return split


def select_numbers(category: Category, split: str) -> list[int]:
    """Image numbers (1-based) of one category that belong to `split`."""
    if split == "test":
        used = {*category.train, *category.val}
        return [number for number in range(1, category.count + 1) if number not in used]
    parts = {"train": category.train, "val": category.val}
    return [number for part in split.split("+") for number in parts[part]]


def draw_split(counts: Mapping[str, int], seed: int) -> Split:
    """Draw `NUM_TRAIN` + `NUM_VAL` image numbers from each category.

    Args:
        counts: images per category; they are numbered 1..count.
        seed: category number i (in ASCII order) draws with numpy's PCG64 seeded by [seed, i].
    """
    categories = {}
    for i, category in enumerate(sorted(counts)):
        drawn = np.random.default_rng([seed, i]).permutation(counts[category])[: NUM_TRAIN + NUM_VAL] + 1
        train, val = drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]
        categories[category] = Category(counts[category], sorted(train.tolist()), sorted(val.tolist()))
    return Split(seed, categories)


def readable_name(category: str) -> str:
    """`water_lilly` -> `water lily`, `BACKGROUND_Google` -> `background (Google)`."""
    special = {"BACKGROUND_Google": "background (Google)", "water_lilly": "water lily"}
    return special.get(category, category.replace("_", " ").lower())


def format_split(split: Split) -> str:
    """JSON text of a split, one line per category."""
    lines = [f"  {json.dumps(name)}: {json.dumps(vars(entry))}" for name, entry in split.categories.items()]
    body = ",\n".join(lines)
    return f'{{"seed": {split.seed}, "categories": {{\n{body}\n}}}}\n'


def _download(root: Path) -> None:
    try:
        with download_lock(root):
            if (root / _FOLDER).is_dir():
                return
            bundle = download_file(_URL, root / "caltech-101.zip", _MD5)
            archive = extract_archive(bundle, root, f"{_FOLDER}.tar.gz")
            extract_archive(archive, root, _FOLDER)
            archive.unlink()
            bundle.unlink()
    except DownloadError as error:
        raise DatasetError(
            f"Caltech-101 is not in {root} and: {error} {_LAYOUT} {EMBEDDED_ALTERNATIVE}"
        ) from error


if __name__ == "__main__":
    source = Path(sys.argv[1])
    found = {
        folder.name: len(list(folder.glob("image_*.jpg"))) for folder in source.iterdir() if folder.is_dir()
    }
    sys.stdout.write(format_split(draw_split(found, SPLIT_SEED)))
