"""Batches of a data set that lives on the device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vimtune.data.base import ImageDataset
from vimtune.data.device.augmentation import Augmentation
from vimtune.data.device.draws import Draws, uniforms
from vimtune.data.loading.batch_sampler import BatchSampler
from vimtune.data.loading.image_loader import ImageLoader
from vimtune.data.loading.resident.store import ImageStore
from vimtune.data.loading.samples import Batch, FailedSample, targets_of

_BYTES_AT_ONCE = 256 * 2**20
"""Batches are made together as long as their images have fewer bytes in fp32: a small batch keeps a GPU busy
for less time than it takes to start the operations for it."""


class ResidentLoader(ImageLoader):
    """Makes batches out of an `ImageStore`. They lie on its device, and nothing waits for them.

    Several batches are made together. Which ones depends on the number of the batch alone, so that a resumed
    epoch computes with the same shapes, and so to the bit, what an uninterrupted one does.
    """

    work = "decoded once"

    def __init__(
        self,
        dataset: ImageDataset,
        store: ImageStore,
        augmentation: Augmentation,
        batches: BatchSampler,
        seed: int,
        on_corrupt: str,
    ) -> None:
        super().__init__(dataset, batches, on_corrupt)
        self._store, self._augmentation, self._seed = store, augmentation, seed
        self._img_size = augmentation.img_size
        self._ahead: _Ahead | None = None
        self._labels = targets_of(dataset, range(len(dataset))).to(store.device)
        self._unread = np.isin(np.arange(len(dataset)), list(store.failures))
        of_an_image = 3 * 4 * max(store.largest[0] * store.largest[1], self._img_size[0] * self._img_size[1])
        self._together = max(1, _BYTES_AT_ONCE // (of_an_image * batches.largest_share))

    def read_ahead(self) -> None:
        """Launch the first batches that the next iteration is to yield, while something else is done.

        An iteration that starts at another position begins anew.
        """
        position = self._batches.epoch, self._batches.start_batch
        if self._ahead is None or self._ahead[:2] != position:
            groups = self._groups(*position)
            self._ahead = _Ahead(*position, next(groups, []), groups)

    def close(self) -> None:
        """Forget batches that were made ahead."""
        self._ahead = None

    def _read(self) -> Iterator[Batch]:
        self.read_ahead()
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        for group in chain([ahead.first], ahead.others):
            yield from group

    def _groups(self, epoch: int, start_batch: int) -> Iterator[list[Batch]]:
        """The batches from a position to the end of the epoch, those that are made together in one list."""
        number = start_batch // self._together * self._together
        shares = self._batches.shares(epoch, number)
        while group := list(islice(shares, self._together)):
            yield self._make(epoch, group)[max(0, start_batch - number) :]
            number += len(group)

    def _make(self, epoch: int, shares: list[np.ndarray]) -> list[Batch]:
        """Batches of the given draws (see `BatchSampler`), (b,) each."""
        images = [share % len(self.dataset) for share in shares]
        readable = [share[~self._unread[own]] for share, own in zip(shares, images, strict=True)]
        sizes = [len(share) for share in readable]
        pixels, labels = self._augmented(epoch, np.concatenate(readable))
        parts = zip(images, pixels.split(sizes), labels.split(sizes), strict=True)
        return [
            Batch(
                {"images": own},
                own_labels,
                [
                    FailedSample(index, self._store.failures[index])
                    for index in indices[self._unread[indices]].tolist()
                ],
            )
            for indices, own, own_labels in parts
        ]

    @torch.no_grad()
    def _augmented(self, epoch: int, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        """The model's input (b, 3, H, W) of images, augmented for the epoch, and their labels (b, ...)."""
        device = self._store.device
        drawn = torch.from_numpy(draws)
        if device.type == "cuda":
            drawn = drawn.pin_memory()
        drawn = drawn.to(device, non_blocking=device.type == "cuda")
        places = drawn % len(self.dataset)
        labels = self._labels[places]
        if not len(draws):
            return torch.empty(0, 3, *self._img_size, device=device), labels
        table = uniforms(self._seed, epoch, drawn, self._augmentation.num_draws)
        return self._augmentation(*self._store.read(places), Draws(table)), labels


class _Ahead(NamedTuple):
    """Batches that were launched before they are asked for."""

    epoch: int
    start_batch: int
    first: list[Batch]
    """The first group of batches."""
    others: Iterator[list[Batch]]
    """The groups that are made when their turn comes."""
