"""Which run of a comparison comes next, and which learning rate the finished ones choose."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from vimtune.compare.plan import Cell, Plan
from vimtune.compare.results import Row
from vimtune.training.result import Result


@dataclass
class Schedule:
    """Where a comparison stands.

    As soon as the learning rate of a method on a data set is known, its other runs come before everything
    else, so that a comparison that is stopped has whole rows.
    """

    plan: Plan
    """What is compared."""
    done: dict[Cell, Result] = field(default_factory=dict)
    """The finished runs."""
    failed: dict[Cell, str] = field(default_factory=dict)
    """Why runs failed."""
    running: set[Cell] = field(default_factory=set)
    """The runs that have been started and have not ended."""
    _chosen: dict[tuple[str, str], float] = field(default_factory=dict)
    """The learning rates that are known: runs that are over do not change them any more."""

    def next(self) -> Cell | None:
        """The next run to be started; None if there is none at present."""
        return next(self.startable(), None)

    def startable(self) -> Iterator[Cell]:
        """The runs that can be started at present, in their order; some may come twice."""
        known = self.done.keys() | self.failed.keys() | self.running
        return (cell for cell in self._cells() if cell not in known)

    def _cells(self) -> Iterator[Cell]:
        """The runs that can be made with what is known now."""
        for method, data in self.plan.pairs:
            lr = self.chosen(method, data)
            if lr is not None:
                yield from self.plan.cells(method, data, lr)
        for method, data in self.plan.pairs:
            yield from self._grid(method, data)

    def _grid(self, method: str, data: str) -> list[Cell]:
        """The runs that choose the learning rate."""
        columns = (self.plan.choosing_cells(method, data, lr) for lr in self.plan.rates(method, data))
        return [cell for row in zip(*columns, strict=True) for cell in row]

    def chosen(self, method: str, data: str) -> float | None:
        """The learning rate of a method on a data set; None as long as runs that choose it are not over.

        One at which a run has failed is out, unless it is the only one.
        """
        lr = self._chosen.get((method, data))
        if lr is None and (lr := self._choose(method, data)) is not None:
            self._chosen[method, data] = lr
        return lr

    def _choose(self, method: str, data: str) -> float | None:
        """The learning rate that the runs choose which are over by now."""
        rates = self.plan.rates(method, data)
        if len(rates) == 1:
            return rates[0]
        if any(cell not in self.done and cell not in self.failed for cell in self._grid(method, data)):
            return None
        ranks = {}
        for lr in rates:
            cells = self.plan.choosing_cells(method, data, lr)
            if all(cell in self.done for cell in cells):
                parts = zip(*(self.done[cell].rank for cell in cells), strict=True)
                ranks[lr] = tuple(statistics.mean(part) for part in parts)
        return max(ranks, key=ranks.__getitem__) if ranks else None

    @property
    def total(self) -> int:
        """How many runs the whole comparison has."""
        plan = self.plan
        others = len(plan.options.seeds) * len(plan.data_seeds) - len(plan.lr_seeds)
        return sum(len(self._grid(*pair)) + others for pair in plan.pairs)

    def rows(self) -> list[Row]:
        """A row for each method on each data set, with what there is of it."""
        return [self._row(method, data) for method, data in self.plan.pairs]

    def _row(self, method: str, data: str) -> Row:
        lr, rates = self.chosen(method, data), self.plan.rates(method, data)
        cells = self.plan.cells(method, data, rates[0] if lr is None else lr)
        found = () if lr is None else tuple(self.done[cell] for cell in cells if cell in self.done)
        published = (self.plan.options.published or {}).get(method, {}).get(data)
        others = tuple(
            self.done[cell] for cell in self._grid(method, data) if cell.lr != lr and cell in self.done
        )
        return Row(method, data, found, lr, len(cells) - len(found), len(rates), published, others)
