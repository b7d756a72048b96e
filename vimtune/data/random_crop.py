"""The random crop of albumentations, resized as all other images of this project are.

What is drawn is albumentations' own. It would resize with OpenCV, whose only filter against aliasing is a
mean over areas: it takes two to four times as long as torch's filters, is not the one that was asked for, and
blurs crops that are hardly larger than the result. This module imports albumentations; see
`vimtune.data.transforms` for when that happens.
"""

from __future__ import annotations

from typing import Any

import albumentations as A
import numpy as np

from vimtune.data.resize import resize_pixels


class RandomCrop(A.RandomResizedCrop):  # type: ignore[misc]  # albumentations states no types
    """Cuts out a random part of an image, uint8 (H, W, 3), and resizes it."""

    def __init__(
        self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], filter_name: str
    ) -> None:
        """A crop.

        Args:
            size: (height, width) of the result.
            scale: smallest and largest part of the area.
            ratio: smallest and largest width / height.
            filter_name: name of the interpolation, a key of `vimtune.data.resize.PILLOW_FILTERS`.
        """
        super().__init__(size=size, scale=scale, ratio=ratio)
        self.filter_name = filter_name

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        """Cut out the pixels from (left, top) to (right, bottom), one at least, and resize them."""
        left, top, right, bottom = crop_coords
        height, width = img.shape[:2]
        left, top = min(left, width - 1), min(top, height - 1)
        box = img[top : max(bottom, top + 1), left : max(right, left + 1)]
        return resize_pixels(box, self.size, self.filter_name)
