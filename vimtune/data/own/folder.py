"""Any folder of images with one sub-folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset

Share = Annotated[float, Ge(0), Lt(1)]
"""Fraction of the images."""


@register_dataset("folder")
class Folder(FileDataset):
    """Images sorted into class folders, with their own splits or splits drawn here.

    - `root/train/<class>/...` with `root/val` and `root/test`: used as they are. Without `val`, a stratified
      `val_fraction` of train is drawn; without `test`, asking for "test" raises `MissingSplitError`.
    - `root/<class>/...`: a stratified draw of `val_fraction` and `test_fraction`; the rest is train.

    Draws are a pure function of the sorted files and `seed`. Class names are the folder names. Which folder
    names are understood and what is refused is said in `vimtune.data.own.layout`.
    """

    summary = "your own images: one folder per class, with or without train/val/test"
    needs_data_dir = True

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        val_fraction: Share = 0.15,
        test_fraction: Share = 0.15,
    ) -> None:
        del img_size, download
        # This comes late, because data sets are listed without Pillow.
        from vimtune.data.own.folder_splits import find_split

        found = find_split(data_dir, split, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        paths, targets = [path for path, _ in found.images], [label for _, label in found.images]
        self._set_files(split, found.root, paths, targets, found.classes, found.source, found.notes)
