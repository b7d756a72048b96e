"""Data sets of the Hugging Face hub, and those that its library `datasets` has saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Len

from vimtune.data.base import ImageDataset, hash_lines
from vimtune.data.datasets import register_dataset
from vimtune.data.errors import CorruptImageError
from vimtune.data.own.folder import Share
from vimtune.text import counted

if TYPE_CHECKING:
    from PIL import Image

Text = Annotated[str, Len(1, 200)]
"""A name on the hub, or one of a column or split."""


@register_dataset("hf")
class HuggingFace(ImageDataset):
    """Images and labels of a data set that the library `datasets` reads: from the hub, where `HF_HUB_OFFLINE`
    and `HF_TOKEN` are respected, or without a path from the folder of the data, where `save_to_disk` put it.

    The column of images is the only one of type Image, and the column of labels the only ClassLabel, which
    names the classes, or else a column with a usual name (`label`, `class`, ...), whose values are the
    classes. A list of labels in a row means that an image may have several.

    Splits are recognised by their names, such as validation. A data set with one split alone is divided by a
    stratified draw of `val_fraction` and `test_fraction`; one without a validation split gives `val_fraction`
    of its training images, and one without a test split has none. Where something else is meant, options say
    it.

    Options:
        path: name on the hub, such as user/flowers.
        config: which of its configurations.
        revision: branch, tag or commit on the hub.
        image_column, label_column: names of the columns.
        train_from, val_from, test_from: names of the splits there.
    """

    summary = "data sets of Hugging Face: --dataset-kwargs path=user/name, or a saved one in --data-dir"

    def __init__(
        self,
        split: str,
        data_dir: Path | None,
        *,
        seed: int,
        img_size: tuple[int, int],
        download: bool,
        path: Text | None = None,
        config: Text | None = None,
        revision: Text | None = None,
        image_column: Text | None = None,
        label_column: Text | None = None,
        train_from: Text | None = None,
        val_from: Text | None = None,
        test_from: Text | None = None,
        val_fraction: Share = 0.15,
        test_fraction: Share = 0.15,
    ) -> None:
        del img_size  # The images have a size of their own.
        # These come late, because data sets are listed without them.
        from vimtune.data.own.folder_splits import check_fractions, take_split
        from vimtune.data.own.hf_tables import Columns, open_tables, read_labels

        check_fractions(val_fraction, test_fraction)
        place, tables = open_tables(data_dir, path, config, revision, download)
        columns = Columns(
            image_column, label_column, {"train": train_from, "val": val_from, "test": test_from}
        )
        labelled = read_labels(tables, place, columns)
        found = take_split(
            labelled.layout,
            split,
            root=Path(),
            shown=place,
            kind="hf",
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
        )
        self._place, self._images, self._column = place, labelled.images, labelled.image_column
        self._rows: list[tuple[str, int]] = [labelled.rows[name] for name, _ in found.images]
        self.split, self.classes, self.tags = split, found.classes, found.tags
        self.targets = [label for _, label in found.images]
        numbers = f"{counted(len(self.targets), 'images')} of {counted(len(self.classes), 'classes')}"
        self.source = "; ".join([f"{found.source}, {numbers}", *found.notes])

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB."""
        # This comes late, because data sets are listed without Pillow.
        from vimtune.data.files.images import load_image, read_picture

        table, row = self._rows[index]
        picture: dict[str, Any] | None = self._images[table][row][self._column]
        if picture is not None and picture["bytes"] is not None:
            return read_picture(picture["bytes"], self.describe(index))
        if picture is not None and picture["path"] is not None:
            return load_image(picture["path"])
        raise CorruptImageError(self.describe(index), "the row has no image")

    def describe(self, index: int) -> str:
        """The row of image `index`."""
        table, row = self._rows[index]
        return f"{self._place}, {table}, row {row}"

    def fingerprint(self) -> str:
        """Hash of every image's label, row, and size in bytes, which depends on no folder."""
        from vimtune.data.own.hf_tables import image_sizes

        tables = {table for table, _ in self._rows}
        sizes: dict[str, Sequence[int]] = {
            table: image_sizes(self._images[table], self._column) for table in tables
        }
        return hash_lines(
            f"{self.labels_text(index)} {sizes[table][row]} {table} {row}"
            for index, (table, row) in enumerate(self._rows)
        )
