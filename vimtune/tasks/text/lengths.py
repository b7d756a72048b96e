"""Groups of items of similar lengths: batches are cut from one group each, so that few of their tokens are
padding and, where that is asked for, few lengths suffice for all batches.

The groups depend on the lengths of the items and on the batch size alone, hence not on the device: a run has
the same batches whether they are padded to the length of their group or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from vimtune.tasks.text.tokens import Item

MOST_SHAPES = 24
"""How many groups there are where padding allows it, and so many shapes of batches where each is padded to
the length of its group. The fewer there are, the more do the batches of one epoch differ from those of
another."""
MOST_PADDING = 0.1
"""Share of the tokens that may be padding. Batches are made smaller where it takes that, as in few texts of
many lengths."""
MOST_BETWEEN = 0.02
"""Where the choices of single items differ so much that this alone takes most of `MOST_PADDING`, the padding
between items may be this share of the rest."""
EVEN_PADDING = 0.02
"""A batch is not divided where the padding that items owe to each other is this share or less."""


FEW_BATCHES = 4
"""So many batches or fewer stay whole: they take little time, padded or not, and the size of a batch matters
more."""


class Group(NamedTuple):
    """Items that are neighbours in length."""

    length: int
    """Tokens of the longest row."""
    items: int
    """How many there are."""
    rows: int
    """How many rows they have together."""
    batch_size: int
    """How many of them make a batch."""


def group_by_length(items: Sequence[Item], batch_size: int) -> list[Group]:
    """Divide items, the longest first, into as few groups as padding allows.

    What is left over when all items are cut into batches is the first group, so that the rest of them need
    not be as long. Where too much of the batches would be padding, some are divided: those parts are smaller
    batches. Every group holds whole batches of one size. Neighbours are joined, those that cost the least
    padding first, as long as padding stays below `MOST_PADDING`, or there are more than `MOST_SHAPES` groups
    of undivided batches.
    """
    by_length = sorted(items, key=lambda item: -item.length)
    left_over = len(items) % batch_size
    starts = [*([0] if left_over else []), *range(left_over, len(items), batch_size)]
    batches = [by_length[start:end] for start, end in pairwise([*starts, len(items)])]
    number, most = len(batches), _most_padded(items)
    batches = _divide(batches, most)
    groups = list(map(_group, batches))
    groups = [
        _join(list(alike)) for _, alike in groupby(groups, key=lambda group: (group.length, group.batch_size))
    ]
    padded = sum(group.length * group.rows for group in groups)
    while costs := [
        ((one.length - other.length) * other.rows, place)
        for place, (one, other) in enumerate(pairwise(groups))
        if one.batch_size == other.batch_size
    ]:
        cost, cheapest = min(costs)
        padded += cost
        few = len(groups) <= MOST_SHAPES or len(batches) > number
        if few and padded > most:
            break
        groups[cheapest : cheapest + 2] = [_join(groups[cheapest : cheapest + 2])]
    return groups


def _most_padded(items: Sequence[Item]) -> float:
    """How many tokens all batches may take together, padding included."""
    tokens = sum(len(row.tokens) for item in items for row in item.rows)
    # The choices of one item are padded to the longest of them in whatever batch it is.
    alone = sum(item.length * len(item.rows) for item in items)
    return max(tokens / (1 - MOST_PADDING), alone * (1 + MOST_BETWEEN))


def _divide(batches: list[list[Item]], most: float) -> list[list[Item]]:
    """Batches of sorted items, and more and smaller ones where they take more than `most` tokens when padded.

    The batch whose division saves most is divided first.
    """
    if len(batches) <= FEW_BATCHES:
        return batches
    padded = sum(_group(batch).length * _group(batch).rows for batch in batches)
    gains = list(map(_best_division, batches))
    while padded > most:
        number = max(range(len(gains)), key=lambda place: gains[place][0])
        saved, place = gains[number]
        if saved == 0:
            break
        padded -= saved
        parts = batches[number][:place], batches[number][place:]
        batches[number : number + 1] = parts
        gains[number : number + 1] = map(_best_division, parts)
    return batches


def _best_division(batch: Sequence[Item]) -> tuple[int, int]:
    """How many tokens of padding the best division of sorted items saves, and before which of them it is.

    It saves none where all are of about the same length.
    """
    longest, rows = batch[0].length, [len(item.rows) for item in batch]
    owed = sum((longest - item.length) * own for item, own in zip(batch, rows, strict=True))
    if owed <= EVEN_PADDING * longest * sum(rows):
        return 0, 0
    below = list(accumulate(reversed(rows)))[::-1]  # rows from each item on
    savings = ((longest - item.length) * count for item, count in zip(batch, below, strict=True))
    return max((saved, place) for place, saved in enumerate(savings))


def _group(by_length: Sequence[Item]) -> Group:
    """The group of some items, the first of which is the longest."""
    rows = sum(len(item.rows) for item in by_length)
    return Group(by_length[0].length, len(by_length), rows, batch_size=len(by_length))


def _join(groups: Sequence[Group]) -> Group:
    """One group of all, of which the first is the longest."""
    items, rows = (sum(group[place] for group in groups) for place in (1, 2))
    return Group(groups[0].length, items, rows, groups[0].batch_size)
