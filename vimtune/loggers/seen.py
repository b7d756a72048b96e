"""Points that a service has already."""

from __future__ import annotations

from collections.abc import Mapping


class Seen:
    """The step of the last point of each curve that a service has.

    Such a service is told of all records again, and gets the points that come later: curves begin and end at
    different records, so a number of records would not say what it has.
    """

    def __init__(self, last: Mapping[str, int]) -> None:
        """`last` has the step of the last point of each curve of which there are some."""
        self._last = dict(last)

    def new(self, points: Mapping[str, float], step: int) -> dict[str, float]:
        """Those of the points of a step that the service does not have yet."""
        return {name: value for name, value in points.items() if step > self._last.get(name, -1)}
