"""How a command ends: every error is one line and an exit code, and no stream can stop the work.

What the user can mend is said as `error: ...`. Any other exception is a fault of this program; its
traceback goes to a file of its own, and the line says where.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import platform
import re
import select
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vimtune import __version__
from vimtune.problems import ProblemsError
from vimtune.text import printable, shorten

EXIT_CODES = {
    0: "done",
    1: "a check, a run of a comparison, or reading an image failed",
    2: "input or machine do not allow it; the message says what to do",
    70: "a fault of vimtune; the message names a file to report",
    130: "interrupted (Ctrl-C)",
    141: "the reader of the output has gone",
}
"""What each exit code of a command means."""

MAX_LINE = 2000
"""Characters of one line of a message; what is longer somebody else has worded."""


def prepare_streams() -> None:
    """Make stdin, stdout and stderr safe to use, whatever they are, and start the log on stderr.

    A closed stream gets the null device, so that no file is opened under its descriptor and takes what
    is printed. Characters that a stream cannot encode are written as escapes: ASCII terminals and file
    names that are not UTF-8 must not end a run.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open as the process's stream
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("vimtune")
    if not logger.handlers:
        handler = _LogHandler()
        handler.setFormatter(_OneLine("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


class _LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 takes no argument there
    """Writes to what sys.stderr is at that time, which while a progress bar runs is the lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record to the present sys.stderr."""
        self.stream = sys.stderr
        super().emit(record)


class _OneLine(logging.Formatter):
    """Notes of the package (backend chosen, weights loaded), one harmless line each."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text on one line."""
        return printable(super().format(record))


def run_guarded(action: Callable[[], int], *, show_traceback: bool) -> int:
    """Run a command and return its exit code, one of `EXIT_CODES`; no exception leaves."""
    try:
        try:
            code = action()
        except SystemExit as exit:  # argparse exits like this after --help and --version.
            code = exit.code if isinstance(exit.code, int) else 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interruption:
        if not interruption.args:  # The trainer has said how to continue.
            _print_lines("interrupted")
        return 130
    except Exception as error:
        # The pipe of a worker may break as well, which is another matter.
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 141
        if show_traceback:
            _print_lines("".join(traceback.format_exception(error)))
        if _is_out_of_memory(error):
            advice = "Lower --batch-size (and raise --grad-accum), or use --grad-checkpointing or --amp."
            _print_lines(f"error: {_message(error)} {advice}")
        elif isinstance(error, ImportError) and (cure := _unfit_environment(error)):
            _print_lines(f"error: {cure}")
        elif isinstance(error, ValueError | OSError):
            hint = "" if show_traceback or not _is_foreign(error) else " (--traceback shows where this arose)"
            _print_lines(f"error: {_message(error)}{hint}")
        else:
            _print_lines(f"error: {_report(error, show_traceback)}")
            return 70
        return 2
    finally:
        _let_go(sys.stdout)
        _let_go(sys.stderr)


def _print_lines(text: str) -> None:
    """Print to stderr, every line harmless for a terminal."""
    with contextlib.suppress(OSError):  # When stderr cannot be written either, the exit code has to do.
        print("\n".join(printable(shorten(line, MAX_LINE)) for line in text.split("\n")), file=sys.stderr)


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as after `vimtune --list | head -1`."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in pipe.poll(0))
    except (AttributeError, OSError):  # The system has no poll, or the stream no descriptor.
        return False


def _let_go(stream: Any) -> None:
    """Write out what `stream` still holds, or drop it: it would fail again when Python ends."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {shorten(str(error.filename))}" if error.filename else error.strerror
    message = str(error) or type(error).__name__
    if isinstance(error, ProblemsError):
        return message
    return " ".join(line.strip() for line in message.split("\n"))


def _is_out_of_memory(error: Exception) -> bool:
    # torch is not imported here, so its exceptions are known by name and by what they say.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _unfit_environment(error: ImportError) -> str | None:
    """What to do about a failed import that the packages installed are to blame for, not this one's code."""
    return _missing_dependency(error) or _broken_package(error)


def _broken_package(error: ImportError) -> str | None:
    """What to do where a package is there but cannot be imported: something it needs is missing or unfit."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules if not name.startswith("importlib.")]
    package = packages[-1] if packages else "vimtune"
    if package == "vimtune" or package not in importlib.metadata.packages_distributions():
        return None
    return (
        f"the package {package} is installed but cannot be used: {_message(error)}. Install what it "
        f"needs, or {package} itself anew (pip install --upgrade {package}); --traceback shows what asked "
        "for it"
    )


def _missing_dependency(error: ImportError) -> str | None:
    """What to do where a package that this one depends on was left out, as a service may do."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    try:
        demands = [line for line in importlib.metadata.requires("vimtune") or () if "extra ==" not in line]
    except importlib.metadata.PackageNotFoundError:  # The source is used as it lies there.
        return None
    if not any(re.match(rf"{re.escape(package)}\b(?!-)", line) for line in demands):
        return None
    return (
        f"the package {package} is not installed; predicting does without it, this command does not. "
        f"Install it (pip install {package}), or vimtune with all that it needs (pip install vimtune, "
        "or pip install -e . in its repository)"
    )


def _is_foreign(error: Exception) -> bool:
    """Whether another package worded this error: then it may need its context."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _report(error: Exception, traceback_was_shown: bool) -> str:
    """The line about a fault of ours, after its traceback was saved."""
    what = f"{type(error).__name__}: {_message(error)}"
    sorry = "This looks like a fault of vimtune, not of your input; please report it with"
    if traceback_was_shown:
        return f"{what}. {sorry} the traceback above"
    try:
        handle, path = tempfile.mkstemp(prefix="vimtune-fault-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            print(f"vimtune {__version__}, Python {platform.python_version()}", file=file)
            print(f"{platform.platform()}\n", file=file)
            traceback.print_exception(error, file=file)
    except OSError:  # There is no room for a file, so it has to be shown here.
        _print_lines("".join(traceback.format_exception(error)))
        return f"{what}. {sorry} the traceback above"
    return f"{what}. {sorry} the file {path} (--traceback shows it here)"
