"""What stops the reading of data from outside of the run, told apart from what the run does wrong."""

from __future__ import annotations

from vimtune.text import printable, shorten


class InputError(ValueError):
    """Data cannot be read; the state of the run is fine and was saved."""


def one_line(error: Exception) -> str:
    """The message of an error.

    Of an error that a worker process sent, with its trace, it is the last line.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(printable(lines[-1] if lines[0].startswith("Caught ") else lines[0]), 400)
