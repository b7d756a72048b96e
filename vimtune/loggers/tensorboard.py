"""TensorBoard's event files, in the folder tensorboard/ of the run."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record, curves
from vimtune.loggers.growing_file import GrowingFile
from vimtune.loggers.notes import read_note, write_note
from vimtune.loggers.registry import register_logger
from vimtune.run_folder import RunFolder
from vimtune.text import printable

_NOTE = r"(?P<records>\d{1,15}) records, step (?P<step>\d{1,15})\n"
"""How many records the event files have, and the step of the last one."""


@register_logger("tensorboard")
class TensorBoard(Logger):
    """TensorBoard's event files, one for each session of a run, with all curves and the table of settings.

    A session that goes on, or starts over, hides the later events of the sessions before it: the run is about
    to write them again. A note says up to where the files go, since there may have been sessions without this
    logger. Torch's SummaryWriter does not write the files, because it would meet a full disk in a thread of
    its own, later, and lose what it held.
    """

    summary = "curves and the table of runs in tensorboard/ of the run folder"
    module = package = "tensorboard"

    _file: GrowingFile
    _folder: Path
    _records: int
    _step: int

    def open(self, run: LoggedRun, known: int) -> int:
        """Begin the file of this session; returns how many records those of the sessions before it have."""
        # This comes late, because loggers are listed without their packages.
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder = RunFolder(run.folder).tensorboard
        follows = folder.is_dir() and any(folder.iterdir())
        self._folder, self._records, self._step = run.folder, known if follows else 0, run.first_step
        note = read_note(run.folder, "tensorboard", _NOTE)
        if follows and note is not None and int(note["records"]) < known:
            self._records, self._step = int(note["records"]), int(note["step"])
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = GrowingFile(folder / name, folder)
        self._write(file_version="brain.Event:2")
        if follows:
            self._write(step=self._step + 1, session_log=SessionLog(status=SessionLog.START))
        return self._records

    def write(self, record: Record) -> None:
        """Add a point to each curve."""
        self._write_points(curves(record), record["step"])
        self._records, self._step = self._records + 1, record["step"]

    def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:
        """Add the run to the table of hyperparameters."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, int | float | None) else printable(str(value))
            for name, value in run.settings.items()
        }
        for summary in hparams(plain, dict(scores)):
            self._write(summary=summary)
        self._write_points(scores, step)

    def sync(self) -> None:
        """Have the file on disk, and note how far it goes."""
        self._file.sync()
        write_note(self._folder, "tensorboard", f"{self._records} records, step {self._step}\n")

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._file.close()

    def _write_points(self, points: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in points.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(record.getvalue())
