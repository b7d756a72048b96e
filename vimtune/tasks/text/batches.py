"""Batches of sequences of similar lengths, padded on the right: padding never enters a recurrent state.

Shape letters: B rows of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch

from vimtune.tasks.job import Batch, Loader, Tensors
from vimtune.tasks.text.scoring import IGNORED
from vimtune.tasks.text.tokens import Item, Row

POOLED_BATCHES = 16
"""Training batches are cut from the sequences of so many batches at a time, sorted by length. The fewer, the
more do the batches of one epoch differ from those of another."""
MOST_PADDING = 0.1
"""Share of padding above which twice as many are sorted together, and so on. Where too much is left when all
of them are, as in few texts of many lengths, batches are divided."""
EVEN_PADDING = 0.02
"""A batch is not divided where the padding that items owe to each other is this share or less: the rest is
between the choices of single items, which no division takes away."""


def collate(rows: Sequence[Row]) -> Tensors:
    """The tensors of rows.

    Returns:
        "input_ids" (B, L), 0 after the end of a row; "attention_mask" (B, L), 1 for tokens; "labels" (B, L),
        the tokens that are scored, and `IGNORED`; "slots" (B,).
    """
    longest = max((len(row.tokens) for row in rows), default=0)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for number, row in enumerate(rows):
        end = len(row.tokens)
        tokens[number, :end] = torch.tensor(row.tokens)
        mask[number, :end] = 1
        labels[number, end - row.scored : end] = tokens[number, end - row.scored : end]
    slots = torch.tensor([row.slot for row in rows], dtype=torch.int64)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "slots": slots}


class TextBatches(Loader):
    """The items of a split in batches.

    The order depends on seed and epoch alone. Every process has a share of each batch, which may be empty in
    the last one.
    """

    def __init__(
        self,
        split: str,
        source: str,
        fingerprint: str,
        num_examples: int,
        items: Sequence[Item],
        tensors_of: Callable[[Sequence[Item]], Batch],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """A loader.

        Args:
            split: its name.
            source: which data are used, in one line.
            fingerprint: hash of its examples.
            num_examples: how many examples the items stand for.
            items: what is batched.
            tensors_of: makes the batch of some items.
            batch_size: items per batch, over all processes together; fewer in some batches where more than
                `MOST_PADDING` would be padding.
            shuffle: draw a new order in each epoch; else the longest come first, so that what does not fit
                the memory is known at once.
            seed: of the order.
            rank, world_size: which share of each batch is ours.
            pin_memory: put batches into page-locked memory, for faster copies to a GPU.
        """
        self.split, self.source, self.num_examples = split, source, num_examples
        self._fingerprint, self._items, self._tensors_of = fingerprint, items, tensors_of
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self._epoch = self._start = 0
        # Items of equal keys may take each other's place in a batch: its shape and padding stay the same.
        self._keys = [sorted((len(row.tokens) for row in item.rows), reverse=True) for item in items]
        self._sizes = list(map(len, self._divided(self._cut(self._sorted(range(len(items)))))))

    def fingerprint(self) -> str:
        """A hash that changes when the examples of the split do."""
        return self._fingerprint

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"position epoch={epoch}, start_batch={start_batch} is outside this loader: epochs count "
                f"from 0, batches from 0 to {len(self)}"
            )
        self._epoch, self._start = epoch, start_batch

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of the batches."""
        for whole in self._order()[self._start :]:
            first, last = (len(whole) * (self._rank + more) // self._world_size for more in (0, 1))
            batch = self._tensors_of([self._items[index] for index in whole[first:last]])
            if self._pin_memory:
                batch = Batch({name: t.pin_memory() for name, t in batch.tensors.items()}, batch.count)
            yield batch

    def _order(self) -> list[list[int]]:
        """The numbers of the items of every batch of the epoch."""
        order = list(range(len(self._items)))
        if not self._shuffle:
            return self._of_sizes(order)[::-1]
        draw = random.Random(f"{self._seed} {self._epoch}")
        draw.shuffle(order)
        batches = self._pooled(order) if len(self) == self._fewest() else self._of_sizes(order)
        draw.shuffle(batches)
        return batches

    def _pooled(self, order: Sequence[int]) -> list[list[int]]:
        """Batches cut from as few items at a time as little padding allows."""
        pool = self._batch_size * POOLED_BATCHES
        while True:
            parts = [order[start : start + pool] for start in range(0, len(order), pool)]
            batches = [batch for part in parts for batch in self._cut(self._sorted(part))]
            if pool >= len(order) or self._padding(batches) <= MOST_PADDING:
                return batches
            pool *= 2

    def _of_sizes(self, order: Sequence[int]) -> list[list[int]]:
        """Batches of all items, the shortest first, as they have been divided once and for all: every epoch
        has as many."""
        ends = list(accumulate(self._sizes))
        whole = self._sorted(order)
        return [whole[end - size : end] for size, end in zip(self._sizes, ends, strict=True)]

    def _divided(self, batches: list[list[int]]) -> list[list[int]]:
        """Sorted batches, and where too much of them is padding, more and smaller ones."""
        while self._padding(batches) > MOST_PADDING:
            saved, number, place = max(self._division(n, batch) for n, batch in enumerate(batches))
            if not saved:
                break
            batch = batches[number]
            batches[number : number + 1] = [batch[:place], batch[place:]]
        return batches

    def _division(self, number: int, batch: Sequence[int]) -> tuple[int, int, int]:
        """How many places of padding the best division of a sorted batch saves, its number, and before which
        of its items it is divided. It saves none where the items are of about the same length."""
        longest = self._keys[batch[-1]][0]
        rows = list(accumulate(len(self._keys[index]) for index in batch))
        owed = sum((longest - self._keys[index][0]) * len(self._keys[index]) for index in batch)
        if owed <= EVEN_PADDING * longest * rows[-1]:
            return 0, number, 0
        gains = ((longest - self._keys[i][0]) * above for i, above in zip(batch, rows, strict=True))
        saved, last = max((gain, place) for place, gain in enumerate(gains))
        return saved, number, last + 1

    def _padding(self, batches: Sequence[Sequence[int]]) -> float:
        """Share of the tokens of whole batches that are padding."""
        tokens = padded = 0
        for batch in batches:
            rows = [length for index in batch for length in self._keys[index]]
            tokens += sum(rows)
            padded += max(rows) * len(rows)
        return 1 - tokens / max(1, padded)

    def _sorted(self, order: Iterable[int]) -> list[int]:
        """Items by length, those of equal lengths in the given order."""
        return sorted(order, key=self._keys.__getitem__)

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        size = self._batch_size
        return [list(order[start : start + size]) for start in range(0, len(order), size)]

    def _fewest(self) -> int:
        """How many batches there are if none is divided."""
        return -(-len(self._items) // self._batch_size)
