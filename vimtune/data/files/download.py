"""Downloads that verify checksums and resume after an interruption."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from vimtune.data.errors import DatasetError
from vimtune.text import quote

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
"""Bytes that are read from the network at a time."""
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
"""What `urllib` raises when a connection fails or breaks off, after which another try may succeed."""


class DownloadError(DatasetError):
    """A file could not be fetched or is not the expected one."""


class _UnsafeEntryError(Exception):
    """An entry of an archive that has no place among data."""


_ARCHIVE_ERRORS = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError),
    # An encrypted .zip, or one of an unknown method, raises RuntimeError.
    *(zipfile.BadZipFile, RuntimeError),
    _UnsafeEntryError,
)
"""What the readers of archives raise for those that are damaged, or that we refuse."""


def md5_of(path: Path) -> str:
    """Hexadecimal MD5 of a file's content."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_file(
    url: str, path: Path, md5: str, *, timeout: float = 30.0, attempts: int = 3, pause: float = 1.0
) -> Path:
    """Fetch `url` to `path` and verify its MD5.

    Bytes go to `<path>.part`; a later call (or attempt) asks the server for the rest only. `path`
    appears when the whole file is there and verified. An existing verified file is kept.

    Args:
        timeout: seconds without an answer before an attempt fails.
        attempts: tries before giving up; `pause` seconds between them, doubled each time.

    Raises:
        DownloadError: no connection, or the content has another checksum.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and md5_of(path) == md5:
        return path
    part = path.with_name(path.name + ".part")
    failure: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _fetch(url, part, timeout)
        except _NETWORK_ERRORS as error:
            failure = error
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
        else:
            actual = md5_of(part)
            if actual != md5:
                part.unlink()
                raise DownloadError(
                    f"{url} has MD5 {actual}, expected {md5}: the file on the server changed or was damaged "
                    f"on the way. Nothing was kept; try again or fetch the file by hand to {path}."
                )
            os.replace(part, path)
            return path
    kept = f" {part.stat().st_size} bytes are kept; running again resumes." if part.exists() else ""
    raise DownloadError(f"cannot download {url}: {_reason(failure)}.{kept}")


def _fetch(url: str, part: Path, timeout: float) -> None:
    """Append the missing bytes of `url` to `part`."""
    offset = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "vimtune"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # The server has nothing left to send, and the checksum decides.
            return
        raise
    with response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (offset if resumed else 0) if length else None
        done = offset if resumed else 0
        next_report = done
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if done >= next_report:
                    size = f" of {total / 1e6:.0f}" if total else ""
                    logger.info("downloading %s: %.0f%s MB", url, done / 1e6, size)
                    next_report = done + max((total or 0) // 10, 10_000_000)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")


def _reason(error: Exception | None) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    return str(error)


@contextmanager
def download_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time fill `folder`; the others wait and then find the data there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".download.lock")
        with lock:
            yield
    except PermissionError as error:
        raise DownloadError(
            f"cannot write to {folder}: {error.strerror}. Choose another --data-dir."
        ) from error


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
