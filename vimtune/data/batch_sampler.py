"""Which images make which batch: a pure function of seed, epoch and rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from vimtune.data.samples import Key


class BatchSampler(Sampler[list[Key]]):
    """The samples of each batch that belong to this rank, from the current position to the end of the epoch.

    Attributes:
        num_batches: batches of a whole epoch.
        epoch: the epoch that is yielded next.
        start_batch: the batch at which it begins.
        largest_share: images of a whole batch that are this rank's.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.num_batches = num_images // batch_size if drop_last else -(-num_images // batch_size)
        self.largest_share = max(1, (rank + 1) * batch_size // world_size - rank * batch_size // world_size)
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        """Batches that are left in the epoch."""
        return self.num_batches - self.start_batch

    def __iter__(self) -> Iterator[list[Key]]:
        """The keys of this rank's samples, batch by batch."""
        epoch = self.epoch
        for share in self.shares(epoch, self.start_batch):
            yield [Key(epoch, index) for index in share.tolist()]

    def shares(self, epoch: int, start_batch: int) -> Iterator[np.ndarray]:
        """The indices of this rank's images, batch by batch, from one batch of an epoch on: int64 (b,)."""
        order = np.arange(self._num_images)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._num_images)
        for batch in range(start_batch, self.num_batches):
            whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            first = self._rank * len(whole) // self._world_size
            last = (self._rank + 1) * len(whole) // self._world_size
            yield whole[first:last]
