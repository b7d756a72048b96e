"""Images whose labels stand in tables: CSV or TSV."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from annotated_types import Len

from vimtune.data.base import FileDataset
from vimtune.data.datasets import register_dataset
from vimtune.data.own.folder import Share

Text = Annotated[str, Len(1, 200)]
"""A name or a sign in a file of the user."""


@register_dataset("csv")
class Table(FileDataset):
    """Images with labels from files of CSV or, where names end in .tsv, of TSV, which have a header and a row
    for each image.

    - `labels.csv` (or `metadata.csv`) with a column `split`: used as it says. Without `val` there, a
      stratified `val_fraction` of train is drawn; without `test`, asking for "test" raises
      `MissingSplitError`.
    - The same without such a column: a stratified draw of `val_fraction` and `test_fraction`; the rest is
      train.
    - `train.csv` with `val.csv` and `test.csv` of the same form. A column `split` there must not contradict
      the file. Such a file beside the first one that has no column of labels is not used, which is said.

    Where no row is one of train, as in a `test.csv` alone, the splits that are there can be scored, and
    asking for another one raises `MissingSplitError`.

    Of several files for the same images one is used: the first of those here, and .csv before .tsv. The
    others are named among what is said of the data.

    Columns with usual names (`path`, `file_name`, `image`, ...; `label`, `class`, `category`, ...) are found,
    others have to be named. An image may have several labels: with `separator` in one column, or as a column
    of 0 and 1, or false and true, for each class. What is understood and what is refused is said in
    `vimtune.data.own.label_tables` and `label_columns`.

    Options:
        labels: the file, below the folder of the data.
        images: the folder below it at which the paths in the file start.
        path_column, label_column, split_column: names of the columns.
        separator: sign between the labels of an image, which may then have several or none.
    """

    summary = "your own images with labels in labels.csv or .tsv, one for each image or several"
    needs_data_dir = True

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        labels: Text | None = None,
        images: Text | None = None,
        path_column: Text | None = None,
        label_column: Text | None = None,
        split_column: Text | None = None,
        separator: Text | None = None,
        val_fraction: Share = 0.15,
        test_fraction: Share = 0.15,
    ) -> None:
        del img_size, download
        # These come late, because data sets are listed without Pillow.
        from vimtune.data.own.folder_splits import find_split
        from vimtune.data.own.label_columns import Columns
        from vimtune.data.own.label_tables import EXPECTED, read_tables

        columns = Columns(path_column, label_column, split_column, separator)
        found = find_split(
            data_dir,
            split,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            kind="csv",
            expected=EXPECTED,
            read=partial(read_tables, file=labels, images=images, columns=columns),
        )
        paths, targets = [path for path, _ in found.images], [label for _, label in found.images]
        self._set_files(
            split, found.root, paths, targets, found.classes, found.source, found.notes, tags=found.tags
        )
