"""Result files: refused before the work where they cannot be written, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from vimtune.text import quote
from vimtune.train.folder import OutputError
from vimtune.utils import atomic_write


def check_output(path: Path, suffixes: Iterable[str], sources: Iterable[Path]) -> None:
    """Make sure, before any work, that the result can go to `path`.

    Args:
        path: the file to write.
        suffixes: how its name may end, in lower case.
        sources: files that are read; none of them may be overwritten, whatever name it goes by.

    Raises:
        OutputError: another ending, a folder, a device or a pipe, no writable folder around it, or one of
            `sources`.
    """
    shown = quote(str(path))
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"cannot write {shown}: expected a name ending in {' or '.join(suffixes)}")
    if path.is_dir():
        raise OutputError(f"cannot write {shown}: it is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"cannot write {shown}: it is a device or a pipe; give the name of a file")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {shown}: {quote(str(folder))} is not a writable folder")
    if any(_is_same(path, source) for source in sources):
        raise OutputError(f"cannot write {shown}: it is read as input; choose another --output")


def _is_same(path: Path, source: Path) -> bool:
    """Whether both are one file, through links of either kind."""
    return path.exists() and source.exists() and path.samefile(source)


def write_output(path: Path, write: Callable[[Path], None]) -> None:
    """`atomic_write`, with the system's refusal (a full disk, say) as an `OutputError`."""
    try:
        atomic_write(path, write)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise OutputError(
            f"cannot write {quote(str(path))}: {reason}; what was there is as it was"
        ) from error
