"""What a run records while it goes: metrics.jsonl and TensorBoard's event file.

Both grow by whole records. A full disk ends the run where it meets it, with everything written
before intact; torch's SummaryWriter would meet it in a thread of its own, later, and lose what it held.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from vimtune.schema import finite_json
from vimtune.text import printable
from vimtune.training.folder import RunFolder, writing


class _GrowingFile:
    """A file that grows by whole records.

    `within` is the path that a message about it names; `keep_bytes` what stays of an existing file.
    """

    def __init__(self, path: Path, within: Path, keep_bytes: int = 0) -> None:
        self._within = within
        with writing(within):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
            self._file.truncate(min(keep_bytes, self._file.tell()))

    def append(self, record: bytes) -> None:
        """Write `record`, all of it or nothing.

        Raises:
            OutputError: it cannot be written.
        """
        rest = memoryview(record)
        length = os.fstat(self._file.fileno()).st_size
        with writing(self._within):
            try:
                while rest:  # a full disk may take a part before it refuses the rest
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(length)
                raise

    def sync(self) -> int:
        """Have everything on disk and return the length in bytes."""
        with writing(self._within):
            os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog(_GrowingFile):
    """metrics.jsonl: one JSON object per line.

    Records of `kind` "step" tell of one optimizer step: `step`, `epoch`, `loss` (a mean over what the step
    counts), `lr`, `grad_norm` and the speed, called after the unit of the task: `images_per_second`. Records
    of `kind` "epoch" tell of a whole epoch: `epoch`, `step` (its last one), `lr`, `train_loss`, the speed,
    and where it was evaluated `split` and that split's `loss` and scores, such as `top1` and `top5` (percent;
    `top5` is null for five classes or fewer). A number that is not finite is null, such as the gradient norm
    of a step that fp16 skips.

    `keep_bytes` is the length at the checkpoint that the run continues from; what was written after
    it is dropped, because the run is about to write the same lines again.
    """

    def __init__(self, folder: RunFolder, keep_bytes: int = 0) -> None:
        super().__init__(folder.metrics, folder.metrics, keep_bytes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line."""
        self.append((finite_json(record) + "\n").encode())


class EventLog(_GrowingFile):
    """TensorBoard's event file of one session of a run.

    `Tracker` writes the curves `train/loss`, `train/lr`, `train/grad_norm` and `train/images_per_second` (or
    another unit) of the steps, `train/epoch_loss` of the epochs, and `<split>/loss`, `<split>/top1` and the
    other scores of the evaluations; all over optimizer steps. A session that goes on after `first_step`, or
    starts over, hides the later events of the sessions
    before it: the run is about to write them again.
    """

    def __init__(self, folder: RunFolder, first_step: int = 0) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(folder.tensorboard / name, folder.tensorboard)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write_scalars(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Add a point to the curve of each tag; None is left out."""
        values = [
            Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if value is not None
        ]
        self._write(step=step, summary=Summary(value=values))

    def write_result(
        self, settings: Mapping[str, Any], scores: Mapping[str, float | None], step: int
    ) -> None:
        """Add the run to TensorBoard's table of hyperparameters."""
        plain = {
            name: value if isinstance(value, int | float | None) else printable(str(value))
            for name, value in settings.items()
        }
        known = {tag: score for tag, score in scores.items() if score is not None}
        for summary in hparams(plain, known):
            self._write(summary=summary)
        self.write_scalars(scores, step)

    def _write(self, **fields: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self.append(record.getvalue())
