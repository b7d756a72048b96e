"""Some images of a data set: so many of each class, so many in all as VTAB-1k has them, or a fold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vimtune.data.base import ImageDataset
from vimtune.data.drawing import draw_of_each_class, draw_some, protocol_sizes
from vimtune.data.errors import DatasetError
from vimtune.data.splitting import stratified_folds
from vimtune.text import counted

if TYPE_CHECKING:
    from PIL import Image

Part = tuple[ImageDataset, Sequence[int]]
"""A split of a data set, and the indices of the images that were drawn from it."""


class DrawnImages(ImageDataset):
    """Images that were drawn from one split or from several."""

    def __init__(self, split: str, parts: Sequence[Part], how: str) -> None:
        """The images of `parts`, one part after the other.

        Args:
            split: what the images are called together.
            parts: which ones were drawn; all of them have the same classes.
            how: says in words how they were drawn.

        Raises:
            DatasetError: the classes of the parts differ.
        """
        first = parts[0][0]
        for other, _ in parts[1:]:
            if other.classes != first.classes:
                raise DatasetError(
                    f"the classes of {other.split!r} are not those of {first.split!r}: {other.source}; "
                    f"{first.source}"
                )
        self.split, self.classes = split, first.classes
        self._parts = parts
        self._places = [(dataset, index) for dataset, indices in parts for index in indices]
        self.targets = [dataset.label(index) for dataset, index in self._places]
        if first.tags is not None:
            self.tags = [dataset.tags[index] for dataset, index in self._places if dataset.tags is not None]
        sources = " and ".join(dataset.source for dataset, _ in parts)
        used = set(self.targets) if self.tags is None else {tag for tags in self.tags for tag in tags}
        lacking = len(self.classes) - len(used)
        none = f", none of {counted(lacking, 'classes')}" if lacking else ""
        self.source = f"{counted(len(self.targets), 'images')}{none}, {how}, of: {sources}"

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB."""
        dataset, own = self._places[index]
        return dataset.load(own)

    def describe(self, index: int) -> str:
        """What the data set calls image `index`."""
        dataset, own = self._places[index]
        return dataset.describe(own)

    def fingerprint(self) -> str:
        """Hash of the splits from which the images were drawn, and of which ones they are."""
        drawn = [(dataset.fingerprint(), list(indices)) for dataset, indices in self._parts]
        return hashlib.sha256(repr(drawn).encode()).hexdigest()


def draw_shots(dataset: ImageDataset, shots: int, seed: int) -> DrawnImages:
    """`shots` images of each class of a split.

    Raises:
        DatasetError: a class has fewer, or images have several labels.
    """
    if dataset.tags is not None:
        raise DatasetError(
            f"shots = {shots} draws by the one class of an image, and these have several: give train_size "
            f"({dataset.source})"
        )
    indices = draw_of_each_class(dataset.targets, dataset.classes, shots, seed, dataset.source)
    return DrawnImages(dataset.split, [(dataset, indices)], f"{shots} of each class drawn with seed {seed}")


def draw_at_most(dataset: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    """At most `limit` images of a split, in its order; all of it where it has no more, or without a limit."""
    if limit is None or len(dataset) <= limit:
        return dataset
    indices = sorted(draw_some(len(dataset), limit, seed))
    return DrawnImages(dataset.split, [(dataset, indices)], f"for limit {limit} drawn with seed {seed}")


def draw_protocol(open_split: Callable[[str], ImageDataset], split: str, size: int, seed: int) -> DrawnImages:
    """A split of the protocol that has `size` images to learn from: of 1000, 800 to train on and 200 to
    select by.

    The former are drawn from the data set's own train split, the latter from its val split, as in VTAB-1k.

    Args:
        open_split: opens a whole split of the data set by its name.
        split: "train", "val" or "train+val".
        size: of both together.
        seed: of the draw.

    Raises:
        DatasetError: what `open_split` raises, or a split has fewer images than are to be drawn.
    """
    sizes = protocol_sizes(size)
    parts: list[Part] = []
    for name in split.split("+"):
        dataset = open_split(name)
        if len(dataset) < sizes[name]:
            raise DatasetError(
                f"train_size = {size} needs {sizes['train']} train and {sizes['val']} val images, and "
                f"{name!r} has {len(dataset)}: lower train_size ({dataset.source})"
            )
        parts.append((dataset, sorted(draw_some(len(dataset), sizes[name], seed))))
    return DrawnImages(split, parts, f"for train_size {size} drawn with seed {seed}")


def take_fold(pool: ImageDataset, split: str, folds: int, fold: int, seed: int) -> DrawnImages:
    """A split of k-fold cross-validation: one of the parts of the images to learn from is "val", the others
    together are "train".

    Args:
        pool: the images to learn from, such as the split "train+val".
        split: "train" or "val".
        folds: number of parts, each with the same share of every class.
        fold: which of them is "val", from 0 on.
        seed: of the draw of the parts.

    Raises:
        DatasetError: there are fewer images than parts.
    """
    parts = stratified_folds(pool.targets, folds, seed)
    if empty := [number for number, part in enumerate(parts) if not part]:
        raise DatasetError(
            f"folds = {folds} leaves {len(empty)} parts without images: lower folds ({pool.source})"
        )
    chosen = [part for number, part in enumerate(parts) if (number == fold) == (split == "val")]
    how = f"fold {fold + 1} of {folds} drawn with seed {seed}"
    return DrawnImages(split, [(pool, sorted(index for part in chosen for index in part))], how)
