"""metrics.jsonl, which every run has and from which other loggers are brought up to date."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from vimtune.loggers.base import LoggedRun, Logger, Record
from vimtune.loggers.growing_file import GrowingFile
from vimtune.loggers.registry import register_logger
from vimtune.run_folder import RunFolder


@register_logger("jsonl")
class JsonLines(Logger):
    """metrics.jsonl: one JSON object per line.

    Records of `kind` "step" tell of one optimizer step: `step`, `epoch`, `loss` (a mean over what the step
    counts), `lr`, `grad_norm` and the speed, called after the unit of the task: `images_per_second`. Records
    of `kind` "epoch" tell of a whole epoch: `epoch`, `step` (its last one), `lr`, `train_loss`, the speed,
    and where it was evaluated `split` and that split's `loss` and scores, such as `top1` and `top5` (percent;
    `top5` is null for five classes or fewer). Where a callback ends the run after an epoch that was not
    evaluated, a record of `kind` "evaluation" follows: `epoch`, `step`, `split`, `loss` and scores. A number
    that is not finite is null, such as the gradient norm of a step that fp16 skips.

    What was written after the state from which a run goes on is dropped, because the run is about to write
    the same lines again.
    """

    summary = "metrics.jsonl in the run folder; every run has it, also without being asked"

    _file: GrowingFile

    def open(self, run: LoggedRun, known: int) -> int:
        """Open the file and drop what is to be written again; returns how many records stay."""
        path = RunFolder(run.folder).metrics
        self._file = GrowingFile(path, path, run.kept_bytes)
        with open(path, "rb") as lines:
            return sum(1 for _ in lines)

    @property
    def length(self) -> int:
        """The length of the file in bytes."""
        return self._file.length

    def records(self, first: int) -> Iterator[Record]:
        """The records from number `first` on, counted from 0.

        Raises:
            ValueError: the file has a line that is none, such as one that somebody has changed.
        """
        from vimtune.schema import load_json

        with open(self._file.path, encoding="utf-8", errors="replace") as lines:
            for number, line in islice(enumerate(lines, 1), first, None):
                what = f"{self._file.path}, line {number}"
                record = load_json(dict[str, Any], line, what)
                if record.get("kind") not in ("step", "epoch", "evaluation") or not _is_plain(record):
                    raise ValueError(f"{what} is no record of a run: put the file back, or remove it")
                yield record

    def write(self, record: Record) -> None:
        """Add a line."""
        from vimtune.schema import finite_json

        self._file.append((finite_json(record) + "\n").encode())

    def sync(self) -> None:
        """Have the file on disk."""
        self._file.sync()

    def close(self, error: BaseException | None) -> None:
        """Close the file."""
        self._file.close()


def _is_plain(record: Record) -> bool:
    """Whether a record of a file has the numbers of one, and nothing but plain values."""
    counts = all(isinstance(record.get(name), int) and record[name] >= 0 for name in ("step", "epoch"))
    text = {"kind", "split"}
    return counts and all(
        isinstance(value, str) if name in text else isinstance(value, int | float | None)
        for name, value in record.items()
    )
