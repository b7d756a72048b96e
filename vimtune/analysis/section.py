"""What an analysis gives: a section of the report. How it is written is the business of `report.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure


class NotApplicable(ValueError):
    """An analysis has nothing to say of this model or these data; the message says why."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    caption: str
    """One line above it."""
    heading: Sequence[str]
    """Titles of the columns."""
    rows: Sequence[Sequence[str]]
    """Its cells, line by line; the first of a line is its name."""


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows."""

    caption: str
    """What is to be seen, in whole sentences."""
    figure: Figure
    """The drawing."""


@dataclass(frozen=True)
class Section:
    """The result of one analysis."""

    title: str
    """Heading."""
    explanation: str
    """What was measured and by which formula, for a reader who has not seen the code."""
    findings: Sequence[str]
    """The result in a few sentences with numbers; the terminal shows these, too."""
    numbers: dict[str, Any]
    """Everything that was measured, as plain values for JSON."""
    tables: Sequence[Table] = field(default_factory=tuple)
    """In the order of the report."""
    pictures: Sequence[Picture] = field(default_factory=tuple)
    """In the order of the report, after the tables."""
