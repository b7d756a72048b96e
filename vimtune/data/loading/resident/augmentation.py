"""The presets of `vimtune.data.transforms` on the device: what is done once and stored, and what for a batch.

What is not random is done once, by the code of the host, so that an image of an evaluation is the same to the
bit with and without a cache. Of training images to be cropped at random the whole image is stored; a
large one is first reduced, as far as even the smallest crop that the preset allows still has a pixel
for each pixel of the model's input. B images, H x W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vimtune.data.loading.resident import crops, operations
from vimtune.data.loading.resident.draws import Draws
from vimtune.data.normalisation import Normalisation
from vimtune.data.resize import PILLOW_FILTERS
from vimtune.data.transforms import (
    CHANGES,
    ERASE_CHANCE,
    ERASE_RATIO,
    ERASE_SCALE,
    JITTER_CHANCE,
    crop_ratio,
    evaluation_crop,
    is_random,
)
from vimtune.preprocessing import Preprocessing

_LONGEST = 2
"""The longer side of a stored image is at most so many times what the shorter one may be."""


def stored_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """What is stored of a decoded image: uint8 (height, width, 3)."""
    if not is_random(preprocessing):
        return evaluation_crop(image, preprocessing)
    shorter = math.ceil(max(preprocessing.img_size) / math.sqrt(CHANGES[preprocessing.preset].crop_scale[0]))
    factor = min(1.0, shorter / min(image.size), _LONGEST * shorter / max(image.size))
    if factor < 1:
        reduced = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        image = image.resize(reduced, PILLOW_FILTERS[preprocessing.interpolation])
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


class Augmentation:
    """Makes the model's input of stored images, a batch at a time."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        self._preprocessing = preprocessing
        self._normalise = Normalisation(preprocessing.mean, preprocessing.std)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self._fill = (255 * mean).round()
        height, width = preprocessing.img_size
        self.img_size: tuple[int, int] = (height, width)

    @property
    def num_draws(self) -> int:
        """Random numbers that an image needs."""
        if not is_random(self._preprocessing):
            return 0
        changes = CHANGES[self._preprocessing.preset]
        return (
            crops.DRAWS_OF_A_BOX
            + 1
            + (operations.DRAWS_OF_JITTER if changes.jitter else 0)
            + changes.operations * operations.DRAWS_OF_AN_OPERATION
            + (crops.DRAWS_OF_A_BOX + 1 if changes.erases else 0)
        )

    def __call__(self, pixels: Tensor, heights: Tensor, widths: Tensor, draws: Draws) -> Tensor:
        """The model's input.

        Args:
            pixels: what was stored of the images, uint8 (B, H, W, 3), padded to one size in any way.
            heights, widths: their own sizes, (B,) int64.
            draws: gives `num_draws` numbers.

        Returns:
            Normalised images, float32 (B, 3, height, width).
        """
        if not is_random(self._preprocessing):
            return self._normalise(pixels)
        images = self._crop(pixels, heights, widths, draws)
        changes = CHANGES[self._preprocessing.preset]
        if changes.jitter:
            images = operations.jitter(images, draws, **changes.jitter, chance=JITTER_CHANCE)
        for _ in range(changes.operations):
            images = operations.random_operation(images, draws, self._fill)
        if changes.erases:
            images = self._erase(images, draws)
        return self._normalise.scale_(images)

    def _crop(self, pixels: Tensor, heights: Tensor, widths: Tensor, draws: Draws) -> Tensor:
        """Random boxes, resized to the model's input and mirrored with even chances."""
        settings = self._preprocessing
        ratio = crop_ratio(self.img_size)
        drawn, fitting = crops.draw_boxes(draws, heights, widths, CHANGES[settings.preset].crop_scale, ratio)
        middle = crops.middle_boxes(heights, widths, ratio)
        boxes = crops.Boxes(*(torch.where(fitting, a, b) for a, b in zip(drawn, middle, strict=True)))
        mirrored = draws.one() < 0.5
        return crops.resize_boxes(pixels, boxes, self.img_size, settings.interpolation, mirrored)

    def _erase(self, images: Tensor, draws: Draws) -> Tensor:
        """With some chance a rectangle of an image gets the mean colour."""
        height, width = self.img_size
        # A rectangle as large as the image in one direction is drawn again.
        box, fitting = crops.draw_boxes(
            draws, height, width, ERASE_SCALE, (1 / ERASE_RATIO[1], 1 / ERASE_RATIO[0]), margin=1
        )
        erased = fitting & (draws.one() < ERASE_CHANCE)
        return operations.erase(
            images, box.top, box.left, torch.where(erased, box.height, 0), box.width, self._fill
        )
