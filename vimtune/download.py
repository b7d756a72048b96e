"""Downloads that verify checksums, go on after an interruption, and wait only where that can help."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from vimtune.files import refusal, without_empty_folders
from vimtune.text import printable

logger = logging.getLogger(__name__)

_CHUNK = 1 << 18
"""Bytes that are read from the network at a time."""
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
"""What `urllib` raises when a connection fails or breaks off."""
_PASSING = (TimeoutError, ConnectionError, http.client.HTTPException, ssl.SSLEOFError)
"""Those of them, or of what is behind a `URLError`, after which another try may succeed: the server is slow,
or the connection broke off."""
_LASTING = (ConnectionRefusedError, http.client.InvalidURL)
"""Those of these after which it does not."""
_BUSY = frozenset({408, 429})
"""Answers of a server that does not refuse for ever, beside those from 500 on."""


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
    appears when the whole file is there and verified. An existing verified file is kept. Where there is no
    connection at all, as without a network, the first attempt is the last one.

    Args:
        digest: what `digest_of` gives for the expected file, by the same `algorithm`.
        timeout: seconds without an answer before an attempt fails.
        attempts: tries before giving up; `pause` seconds between them, doubled each time, and said.

    Raises:
        DownloadError: no connection, or the content has another digest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and digest_of(path, algorithm) == digest:
        return path
    part = path.with_name(path.name + ".part")
    _fetch_in_attempts(url, part, timeout, attempts, pause)
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


def _fetch_in_attempts(url: str, part: Path, timeout: float, attempts: int, pause: float) -> None:
    """Append the missing bytes of `url` to `part`; the arguments are those of `download_file`."""
    for left in reversed(range(attempts)):
        try:
            return _fetch(url, part, timeout)
        except _NETWORK_ERRORS as error:
            if not left or not _may_pass(error):
                raise DownloadError(f"cannot download {url}: {_reason(error)}.{_kept(part)}") from error
            logger.warning("download of %s: %s; trying again in %g s", url, _reason(error), pause)
        time.sleep(pause)
        pause *= 2


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


def _cause(error: Exception) -> BaseException | str:
    """What is behind an error of `urllib`, which wraps those of a connection that was never made."""
    return error.reason if isinstance(error, urllib.error.URLError) else error


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed. It does not where a name is not resolved, nothing answers at an
    address or nothing leads there, as without a network, nor where the server refuses."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in _BUSY
    cause = _cause(error)
    return isinstance(cause, _PASSING) and not isinstance(cause, _LASTING)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    cause = _cause(error)
    reason = " ".join((refusal(cause) if isinstance(cause, BaseException) else cause).split())
    if not isinstance(error, urllib.error.URLError):
        return reason
    here = _may_pass(error) or isinstance(cause, ssl.SSLError)
    return f"no connection ({reason}){'' if here else '; without a network, fetch it on another machine'}"


def _kept(part: Path) -> str:
    """The sentence on what a later call goes on with. A part without content is removed."""
    with suppress(FileNotFoundError):
        if size := part.stat().st_size:
            return f" {size} bytes are kept; running again resumes."
        part.unlink()
    return ""


@contextmanager
def download_lock(folder: Path, elsewhere: str = "Choose another --data-dir") -> Iterator[None]:
    """Let one process at a time fill `folder`; the others wait and then find the files there.

    The folder is made, and those around it; of these the empty ones are gone afterwards, as is the lock.

    Args:
        elsewhere: how the user has another folder, for the message where this one cannot be written.

    Raises:
        DownloadError: the system refuses to write there.
    """
    lock = folder / ".download.lock"
    try:
        with without_empty_folders(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                try:
                    yield
                finally:
                    with suppress(OSError):  # Windows refuses while the file is open.
                        lock.unlink()
    except OSError as error:  # What connections raise has become a DownloadError inside.
        reason = error.strerror or str(error)
        raise DownloadError(f"cannot write to {printable(str(folder))}: {reason}. {elsewhere}.") from error
