"""Batches of a data set that lives on the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vimtune.data.base import ImageDataset
from vimtune.data.batch_sampler import BatchSampler
from vimtune.data.image_loader import ImageLoader
from vimtune.data.resident.augmentation import Augmentation
from vimtune.data.resident.draws import Draws, uniforms
from vimtune.data.resident.store import ImageStore
from vimtune.data.samples import Batch

_BYTES_AT_ONCE = 64 * 2**20
"""Batches are made together as long as their images have fewer bytes in fp32: a small batch keeps a GPU busy
for less time than it takes to start the operations for it."""


class ResidentLoader(ImageLoader):
    """Makes batches out of an `ImageStore`. They lie on its device, and nothing waits for them.

    Several batches are made together. Which ones depends on the number of the batch alone, so that a resumed
    epoch computes with the same shapes, and so to the bit, what an uninterrupted one does.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        store: ImageStore,
        augmentation: Augmentation,
        batches: BatchSampler,
        seed: int,
        on_corrupt: str,
    ) -> None:
        super().__init__(dataset, batches, on_corrupt, augmentation.img_size)
        self._store, self._augmentation, self._seed = store, augmentation, seed
        self._labels = torch.tensor(dataset.targets, dtype=torch.int64, device=store.device)
        self._unread = np.isin(np.arange(len(dataset)), list(store.failures))
        of_an_image = 3 * 4 * max(store.largest[0] * store.largest[1], self._img_size[0] * self._img_size[1])
        self._together = max(1, _BYTES_AT_ONCE // (of_an_image * batches.largest_share))

    def _read(self) -> Iterator[Batch]:
        number = self._batches.start_batch // self._together * self._together
        shares = self._batches.shares(number)
        while group := list(islice(shares, self._together)):
            readable = [share[~self._unread[share]] for share in group]
            sizes = [len(share) for share in readable]
            images, labels = self._make(np.concatenate(readable))
            parts = zip(group, images.split(sizes), labels.split(sizes), strict=True)
            for share, own_images, own_labels in parts:
                if number >= self._batches.start_batch:
                    failures = [self._store.failures[index] for index in share[self._unread[share]].tolist()]
                    yield Batch(own_images, own_labels, failures)
                number += 1

    @torch.no_grad()
    def _make(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The model's input (b, 3, H, W) of images, augmented for the epoch, and their labels (b,)."""
        device = self._store.device
        places = torch.from_numpy(indices)
        places = (places.pin_memory() if device.type == "cuda" else places).to(device, non_blocking=True)
        labels = self._labels[places]
        if not len(indices):
            return torch.empty(0, 3, *self._img_size, device=device), labels
        table = uniforms(self._seed, self._batches.epoch, places, self._augmentation.num_draws)
        return self._augmentation(*self._store.read(places), Draws(table)), labels
