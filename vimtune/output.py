"""Result files: refused before the work where they cannot be written, and written whole or not at all.

One rule holds for all commands and functions: a file that was named for a result is replaced, as compilers
and torch.save do, unless it is no result (`check_output`); a folder has to be new or empty (`write_folder`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from vimtune.files import WRITING_ERRORS, OutputError, atomic_write, refusal, usual_mode
from vimtune.parsers import given_path
from vimtune.run_folder import RunFolder
from vimtune.text import quote
from vimtune.weight_files import WEIGHTS

Result = TypeVar("Result")
"""What is kept in a file."""


def check_output(path: Path, suffixes: Iterable[str], sources: Iterable[Path]) -> None:
    """Make sure, before any work, that the result can go to `path`.

    An earlier result of that name is replaced in the end, so that a command can be given again. What is no
    result is not: what was read, and what a run has trained.

    Args:
        path: the file to write.
        suffixes: how its name may end, in lower case.
        sources: files that are read; none of them may be overwritten, whatever name it goes by.

    Raises:
        OutputError: another ending, a folder, a device or a pipe, no writable folder around it, one of
            `sources`, or a file of a run.
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
        where = f"{quote(str(folder))} is not a writable folder"
        raise OutputError(f"cannot write {shown}: {where}; choose another --output")
    if any(_is_same(path, source) for source in sources):
        raise OutputError(f"cannot write {shown}: it is read as input; choose another --output")
    run = RunFolder(folder)
    if run.recipe.is_file() and any(own.name == path.name or _is_same(path, own) for own in run.kept):
        raise OutputError(
            f"cannot write {shown}: the run in {quote(str(folder))} keeps a file of its own by this name, "
            "which is no result of a command; choose another --output"
        )


def _is_same(path: Path, source: Path) -> bool:
    """Whether both are one file, through links of either kind."""
    return path.exists() and source.exists() and path.samefile(source)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: `write` fills another one beside it, which then takes its name.

    Args:
        path: a folder that is empty or not there yet.
        write: fills the folder that it is given. Its files get the rights of any other new file.

    Raises:
        OutputError: something is there already, the name is that of a file of weights, or the system refuses.
    """
    shown = quote(str(path))
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"cannot write {shown}: it is there already; give the name of a new folder")
    if path.suffix.lower() in WEIGHTS and not path.exists():  # Whoever gives such a name expects a file.
        raise OutputError(
            f"cannot write {shown}: a folder with several files is made; give it a name without {path.suffix}"
        )
    around = path.absolute().parent
    if not around.is_dir() or not os.access(around, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {shown}: {quote(str(around))} is not a writable folder")
    try:
        with tempfile.TemporaryDirectory(dir=around, prefix=f".{path.name}.") as temporary:
            filled = Path(temporary) / "filled"
            filled.mkdir()
            write(filled)
            for file in (each for each in filled.rglob("*") if each.is_file()):
                file.chmod(usual_mode())  # Some libraries, such as safetensors, make private files.
            if path.exists():
                path.rmdir()  # It is empty; Windows renames nothing to a name that is there.
            filled.replace(path)
    except WRITING_ERRORS as error:
        raise OutputError(f"cannot write {shown}: {refusal(error)}; nothing was written") from error


def write_output(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file with `atomic_write`.

    Raises:
        OutputError: the system refuses, because the disk is full for example. What was there is as it was.
    """
    try:
        atomic_write(path, write)
    except WRITING_ERRORS as error:
        raise OutputError(
            f"cannot write {quote(str(path))}: {refusal(error)}; what was there is as it was"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that has this content.

    Raises:
        OutputError: as `write_output`.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_output(path, write)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8; a byte of a path in it that is not UTF-8 is written as \\udcXX.

    Raises:
        OutputError: as `write_output`.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def save_as(
    path: str | os.PathLike[str], formats: Mapping[str, Callable[[Result], str]], result: Result
) -> None:
    """Write a result in the format that the ending of a name asks for.

    Args:
        path: the file to write.
        formats: ending in lower case -> what makes the text of such a file.
        result: what is written.

    Raises:
        OutputError: another ending, or a file that cannot be written.
    """
    file = given_path("path", path, "the file to write", OutputError)
    check_output(file, formats, [])
    write_text(file, formats[file.suffix.lower()](result))
