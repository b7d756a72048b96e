"""Downloads that verify checksums, go on after an interruption, and do not wait for ever."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from vimtune.text import printable

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
"""Bytes that are read from the network at a time."""
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
"""What `urllib` raises when a connection fails or breaks off, after which another try may succeed."""


class DownloadError(ValueError):
    """A file could not be fetched or kept, or is not the expected one."""


def digest_of(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file's content, by an algorithm of `hashlib` such as "sha256"."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_file(
    url: str,
    path: Path,
    digest: str,
    *,
    algorithm: str = "md5",
    timeout: float = 30.0,
    attempts: int = 3,
    pause: float = 1.0,
) -> Path:
    """Fetch `url` to `path` and verify what has come.

    Bytes go to `<path>.part`; a later call (or attempt) asks the server for the rest only. `path`
    appears when the whole file is there and verified. An existing verified file is kept.

    Args:
        digest: what `digest_of` gives for the expected file, by the same `algorithm`.
        timeout: seconds without an answer before an attempt fails.
        attempts: tries before giving up; `pause` seconds between them, doubled each time.

    Raises:
        DownloadError: no connection, or the content has another digest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and digest_of(path, algorithm) == digest:
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
            actual = digest_of(part, algorithm)
            if actual != digest:
                part.unlink()
                raise DownloadError(
                    f"{url} has {algorithm.upper()} {actual}, expected {digest}: the file on the server "
                    "changed or was damaged on the way. Nothing was kept; try again or fetch the file by "
                    f"hand to {printable(str(path))}."
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
def download_lock(folder: Path, elsewhere: str = "Choose another --data-dir") -> Iterator[None]:
    """Let one process at a time fill `folder`; the others wait and then find the files there.

    Args:
        elsewhere: how the user has another folder, for the message where this one cannot be written.

    Raises:
        DownloadError: the system refuses to write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            yield
    except OSError as error:  # What connections raise has become a DownloadError inside.
        reason = error.strerror or str(error)
        raise DownloadError(f"cannot write to {printable(str(folder))}: {reason}. {elsewhere}.") from error
