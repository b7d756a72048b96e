"""Unpacking the archives of data sets, of which files and folders are taken and nothing else."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path

from vimtune.download import DownloadError
from vimtune.text import quote


class _UnsafeEntryError(Exception):
    """An entry of an archive that has no place among data."""


_ARCHIVE_ERRORS = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
    # An encrypted .zip, or one of an unknown method, raises RuntimeError.
    *(zipfile.BadZipFile, RuntimeError),
    _UnsafeEntryError,
)
"""What the readers of archives raise for those that are damaged, or that we refuse."""


def extract_archive(archive: Path, folder: Path, member: str) -> Path:
    """Unpack `archive` (.zip, .tar, .tar.gz, .tgz) and move its entry `member` into `folder`.

    The result appears in one step, so an interrupted unpacking is never taken for the data. Archives of data
    sets hold files and folders only, so anything else in one is refused, as is an entry outside of `folder`.

    Raises:
        DownloadError: a damaged archive, or one that is not what the data set's owner offers.
    """
    staging = folder / f".unpack-{member}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as bundle:
                for name in bundle.namelist():
                    _refuse_outside(name)
                bundle.extractall(staging)
        else:
            with tarfile.open(archive) as bundle:
                bundle.extractall(staging, filter=_files_and_folders)
        found = next((path for path in sorted(staging.rglob(member))), None)
        if found is None:
            raise DownloadError(f"{archive} has no entry {member!r}; delete it and download again.")
        target = folder / member
        os.replace(found, target)
    except _ARCHIVE_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"{archive} is damaged or not the expected archive ({reason}); delete it and download again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _files_and_folders(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    if not (member.isfile() or member.isdir()):
        raise _UnsafeEntryError(f"{quote(member.name)} is a link or device")
    _refuse_outside(member.name)
    return tarfile.data_filter(member, folder)


def _refuse_outside(name: str) -> None:
    """Refuse what the libraries would quietly move inside."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise _UnsafeEntryError(f"{quote(name)} leads outside")
