"""Images of several sizes for tests of loaders and of what happens on a device, and epochs of them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from vimtune.data import CorruptImageError, ImageDataset, ImageLoader


def photo(height: int = 90, width: int = 120, shift: float = 0.0) -> Image.Image:
    """Waves of several colours and lengths."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + shift
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.cos(x / 11 + y / 13), np.sin(y / 5)], -1)
    return Image.fromarray((127 + 60 * waves).clip(0, 255).astype(np.uint8))


class Photos(ImageDataset):
    """Nine images of different sizes; those whose numbers are in `damaged` cannot be decoded."""

    name = "photos"

    def __init__(self, damaged: tuple[int, ...] = ()) -> None:
        self.classes, self.split, self.source = ["a", "b", "c"], "train", "test"
        self.targets = [index % 3 for index in range(9)]
        self.damaged = damaged

    def load(self, index: int) -> Image.Image:
        """Make image `index`."""
        if index in self.damaged:
            raise CorruptImageError(f"{index}.jpg", "damaged")
        return photo(14 + 5 * index, 60 - 4 * index, shift=index)

    def describe(self, index: int) -> str:
        """Name image `index`."""
        return f"photo {index}"


def epoch(loader: ImageLoader, number: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of an epoch from batch `start` on."""
    loader.set_position(number, start)
    return list(loader)
