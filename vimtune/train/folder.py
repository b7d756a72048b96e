"""The run folder: what lies where, and one clear message when it cannot be written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError


class OutputError(ValueError):
    """A result could not be written (disk full, no permission, ...). Earlier files are intact."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The best adapter so far."""
        return self.path / "adapter.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The last state of the run, to continue from."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def learning_curve(self) -> Path:
        return self.path / "learning_curve.png"

    @property
    def confusion_matrix(self) -> Path:
        return self.path / "confusion_matrix.png"

    @property
    def confusion_table(self) -> Path:
        """The counts that the picture of the confusion matrix shows."""
        return self.path / "confusion_matrix.csv"

    def reported_epochs(self) -> int | None:
        """Length of the run that report.json tells of; None without a readable report."""
        try:
            return json.loads(self.report.read_text(encoding="utf-8")).get("epochs")
        except (OSError, ValueError):
            return None


def unused_path(path: Path) -> Path:
    """The first of path, path-2, path-3, ... that does not exist."""
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.name}-{number}")
        number += 1
    return free


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check the folder and its permissions"
        raise OutputError(
            f"cannot write {os.fspath(path)}: {reason}. Files written before are intact; {advice}, "
            f"then continue with --resume {Path(path).parent} if it holds a checkpoint"
        ) from error
