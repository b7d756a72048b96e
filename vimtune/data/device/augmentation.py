"""The presets for a batch: random crops, changes of shape and colour, normalisation. B images, H x W pixels.

Where the pixels of whole images lie on the device, everything is done there. Where processes on the host
decode an image in every epoch, they cut the random crop out and resize it, which leaves little to send; the
rest is done on the device. Both use the same random numbers in the same order, so that images are cropped and
changed in the same way. Pixels differ by what two ways of resizing round, and those of large images by more:
they are reduced where they are stored, and their boxes are rounded to the pixels of what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vimtune.data.device import crops, operations
from vimtune.data.device.crops import Boxes
from vimtune.data.device.draws import Draws
from vimtune.data.normalisation import Normalisation
from vimtune.data.resize import resize_pixels
from vimtune.data.transforms import (
    CHANGES,
    ERASE_CHANCE,
    ERASE_RATIO,
    ERASE_SCALE,
    JITTER_CHANCE,
    crop_ratio,
    is_random,
)
from vimtune.preprocessing import Preprocessing


class Augmentation:
    """Makes the model's input of images of a split, a batch at a time."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        self._normalise = Normalisation(preprocessing.mean, preprocessing.std)
        height, width = preprocessing.img_size
        self.img_size: tuple[int, int] = (height, width)

    @property
    def num_draws(self) -> int:
        """Random numbers that an image needs."""
        if not is_random(self._preprocessing):
            return 0
        return crops.DRAWS_OF_A_BOX + 1 + self.num_draws_of_changes

    @property
    def num_draws_of_changes(self) -> int:
        """Those of them that are left after the crop."""
        changes = CHANGES[self._preprocessing.preset]
        return (
            (operations.DRAWS_OF_JITTER if changes.jitter else 0)
            + changes.operations * operations.DRAWS_OF_AN_OPERATION
            + (crops.DRAWS_OF_A_BOX + 1 if changes.erases else 0)
        )

    def __call__(self, pixels: Tensor, heights: Tensor, widths: Tensor, draws: Draws) -> Tensor:
        """The model's input of whole images.

        Args:
            pixels: what was stored of the images, uint8 (B, H, W, 3), padded to one size in any way.
            heights, widths: their own sizes, (B,) int64.
            draws: gives `num_draws` numbers.

        Returns:
            Normalised images, float32 (B, 3, height, width).
        """
        if not is_random(self._preprocessing):
            return self._normalise(pixels)
        boxes, mirrored = self._boxes(heights, widths, draws)
        images = crops.resize_boxes(pixels, boxes, self.img_size, self._preprocessing.interpolation, mirrored)
        return self._change(images, draws)

    def cut(self, images: Sequence[np.ndarray], draws: Draws) -> list[Tensor]:
        """Random crops on the host, as `__call__` makes them.

        Args:
            images: uint8 (H, W, 3) each, of any sizes.
            draws: gives numbers of which `num_draws_of_changes` are left afterwards.

        Returns:
            The crops, uint8 (height, width, 3) each.
        """
        sizes = torch.tensor([image.shape[:2] for image in images])
        boxes, mirrored = self._boxes(sizes[:, 0], sizes[:, 1], draws)
        corners = torch.stack(boxes).T.int().tolist()
        cut = []
        for image, (top, left, height, width), mirror in zip(images, corners, mirrored.tolist(), strict=True):
            box = image[top : top + height, left : left + width]
            pixels = resize_pixels(box, self.img_size, self._preprocessing.interpolation)
            cut.append(torch.from_numpy(pixels[:, ::-1].copy() if mirror else pixels))
        return cut

    def finish(self, cut: Tensor, draws: Draws) -> Tensor:
        """The model's input of what `cut` has made.

        Args:
            cut: uint8 (B, height, width, 3).
            draws: gives `num_draws_of_changes` numbers, those that `cut` has left.

        Returns:
            Normalised images, float32 (B, 3, height, width), on the device of `cut`.
        """
        images = cut.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
        return self._change(images, draws)

    def _boxes(self, heights: Tensor, widths: Tensor, draws: Draws) -> tuple[Boxes, Tensor]:
        """Random boxes of images, and which are mirrored, (B,) bool, with even chances."""
        ratio, scale = crop_ratio(self.img_size), CHANGES[self._preprocessing.preset].crop_scale
        drawn, fitting = crops.draw_boxes(draws, heights, widths, scale, ratio)
        middle = crops.middle_boxes(heights, widths, ratio)
        boxes = Boxes(*(torch.where(fitting, a, b) for a, b in zip(drawn, middle, strict=True)))
        return boxes, draws.one() < 0.5

    def _change(self, images: Tensor, draws: Draws) -> Tensor:
        """What follows the crop, up to the normalisation; `images` as `operations` has them."""
        changes = CHANGES[self._preprocessing.preset]
        fill = (255 * self._normalise.on(images.device)[0]).round()
        if changes.jitter:
            images = operations.jitter(images, draws, **changes.jitter, chance=JITTER_CHANCE)
        for _ in range(changes.operations):
            images = operations.random_operation(images, draws, fill)
        if changes.erases:
            images = self._erase(images, draws, fill)
        return self._normalise.scale_(images)

    def _erase(self, images: Tensor, draws: Draws, fill: Tensor) -> Tensor:
        """With some chance a rectangle of an image gets the colour `fill`."""
        height, width = self.img_size
        # A rectangle as large as the image in one direction is drawn again.
        box, fitting = crops.draw_boxes(
            draws, height, width, ERASE_SCALE, (1 / ERASE_RATIO[1], 1 / ERASE_RATIO[0]), margin=1
        )
        erased = fitting & (draws.one() < ERASE_CHANCE)
        return operations.erase(
            images, box.top, box.left, torch.where(erased, box.height, 0), box.width, fill
        )
