"""The split of Caltech-101 that ships beside this file, and how it was drawn.

There is no official split. `caltech101_split.json` fixes one in the customary form: 30 images of each of
the 102 categories (BACKGROUND_Google included) for training, all others for test. Of the 30, the first 25
drawn are "train" and the last 5 "val"; "train+val" is all 30. It was drawn by `draw_split` with seed 0;
`print_split` prints it again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from vimtune.data.errors import DatasetError
from vimtune.data.files.checks import plain_name
from vimtune.schema import STRICT, Count, load_json
from vimtune.text import quote

SPLIT_SEED = 0
"""Seed with which the shipped split was drawn."""
NUM_TRAIN = 25
"""Images of each category in "train"."""
NUM_VAL = 5
"""Images of each category in "val"."""


@dataclass
class Category:
    """Numbers of the images of a category; those in neither list are for tests."""

    __pydantic_config__: ClassVar[Any] = STRICT
    count: Count
    """Number of images; they are numbered from 1."""
    train: list[int]
    """Numbers of the images in "train"."""
    val: list[int]
    """Numbers of the images in "val"."""


@dataclass
class Split:
    """A split of all categories, as its JSON file holds it."""

    __pydantic_config__: ClassVar[Any] = STRICT
    seed: Count
    """Seed with which it was drawn."""
    categories: dict[str, Category]
    """Categories by the names of their folders, in ASCII order."""


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
    import numpy as np  # This comes late, because data sets are listed without numpy.

    categories = {}
    for i, category in enumerate(sorted(counts)):
        drawn = np.random.default_rng([seed, i]).permutation(counts[category])[: NUM_TRAIN + NUM_VAL] + 1
        train, val = drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]
        categories[category] = Category(counts[category], sorted(train.tolist()), sorted(val.tolist()))
    return Split(seed, categories)


def format_split(split: Split) -> str:
    """JSON text of a split, one line per category."""
    lines = [f"  {json.dumps(name)}: {json.dumps(vars(entry))}" for name, entry in split.categories.items()]
    body = ",\n".join(lines)
    return f'{{"seed": {split.seed}, "categories": {{\n{body}\n}}}}\n'


def print_split(folder: str) -> None:
    """Draw the shipped split again from the extracted archive and print its JSON text.

    Args:
        folder: the archive's folder `101_ObjectCategories`.
    """
    found = {
        category.name: len(list(category.glob("image_*.jpg")))
        for category in Path(folder).iterdir()
        if category.is_dir()
    }
    sys.stdout.write(format_split(draw_split(found, SPLIT_SEED)))
