"""Splits and folds that are drawn at random, with the same share of every class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def stratified_split(
    targets: Sequence[int], fractions: Sequence[float], seed: int, names: Sequence[str] | None = None
) -> list[list[int]]:
    """Draw disjoint parts with the same class proportions; the remainder is the last part.

    Each class gives `round(fraction * count)` images to every part (at least one where the class has
    enough images for all parts), and always keeps one for the remainder. Classes are drawn
    independently, so adding images to one class does not move the others.

    With `names` the draw depends on these alone and not on the numbers of classes and images. When a class
    is added or removed, all other images keep their part; when images of a class are, only a few of
    that class, at the borders of the parts, change theirs. So a model that is trained further on a
    folder that has grown is not tested with images that it was trained on before.

    Args:
        targets: class of every image; -1 stands for images of no class.
        fractions: share of each drawn part, in (0, 1), sum below 1.
        seed: the split is a pure function of the arguments.
        names: a name of each image that stays when others come and go; None where the images are fixed.

    Returns:
        `len(fractions) + 1` sorted lists of indices.
    """
    import numpy as np  # This comes late, because data sets are listed without numpy.

    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    labels = np.asarray(targets)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if names is None:
            # Seeds are not negative: the images of no class have the last one of 32 bits.
            order = np.random.default_rng([seed, int(label) % 2**32]).permutation(members).tolist()
        else:
            order = sorted(members.tolist(), key=lambda index: _drawn_place(names[index], seed))
        left = len(order)
        for part, fraction in zip(parts, fractions, strict=False):
            minimum = 1 if len(order) > len(fractions) and fraction > 0 else 0
            take = min(max(round(fraction * len(order)), minimum), left - 1)
            part.extend(order[len(order) - left : len(order) - left + take])
            left -= take
        parts[-1].extend(order[len(order) - left :])
    return [sorted(part) for part in parts]


def _drawn_place(name: str, seed: int) -> bytes:
    """A random place in an order, which is a function of a name and a seed alone."""
    return hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest()


def stratified_folds(targets: Sequence[int], folds: int, seed: int) -> list[list[int]]:
    """Draw parts of equal size that together are everything, each with the same share of every class.

    The sizes of two parts, and how many of a class they have, differ by one at most.

    Args:
        targets: class of every image; -1 stands for images of no class.
        folds: number of parts.
        seed: the parts are a pure function of the arguments.

    Returns:
        `folds` sorted lists of indices.
    """
    import numpy as np  # This comes late, because data sets are listed without numpy.

    labels = np.asarray(targets)
    chance = np.random.default_rng([seed, folds])
    by_class = [chance.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    # Classes follow each other without a gap, so that the surplus of one is not in the part of another's.
    order = np.concatenate(by_class)
    return [sorted(order[number::folds].tolist()) for number in range(folds)]
