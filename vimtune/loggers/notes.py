"""Notes of loggers in the run folder, from which a session that goes on knows what the ones before it did."""

from __future__ import annotations

import re
from pathlib import Path

from vimtune.files import atomic_write_text
from vimtune.run_folder import writing

MOST_CHARACTERS = 200
"""Length of the longest note that is read."""


def note_path(folder: Path, logger: str) -> Path:
    """The file in a run folder that holds the note of a logger."""
    return folder / f".logger-{logger}"


def read_note(folder: Path, logger: str, pattern: str) -> re.Match[str] | None:
    """The note of a logger.

    Args:
        folder: that of the run.
        logger: whose note it is.
        pattern: regular expression of a whole note. The folder may come from somebody else, so a note of
            another form is none.

    Returns:
        The match of the pattern; None where there is no such note.
    """
    try:
        with open(note_path(folder, logger), encoding="utf-8", errors="replace") as file:
            return re.fullmatch(pattern, file.read(MOST_CHARACTERS))
    except FileNotFoundError:
        return None


def write_note(folder: Path, logger: str, text: str) -> None:
    """Write or replace the note of a logger.

    Raises:
        OutputError: it cannot be written.
    """
    path = note_path(folder, logger)
    with writing(path):
        atomic_write_text(path, text)
