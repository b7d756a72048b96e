"""When the state of a run is saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.02
"""The part of a run's time that saving may take. An epoch of a small data set on a GPU is over in less time
than its state needs to reach the disk."""


class SavingTimes:
    """Spaces the states that are saved during a run, so that saving takes no more than `SHARE` of the time.

    What a crash can cost is as little: the time of about 50 saves, four seconds for an adapter of Vim-tiny.
    """

    def __init__(self) -> None:
        """Nothing was saved yet, and what it takes is not known."""
        self._took = 0.0
        self._ended = time.monotonic()
        self.is_current = True
        """Whether the saved state is that of the run; without steps there is nothing to save."""

    @property
    def is_due(self) -> bool:
        """Whether enough time has gone by since the last state was saved; the first one always is."""
        return SHARE * (time.monotonic() - self._ended) >= (1 - SHARE) * self._took

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Takes the time of the block, in which the state is saved."""
        began = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took, self.is_current = self._ended - began, True
