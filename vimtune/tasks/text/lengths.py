"""Groups of items of similar lengths: batches are cut from one group each, so that few of their tokens are
padding and, where that is asked for, few lengths suffice for all batches.

The groups depend on the lengths of the items and on the batch size alone, hence not on the device: a run has
the same batches whether they are padded to the length of their group or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from vimtune.tasks.text.tokens import Item

MOST_SHAPES = 16
"""How many groups there are at most, and so many shapes of batches where each is padded to the length of its
group. The fewer there are, the more do the batches of one epoch differ from those of another."""
MOST_PADDING = 0.1
"""Share of the tokens that may be padding where that takes no more groups."""


class Group(NamedTuple):
    """Items that are neighbours in length."""

    length: int
    """Tokens of the longest row."""
    items: int
    """How many there are."""
    rows: int
    """How many rows they have together."""


def group_by_length(items: Sequence[Item], batch_size: int) -> list[Group]:
    """Divide items, the longest first, into as few groups as padding allows.

    What is left over when all items are cut into whole batches is the first group, so that the rest of them
    need not be as long. Every other group holds whole batches: neighbours are joined, those that cost the
    least padding first, as long as there are more than `MOST_SHAPES` or padding stays below `MOST_PADDING`.
    """
    by_length = sorted(items, key=lambda item: -item.length)
    left_over = len(items) % batch_size
    groups = [
        _group(by_length[start : start + batch_size]) for start in range(left_over, len(items), batch_size)
    ]
    groups = [_join(list(alike)) for _, alike in groupby(groups, key=lambda group: group.length)]
    first = [_group(by_length[:left_over])] if left_over else []
    tokens = sum(len(row.tokens) for item in items for row in item.rows)
    padded = sum(group.length * group.rows for group in first + groups)
    while len(groups) > 1:
        costs = [(one.length - other.length) * other.rows for one, other in pairwise(groups)]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        padded += costs[cheapest]
        if len(first + groups) <= MOST_SHAPES and tokens < (1 - MOST_PADDING) * padded:
            break
        groups[cheapest : cheapest + 2] = [_join(groups[cheapest : cheapest + 2])]
    return first + groups


def _group(by_length: Sequence[Item]) -> Group:
    """The group of some items, the first of which is the longest."""
    return Group(by_length[0].length, len(by_length), sum(len(item.rows) for item in by_length))


def _join(groups: Sequence[Group]) -> Group:
    """One group of all, of which the first is the longest."""
    return Group(groups[0].length, sum(group.items for group in groups), sum(group.rows for group in groups))
