"""The hand that gives the records of a run to its loggers (`vimtune.loggers`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from vimtune.files import OutputError
from vimtune.loggers import LOGGERS, LoggedRun, Logger, Record
from vimtune.loggers.jsonl import JsonLines
from vimtune.recipe import Recipe
from vimtune.schema import finite_or_none
from vimtune.text import printable, shorten
from vimtune.training.identity import HARMLESS

NOT_COMPARED = frozenset(HARMLESS) - {"checkpoint", "pretrained"}
"""Settings without influence on the scores, which loggers and their tables of runs leave out."""
MAX_REASON = 400
"""Characters of somebody's error message that a warning repeats."""


def compared_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings by which runs are compared. They name no folders of this computer, because loggers may
    pass them on."""
    return {name: value for name, value in recipe.to_share().items() if name not in NOT_COMPARED}


class Logs:
    """The loggers of a run. In processes other than the main one there are none, and nothing happens.

    It is a context manager, whose end closes the loggers and tells them of the error that ended the run.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        """No logger yet; `warn` is told of those that fail."""
        self._warn = warn
        self._lines: JsonLines | None = None
        self._open: dict[str, Logger] = {}
        self._has: dict[str, int] = {}
        """How many records each logger has already, from the first one of the run on."""
        self._count = 0
        """How many records the run has."""
        self._run: LoggedRun | None = None

    def open(self, names: Iterable[str], run: LoggedRun) -> None:
        """Open metrics.jsonl and the loggers called `names`, and bring those up to date.

        Raises:
            ValueError: one of them cannot be opened; the message says which and why.
            OutputError: a file cannot be written.
        """
        self._run, self._lines = run, JsonLines()
        self._open["jsonl"] = self._lines
        self._count = self._has["jsonl"] = self._lines.open(run, 0)
        for name in names:
            if name in self._open:
                continue
            logger = LOGGERS.get(name)()
            try:
                self._has[name] = logger.open(run, self._count)
            except ValueError:
                raise
            except Exception as error:  # Services and their clients have many of their own.
                raise ValueError(
                    f"logger {name} cannot be opened ({_reason(error)}): see its documentation, or leave it "
                    "out of --logger"
                ) from error
            self._open[name] = logger
            self._catch_up(name)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Give a record of a kind to all loggers; see `vimtune.loggers.jsonl`.

        Raises:
            OutputError: a file cannot be written.
        """
        if self._lines is None:
            return
        plain = finite_or_none({"kind": kind, **record})
        for name in list(self._open):
            if self._count >= self._has[name]:
                self._write(name, plain)
        self._count += 1

    def write_result(self, scores: Mapping[str, float | None], step: int) -> None:
        """Give the scores of the finished run to all loggers.

        Raises:
            OutputError: a file cannot be written.
        """
        run = self._run
        if run is None:
            return
        known = {name: score for name, score in finite_or_none(dict(scores)).items() if score is not None}
        for name in list(self._open):
            self._try(name, lambda logger: logger.write_result(run, known, step))

    def sync(self) -> int:
        """Have all records on disk where loggers keep files; gives the length of metrics.jsonl in bytes.

        Raises:
            OutputError: a file cannot be written.
        """
        if self._lines is None:
            return 0
        for name in list(self._open):
            self._try(name, lambda logger: logger.sync())
        return self._lines.length

    def close(self, error: BaseException | None = None) -> None:
        """Close the loggers; closing again does nothing."""
        while self._open:
            name = next(iter(self._open))
            self._try(name, lambda logger: logger.close(error))
            self._open.pop(name, None)
        self._lines = self._run = None

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def _catch_up(self, name: str) -> None:
        """Tell a logger of the records of the run that it does not have."""
        assert self._lines is not None, "it is opened first"
        if self._has[name] < self._count:
            for record in self._lines.records(self._has[name]):
                self._write(name, record)

    def _write(self, name: str, record: Record) -> None:
        self._try(name, lambda logger: logger.write(record))

    def _try(self, name: str, action: Callable[[Logger], None]) -> None:
        """Have a logger do something, and leave it out from here on if it fails."""
        if name not in self._open:
            return
        try:
            action(self._open[name])
        except OutputError:
            raise
        except Exception as error:  # A service that cannot be reached does not cost a run.
            del self._open[name]
            self._warn(
                f"logger {name} failed and is told nothing more ({_reason(error)}); metrics.jsonl has all "
                "records, from which a resumed run brings it up to date"
            )


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {shorten(printable(' '.join(str(error).split())), MAX_REASON)}"
