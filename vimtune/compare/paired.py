"""Differences between two methods, run by run: what a seed does to both of them drops out.

Runs of two methods on one data set are a pair if they have the same seed and the same data seed. The
difference on the data set is the mean over the n pairs, and its standard error is their standard deviation
(n - 1) divided by the root of n. Over K data sets the difference is the mean of those of the data sets, and
its error the root of the sum of the squares of theirs, divided by K: the data sets are those that they are,
and the seeds are drawn. What another draw of test images would change is no part of these errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from vimtune.compare.results import Row


@dataclass(frozen=True)
class Difference:
    """The most important score of a method minus that of another one."""

    method: str
    """Name of the method."""
    against: str
    """Name of the other one."""
    data: str | None
    """Name of the data set; None for the mean over all of them."""
    pairs: int
    """How many pairs of runs there are."""
    mean: float
    """The difference, in points where the score is percent."""
    error: float | None
    """Its standard error; None where a data set has one pair of runs."""

    def show(self, digits: int) -> str:
        """Difference and standard error, as "+0.42 ± 0.15"."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:+.{digits}f}{error}"


def difference(row: Row, other: Row) -> Difference | None:
    """The difference of two methods on a data set; None where they have no runs with the same seeds, or
    scores of other splits or kinds."""
    if not row.results or not other.results or (row.split, row.scores) != (other.split, other.scores):
        return None
    name = row.scores[0].name
    own, others = (
        {(result.seed, result.data_seed): result.scores.get(name) for result in each.results}
        for each in (row, other)
    )
    scores = [(own[seeds], others[seeds]) for seeds in own if seeds in others]
    values = [ours - theirs for ours, theirs in scores if ours is not None and theirs is not None]
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(row.method, other.method, row.data, len(values), statistics.mean(values), error)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of the differences of two methods on several data sets."""
    first, count = differences[0], len(differences)
    errors = [each.error for each in differences if each.error is not None]
    return Difference(
        first.method,
        first.against,
        None,
        sum(each.pairs for each in differences),
        statistics.mean(each.mean for each in differences),
        math.sqrt(sum(error**2 for error in errors)) / count if len(errors) == count else None,
    )


def all_differences(rows: Sequence[Row]) -> Iterator[Difference]:
    """Those of each method with each that stands before it."""
    for against, method in combinations(dict.fromkeys(row.method for row in rows), 2):
        yield from differences_of(rows, method, against)


def differences_from(rows: Sequence[Row], reference: str) -> list[Difference]:
    """Those of all other methods with one of them, in the order of the methods."""
    methods = dict.fromkeys(row.method for row in rows if row.method != reference)
    return [each for method in methods for each in differences_of(rows, method, reference)]


def differences_of(rows: Sequence[Row], method: str, against: str) -> list[Difference]:
    """Those of two methods: on every data set that both have, and the mean over all data sets where these are
    several, both have all of them, and one score goes for all."""
    own, others = ({row.data: row for row in rows if row.method == name} for name in (method, against))
    pairs = [(row, others[data]) for data, row in own.items() if data in others]
    found = [each for pair in pairs if (each := difference(*pair)) is not None]
    whole = len(found) == len({row.data for row in rows}) > 1
    one_score = len({row.scores[0] for row, _ in pairs}) == 1
    return [*found, mean_difference(found)] if whole and one_score else found
