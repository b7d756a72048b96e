"""Batches of sequences of similar lengths, padded on the right: padding never enters a recurrent state.

Shape letters: B rows of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from vimtune.ops.cross_entropy import IGNORED
from vimtune.tasks.job import Batch, Loader, Tensors
from vimtune.tasks.text.lengths import Group, group_by_length
from vimtune.tasks.text.tokens import Item, Row

EMPTY = Row((0,), scored=0, slot=-1)
"""A row that fills up a batch and belongs to no choice. It has one token, because there is no last one and no
mean of none."""
ENOUGH = 0.95
"""Share of the batches of a group for which the rows of its usual size are enough."""


class Size(NamedTuple):
    """What a batch is padded to; one that is larger stays as it is."""

    rows: int = 0
    """B, by rows that are `EMPTY`."""
    length: int = 0
    """L."""
    scored: int = 0
    """T, tokens that are scored."""
    choices: int = 0
    """Rows that an item may have."""


AS_IT_IS = Size()
"""No padding beyond the longest row."""


def collate(rows: Sequence[Row], size: Size = AS_IT_IS) -> Tensors:
    """The tensors of rows, padded to `size`.

    Returns:
        "input_ids" (B, L), 0 after the end of a row; "attention_mask" (B, L), 1 for tokens; "labels" (B, L),
        the tokens that are scored, and `IGNORED`; "slots" (B,).
    """
    rows = [*rows, *[EMPTY] * (size.rows - len(rows))]
    longest = max([size.length, *(len(row.tokens) for row in rows)])
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
    the one that is not whole.
    """

    def __init__(
        self,
        split: str,
        source: str,
        fingerprint: str,
        num_examples: int,
        items: Sequence[Item],
        tensors_of: Callable[[Sequence[Item], Size], Batch],
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
            tensors_of: makes the batch of some items, padded to a size.
            batch_size: items per batch, over all processes together; fewer where more would be padding
                (`group_by_length`).
            shuffle: draw a new order in each epoch, in which one of the largest batches comes first; else the
                longest come first. So what does not fit the memory is known at once.
            seed: of the order.
            rank, world_size: which share of each batch is ours.
            pin_memory: put batches into page-locked memory, for faster copies to a GPU.
        """
        self.split, self.source, self.num_examples = split, source, num_examples
        self._fingerprint, self._items, self._tensors_of = fingerprint, items, tensors_of
        self._shuffle, self._seed = shuffle, seed
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self._epoch = self._start = 0
        self._groups = group_by_length(items, batch_size)
        self._sizes: list[Size] = []

    def pad_to_few_shapes(self) -> None:
        """Pad batches from now on, so that nearly all have one of a few shapes: as many as there are groups.

        The order stays as it is.
        """
        cuts = self._order()
        of_groups = [
            [cut.items for cut in cuts if cut.group == number] for number in range(len(self._groups))
        ]
        self._sizes = [
            self._usual_size(group, batches) for group, batches in zip(self._groups, of_groups, strict=True)
        ]

    def _usual_size(self, group: Group, batches: Sequence[Sequence[int]]) -> Size:
        """What this process's shares of the batches of a group are padded to.

        Nearly all of `batches`, those of an epoch, have no more rows. For the tokens that are scored there is
        room even where the items that have most of them meet in one share.
        """
        shares = [self._share(batch) for batch in batches]
        rows = sorted(sum(len(item.rows) for item in share) for share in shares)
        scored = sorted(sum(row.scored for row in self._items[i].rows) for batch in batches for i in batch)
        return Size(
            rows=rows[math.ceil(ENOUGH * (len(rows) - 1))],
            length=group.length,
            scored=sum(scored[len(scored) - max(map(len, shares)) :]),
            choices=max(len(item.rows) for item in self._items),
        )

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
        return sum(-(-group.items // group.batch_size) for group in self._groups)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this process's share of the batches."""
        for cut in self._order()[self._start :]:
            share = self._share(cut.items)
            size = self._sizes[cut.group] if self._sizes and share else AS_IT_IS
            batch = self._tensors_of(share, size)
            if self._pin_memory:
                batch = Batch({name: t.pin_memory() for name, t in batch.tensors.items()}, batch.count)
            yield batch

    def _share(self, whole: Sequence[int]) -> list[Item]:
        """This process's share of a batch."""
        first, last = (len(whole) * (self._rank + more) // self._world_size for more in (0, 1))
        return [self._items[index] for index in whole[first:last]]

    def _order(self) -> list[_Cut]:
        """The batches of the epoch."""
        order = list(range(len(self._items)))
        draw = random.Random(f"{self._seed} {self._epoch}")
        if self._shuffle:
            draw.shuffle(order)
        order.sort(key=lambda index: -self._items[index].length)  # items of one length stay as they were
        cuts: list[_Cut] = []
        for number, group in enumerate(self._groups):
            members, order = order[: group.items], order[group.items :]
            if self._shuffle:
                draw.shuffle(members)
            cuts += _cut(members, number, group.batch_size)
        if self._shuffle:
            draw.shuffle(cuts)
            largest = max(range(len(cuts)), key=lambda place: self._tokens(cuts[place]))
            cuts[0], cuts[largest] = cuts[largest], cuts[0]
        return cuts

    def _tokens(self, cut: _Cut) -> int:
        """Tokens of a batch when it is padded."""
        return len(cut.items) * self._groups[cut.group].length


class _Cut(NamedTuple):
    """One batch of an epoch."""

    items: list[int]
    """The numbers of its items."""
    group: int
    """The number of the group from which it is cut."""


def _cut(order: Sequence[int], group: int, size: int) -> list[_Cut]:
    """Batches of neighbours."""
    return [_Cut(list(order[start : start + size]), group) for start in range(0, len(order), size)]
