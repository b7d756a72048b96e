"""Which images make which batch: a pure function of seed, epoch and rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from vimtune.data.loading.samples import Key


class BatchSampler(Sampler[list[Key]]):
    """The samples of each batch that belong to this rank, from the current position to the end of the epoch.

    An order is a list of draws. The draw `image + turn * num_images` is an image, and how often it came
    before in the epoch; where every image comes once, draws are the indices of images.

    Attributes:
        num_images: images of the data set.
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
        balanced: Sequence[int] | None = None,
    ) -> None:
        """Arrange an epoch of as many draws as there are images.

        Args:
            num_images: images of the data set.
            batch_size: draws of a batch over all ranks together.
            shuffle: whether each epoch has an order of its own.
            drop_last: leave out the last batch when it is smaller.
            seed: of the orders.
            rank, world_size: which share of each batch is ours.
            balanced: the class of every image, where an epoch is to have equally many draws of each; a large
                class then shows some of its images, and a small one shows its own several times.
        """
        self.num_images = num_images
        self._balanced = None if balanced is None else np.asarray(balanced)
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
            turns, images = np.divmod(share, self.num_images)
            pairs = zip(images.tolist(), turns.tolist(), strict=True)
            yield [Key(epoch, image, turn) for image, turn in pairs]

    def shares(self, epoch: int, start_batch: int) -> Iterator[np.ndarray]:
        """This rank's draws, batch by batch, from one batch of an epoch on: int64 (b,)."""
        order = self._order(epoch)
        for batch in range(start_batch, self.num_batches):
            whole = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            first = self._rank * len(whole) // self._world_size
            last = (self._rank + 1) * len(whole) // self._world_size
            yield whole[first:last]

    def _order(self, epoch: int) -> np.ndarray:
        """The draws of an epoch over all ranks: int64 (num_images,)."""
        if not self._shuffle:
            return np.arange(self.num_images)
        chance = np.random.default_rng([self._seed, epoch])
        if self._balanced is None:
            return chance.permutation(self.num_images)
        return _balanced_order(self._balanced, chance)


def _balanced_order(labels: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """As many draws as there are images, of each class the same number (or one more), in random order.

    The images of a class come in turns: none of them comes again before all have come.
    """
    classes = np.unique(labels)
    shares = np.full(len(classes), len(labels) // len(classes))
    shares[chance.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    draws = []
    for label, share in zip(classes, shares.tolist(), strict=True):
        own = np.flatnonzero(labels == label)
        turns = [chance.permutation(own) + turn * len(labels) for turn in range(-(-share // len(own)))]
        draws.append(np.concatenate([*turns, own[:0]])[:share])
    return chance.permutation(np.concatenate(draws))
