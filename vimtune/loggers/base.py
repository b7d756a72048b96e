"""What a logger is: a place that is told of every record of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

Record = Mapping[str, Any]
"""A line of metrics.jsonl, see `vimtune.loggers.jsonl`: numbers, and None for one that is not finite."""

_PLACES = ("kind", "step", "epoch")
"""What says of which moment a record tells."""


def curves(record: Record) -> dict[str, float]:
    """The points that a record adds to curves over optimizer steps: names of the curves -> values.

    Steps give `train/loss`, `train/lr`, `train/grad_norm` and the speed, `train/images_per_second` or another
    unit; epochs `train/epoch_loss`, and where they were evaluated `<split>/loss` and a curve for each score,
    such as `<split>/top1`. None is no point.
    """
    if record["kind"] == "step":
        points = {f"train/{name}": value for name, value in record.items() if name not in _PLACES}
    else:
        points = {"train/epoch_loss": record.get("train_loss")}
        if split := record.get("split"):
            known = (*_PLACES, "split", "lr", "train_loss")
            points |= {
                f"{split}/{name}": value
                for name, value in record.items()
                if name not in known and not name.endswith("_per_second")
            }
    return {name: float(value) for name, value in points.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """What a logger has to know of a run."""

    folder: Path
    """The run folder. A logger may keep files of its own there."""
    settings: Mapping[str, Any]
    """The settings of the run that decide its result: plain values, and no folders of this computer."""
    unit: str
    """What the run counts, in the plural, such as "images"."""
    splits: tuple[str, ...]
    """The splits that are evaluated after epochs."""
    scores: tuple[str, ...]
    """Names of the scores of an evaluation besides the loss."""
    first_step: int
    """Number of optimizer steps that were done before this session of the run."""
    kept_bytes: int
    """What stays of metrics.jsonl: its length when the state was saved from which this session goes on."""

    @property
    def name(self) -> str:
        """What the run is called: the name of its folder."""
        return self.folder.absolute().name

    @property
    def curves(self) -> tuple[str, ...]:
        """The names of all curves that `curves` may give for its records."""
        steps = ("loss", "lr", "grad_norm", f"{self.unit}_per_second")
        return (
            *(f"train/{name}" for name in steps),
            "train/epoch_loss",
            *(f"{split}/{name}" for split in self.splits for name in ("loss", *self.scores)),
        )


class Logger(ABC):
    """A place that is told of every record of a run, in the main process alone.

    A subclass is registered with `register_logger`. It is made without arguments, opened once, and closed
    however the run ends. What it does with the records:

    - Of a run that goes on it still has those before. So `open` says how many of the records it has
      already, and is then told of the others, which metrics.jsonl has. Records that were written after the
      saved state are written again, and the same as before; `write` is not told of those that it has.
    - An `OutputError` ends the run where it is raised, as a full disk does. Anything else that `write` or
      `sync` raise is a warning, and the logger is left out for the rest of the session: a service that cannot
      be reached does not cost a run.

    Attributes:
        summary: one line for tables.
        module: the module that it imports, if that does not come with vimtune.
        package: the distribution that has this module.
    """

    summary: ClassVar[str] = ""
    module: ClassVar[str | None] = None
    package: ClassVar[str | None] = None

    @abstractmethod
    def open(self, run: LoggedRun, known: int) -> int:
        """Open the log of a run, which may have been opened before.

        Args:
            run: which run.
            known: how many records the run has so far.

        Returns:
            How many of them, and of those that follow, the log has already, from the first one on.

        Raises:
            ValueError: it cannot be opened; the message says why.
        """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take the next record."""

    def write_result(self, run: LoggedRun, scores: Mapping[str, float], step: int) -> None:  # noqa: B027
        """Take the scores of the finished run, such as `final/test_top1`, reached after `step` steps."""

    def sync(self) -> None:  # noqa: B027 - most have nothing to do
        """Have on disk what belongs to the state that is about to be saved."""

    @abstractmethod
    def close(self, error: BaseException | None) -> None:
        """Close the log; `error` is what ended the run, if it did not end by itself."""
