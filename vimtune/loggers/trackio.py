"""Trackio, the tracker of Hugging Face that keeps its records on this computer."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.notes import read_note, write_note
from vimtune.loggers.registry import register_logger
from vimtune.loggers.seen import Seen


@register_logger("trackio")
class Trackio(Logger):
    """A run of Trackio in the project "vimtune" or `TRACKIO_PROJECT`, called like the run folder with a few
    signs behind it, because Trackio finds runs by their names.

    It is kept below `TRACKIO_DIR`, or where `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` say.
    """

    summary = "Trackio; TRACKIO_PROJECT, TRACKIO_DIR and TRACKIO_SPACE_ID are respected"
    module = package = "trackio"

    _run: Any
    _seen: Seen

    def open(self, run: LoggedRun, known: int) -> int:
        """Begin a run of Trackio, or go on with the one that the run folder names.

        It is told of all records; which points there are already is looked up.
        """
        import trackio

        project = os.environ.get("TRACKIO_PROJECT") or "vimtune"
        note = read_note(run.folder, "trackio", r"([a-f0-9]{6})\n")
        sign = secrets.token_hex(3) if note is None else note[1]
        name = f"{run.name}-{sign}"
        self._run = trackio.init(project=project, name=name, config=dict(run.settings), resume="allow")
        if note is None:
            write_note(run.folder, "trackio", f"{sign}\n")
        self._seen = Seen({} if note is None else self._last_steps(project, name, run.curves))
        return 0

    def write(self, record: Record) -> None:
        """Add a row with the new points."""
        step = record["step"]
        if points := self._seen.new(curves(record), step):
            self._run.log({"epoch": record["epoch"], **points}, step=step)

    def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:
        """Add the scores as a row."""
        self._run.log(dict(scores), step=step)

    def close(self, error: BaseException | None) -> None:
        """Have everything written."""
        self._run.finish()

    def _last_steps(self, project: str, name: str, names: Iterable[str]) -> dict[str, int]:
        """The step of the last point of each curve; on a server, which does not tell, of the whole run."""
        if any(os.environ.get(variable) for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            return dict.fromkeys(names, self._run._next_step - 1)  # There is no public name for it.
        from trackio.sqlite_storage import SQLiteStorage

        last: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(project, name):
            for curve in names:
                if row.get(curve) is not None:
                    last[curve] = max(last.get(curve, 0), int(row["step"]))
        return last
