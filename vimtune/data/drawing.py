"""Draws of few examples: so many of each class, or so many in all. Both are a function of a seed alone.

A larger draw with the same seed holds a smaller one, so results for 1, 2, 4 ... examples are about data that
grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.data.errors import DatasetError
from vimtune.text import printable

_SELECTION_SHARE = 5
"""One of so many examples of a protocol is to select by: 200 of 1000."""


def draw_of_each_class(
    labels: Sequence[int], classes: Sequence[str], count: int, seed: int, source: str
) -> list[int]:
    """Indices of `count` examples of each class, in ascending order.

    Args:
        labels: class index of every example.
        classes: names of all classes.
        count: how many of each are wanted.
        seed: of the draw; the classes are drawn apart from each other.
        source: what the examples are, for the message.

    Raises:
        DatasetError: a class has fewer examples.
    """
    import numpy as np  # This comes late, because data sets are listed without numpy.

    numbers = np.asarray(labels)
    members = [np.flatnonzero(numbers == label) for label in range(len(classes))]
    if small := [label for label, own in enumerate(members) if len(own) < count]:
        fewest = min(small, key=lambda label: len(members[label]))
        raise DatasetError(
            f"shots = {count} needs {count} examples of each class, and {len(small)} of {len(classes)} "
            f"classes have fewer, such as {printable(classes[fewest])} with {len(members[fewest])}: lower "
            f"shots ({source})"
        )
    drawn = [
        np.random.default_rng([seed, label]).permutation(own)[:count] for label, own in enumerate(members)
    ]
    return sorted(int(index) for own in drawn for index in own)


def draw_some(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers from 0 to `total` - 1, in the order in which they are drawn."""
    import numpy as np  # This comes late, because data sets are listed without numpy.

    return [int(index) for index in np.random.default_rng([seed, total]).permutation(total)[:count]]


def protocol_sizes(size: int) -> dict[str, int]:
    """How many of `size` examples are to train on ("train") and to select by ("val"): 800 and 200 of 1000."""
    val = max(1, round(size / _SELECTION_SHARE))
    return {"train": size - val, "val": val}
