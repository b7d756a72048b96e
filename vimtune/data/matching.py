"""Images whose labels are those of another list of classes, matched by name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vimtune.data.base import ImageDataset
from vimtune.data.errors import DatasetError
from vimtune.text import counted, name_some

if TYPE_CHECKING:
    from PIL import Image


class Relabelled(ImageDataset):
    """Images of a data set with labels of another list of classes."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], labels: dict[int, int]) -> None:
        """The images whose classes are known; of images that may have several labels all, with those known.

        Args:
            dataset: has the images.
            classes: the names of the new labels.
            labels: the new label of each class of the data set that is known.
        """
        self._dataset = dataset
        self.split, self.classes, self.source = dataset.split, list(classes), dataset.source
        if dataset.tags is None:
            self._indices = [index for index in range(len(dataset)) if dataset.label(index) in labels]
            self.targets = [labels[dataset.label(index)] for index in self._indices]
        else:
            self._indices = list(range(len(dataset)))
            self.targets = [labels.get(dataset.label(index), -1) for index in self._indices]
            self.tags = [tuple(sorted(labels[tag] for tag in tags if tag in labels)) for tags in dataset.tags]

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB."""
        return self._dataset.load(self._indices[index])

    def describe(self, index: int) -> str:
        """What the data set calls image `index`."""
        return self._dataset.describe(self._indices[index])

    def fingerprint(self) -> str:
        """Hash of the data set, of the images that are left of it, and of their labels."""
        parts = (self._dataset.fingerprint(), self._indices, self.targets, self.tags)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Matched:
    """A data set with the labels of a model, and what did not match."""

    dataset: ImageDataset
    """Its images of classes that the model knows."""
    unknown: dict[str, int]
    """Classes that the model does not know, and how many images of them, or labels, were left out."""
    absent: list[str]
    """Classes of the model that the data set does not have."""

    def notes(self) -> list[str]:
        """What has to be said about it, in whole sentences."""
        found = []
        if self.unknown:
            what = "images" if self.dataset.tags is None else "labels"
            count, names = counted(sum(self.unknown.values()), what), name_some(self.unknown)
            found.append(f"Left out: {count} of classes that the model does not know ({names}).")
        if self.absent:
            found.append(f"The data have no class {name_some(self.absent)}, which the model knows.")
        return found


def match_classes(dataset: ImageDataset, classes: Sequence[str]) -> Matched:
    """Give the images of a data set the labels that a model has for their classes, by name.

    Args:
        dataset: any images.
        classes: names of the model's classes, by label.

    Raises:
        DatasetError: the model knows none of the classes, or has one name for several of them.
    """
    if dataset.classes == list(classes):
        return Matched(dataset, {}, [])
    places = {name: label for label, name in enumerate(classes)}
    if len(places) < len(classes):
        twice = [name for name, count in Counter(classes).items() if count > 1]
        raise DatasetError(
            f"the model has several classes of one name ({name_some(twice)}), and other classes than the "
            "images: they cannot be matched by name"
        )
    labels = {label: places[name] for label, name in enumerate(dataset.classes) if name in places}
    if not labels:
        raise DatasetError(
            f"the model knows none of the classes of the images: it has {name_some(classes)}; the images "
            f"have {name_some(dataset.classes)} ({dataset.source}). Name folders as the model does"
        )
    tags = dataset.tags
    counts = Counter(dataset.targets if tags is None else (tag for own in tags for tag in own))
    others = [label for label in range(len(dataset.classes)) if label not in labels]
    unknown = {dataset.classes[label]: counts[label] for label in others if counts[label]}
    known = set(dataset.classes)
    absent = [name for name in classes if name not in known]
    return Matched(Relabelled(dataset, classes, labels), unknown, absent)
