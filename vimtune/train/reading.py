"""What stops the reading of images from outside of the run, told apart from what the run does wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vimtune.data import CorruptImageError, DatasetError, TooManyCorruptError
from vimtune.text import printable, shorten
from vimtune.train.prefetch import Batch


class InputError(ValueError):
    """Images cannot be read; the state of the run is fine and was saved."""


def reading(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        InputError: a file or the system refuses to be read, or a process that reads has died.
        TooManyCorruptError: what was trained since the last state is not worth a new one.
    """
    try:
        yield from batches
    except TooManyCorruptError:
        raise
    except (CorruptImageError, DatasetError, OSError) as error:
        raise InputError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """The message; of an error that a worker process sent, with its trace, the last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shorten(printable(lines[-1] if lines[0].startswith("Caught ") else lines[0]), 400)
