"""Files: read up to a length, and replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vimtune.text import quote

_TEMPORARY = ".vimtune-tmp"
"""Ending of the files that are being written, by which those that a crash has left are found."""


class OutputError(ValueError):
    """A result could not be written (disk full, no permission, ...). Earlier files are intact."""


WRITING_ERRORS = (OSError, SafetensorError)
"""What is raised when the system refuses to write a file, by Python and by safetensors."""


def refusal(error: BaseException) -> str:
    """The system's own words for one of `WRITING_ERRORS`, if possible without the name of the file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_regular_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    A pipe or a device is never opened: reading it could wait or go on for ever.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is a folder, a pipe or a device, too long, or its name cannot be a path.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{quote(os.fspath(path))} is not a regular file")
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{quote(os.fspath(path))} is longer than {limit:,} bytes, more than is read")
    return content


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[Path], None], mode: int | None = None
) -> None:
    """Call `write(temporary)` and move the finished file to `path` in one step.

    The temporary file lies in the same folder, is flushed to disk before the move and removed
    when anything fails, so `path` holds either the old content or the whole new one - also after
    a SIGKILL or a full disk. The file has the rights of `mode`; by default those of any other new file.
    What a killed process leaves is found by `remove_temporaries`.

    Raises:
        OSError: `path` is a device or a pipe, which the move would replace, or the system refuses to write.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):  # The system itself refuses a folder.
        raise FileExistsError(errno.EEXIST, "it is a device or a pipe, no regular file", os.fspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "r+b") as file:  # Windows flushes only files that may be written.
            os.fsync(file.fileno())
        os.chmod(temporary, usual_mode() if mode is None else mode)  # mkstemp makes private files.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def usual_mode() -> int:
    """The rights of new files, which the umask of the process decides."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that has this content, with `atomic_write`.

    Raises:
        OSError: as `atomic_write`.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    atomic_write(path, write)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text in UTF-8, with `atomic_write`; a byte of a path in it that is not UTF-8 becomes \\udcXX.

    Raises:
        OSError: as `atomic_write`.
    """
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def without_empty_folders(path: Path) -> Iterator[None]:
    """Remove, at the end of a block, what it has made of `path` and the folders around it and left empty."""
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # It is not empty, or was not made.
                folder.rmdir()


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` calls that were killed, and no file of anybody else."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)
