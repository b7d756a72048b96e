"""Curves as a table: metrics.csv in the run folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.growing_file import GrowingFile
from vimtune.loggers.registry import register_logger


@register_logger("csv")
class Csv(Logger):
    """metrics.csv: a row for each record, and a column for each curve, empty where the record has no point.

    A session that goes on writes the file anew, from the records before it.
    """

    summary = "metrics.csv in the run folder, a column for each curve"

    _file: GrowingFile
    _columns: tuple[str, ...]

    def open(self, run: LoggedRun, known: int) -> int:
        """Begin the file with its header; it has no records yet."""
        path = run.folder / "metrics.csv"
        self._file, self._columns = GrowingFile(path, path), run.curves
        self._append(["step", "epoch", *self._columns])
        return 0

    def write(self, record: Record) -> None:
        """Add a row."""
        points = curves(record)
        self._append([record["step"], record["epoch"], *(points.get(name, "") for name in self._columns)])

    def sync(self) -> None:
        """Have the file on disk."""
        self._file.sync()

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, row: Iterable[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        self._file.append(text.getvalue().encode())
