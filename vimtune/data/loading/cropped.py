"""Samples that are cropped in the process that decodes them, and changed where the batch arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from vimtune.data.base import ImageDataset
from vimtune.data.device.augmentation import Augmentation
from vimtune.data.device.draws import Draws, uniforms
from vimtune.data.loading.samples import Key, Samples
from vimtune.data.transforms import as_rgb


class CroppedSamples(Samples):
    """Images of which random crops are sent, with the random numbers of what the device does to them."""

    def __init__(self, dataset: ImageDataset, augmentation: Augmentation, seed: int) -> None:
        super().__init__(dataset, augmentation.img_size)
        self._augmentation, self._seed = augmentation, seed

    def prepare(self, images: Sequence[Image.Image], keys: Sequence[Key]) -> list[dict[str, torch.Tensor]]:
        """Crops "images", uint8 (H, W, 3), and "draws", the numbers that are left, float32 (n,)."""
        numbers = torch.tensor([key.draw(len(self.dataset)) for key in keys])
        draws = Draws(uniforms(self._seed, keys[0].epoch, numbers, self._augmentation.num_draws))
        pixels = [np.asarray(as_rgb(image)) for image in images]
        crops = self._augmentation.cut(pixels, draws)
        return [{"images": crop, "draws": own} for crop, own in zip(crops, draws.rest(), strict=True)]

    def finish(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Change and normalise the crops of a batch."""
        return self._augmentation.finish(parts["images"], Draws(parts["draws"]))

    def nothing(self) -> dict[str, torch.Tensor]:
        """What `prepare` makes of no image, stacked."""
        return super().nothing() | {"draws": torch.empty(0, self._augmentation.num_draws_of_changes)}
