"""Splits and folds that are drawn at random, with the same share of every class."""

from __future__ import annotations

from collections.abc import Sequence


def stratified_split(targets: Sequence[int], fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Draw disjoint parts with the same class proportions; the remainder is the last part.

    Each class gives `round(fraction * count)` images to every part (at least one where the class has
    enough images for all parts), and always keeps one for the remainder. Classes are drawn
    independently, so adding images to one class does not move the others.

    Args:
        targets: class of every image; -1 stands for images of no class.
        fractions: share of each drawn part, in (0, 1), sum below 1.
        seed: the split is a pure function of `targets`, `fractions` and `seed`.

    Returns:
        `len(fractions) + 1` sorted lists of indices.
    """
    import numpy as np  # This comes late, because data sets are listed without numpy.

    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    labels = np.asarray(targets)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # Seeds are not negative: the images of no class have the last one of 32 bits.
        order = np.random.default_rng([seed, int(label) % 2**32]).permutation(members)
        left = len(order)
        for part, fraction in zip(parts, fractions, strict=False):
            minimum = 1 if len(order) > len(fractions) and fraction > 0 else 0
            take = min(max(round(fraction * len(order)), minimum), left - 1)
            part.extend(order[len(order) - left : len(order) - left + take].tolist())
            left -= take
        parts[-1].extend(order[len(order) - left :].tolist())
    return [sorted(part) for part in parts]


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
