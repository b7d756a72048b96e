"""Where compiled libraries are kept, and whom we trust with them.

Loading a library runs its code. Its name and its checksum are no protection, since whoever can write to the
folder can make both. What protects is that nobody else can: the folder, everything above it and the file
itself must belong to us or to root, and nobody else may have the right to write to them. A group that is
the owner's alone counts as the owner, since some systems give each user one and let it write to everything.

On systems without such rights (Windows) nothing is checked.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_HAS_OWNERS = hasattr(os, "geteuid")
"""Whether files belong to users, as they do on POSIX systems; Windows has no such check."""


class Untrusted(Exception):
    """Somebody else could have written this; the message says who and where."""


def usable_folders() -> list[Path]:
    """Folders that may hold the library, best first, made where they are missing.

    One that others can write to is left out with a warning.
    """
    usable = []
    for folder in _candidates():
        try:
            usable.append(private_folder(folder))
        except Untrusted as error:
            logger.warning(
                "Compiled CPU kernels are not kept in %s: %s, so somebody else could put a library there. "
                "Take that right away (`chmod go-w`), or let the environment variable VIMTUNE_CACHE name a "
                "folder that only you can write to.",
                folder,
                error,
            )
        except OSError as error:
            logger.info("compiled CPU kernels are not kept in %s: %s", folder, error)
    return usable


def private_folder(folder: Path) -> Path:
    """`folder` without links on the way; made, for us alone, where it is missing.

    Raises:
        Untrusted: somebody else can write to it, or exchange it or a folder above.
        OSError: it cannot be made, or is no folder.
    """
    folder = Path(os.path.abspath(folder))
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder.name)
        folder = folder.parent
    real = Path(os.path.realpath(folder, strict=True))
    if not real.is_dir():
        raise NotADirectoryError(f"{real} is not a folder")
    for place in {*(folder, *folder.parents), *(real, *real.parents)}:
        status = place.lstat()
        # Where names are sticky, others can add to a folder, but cannot exchange what is ours.
        if stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX:
            _check_owner(place, status)
        else:
            _check_rights(place, status)
    for name in reversed(missing):
        real /= name
        real.mkdir(mode=0o700, exist_ok=True)
        _check_rights(real, real.lstat())
    return real


def read_private(path: Path) -> bytes:
    """Content of a file.

    Raises:
        Untrusted: somebody else can write to it.
        OSError: it cannot be read, or is no file.
    """
    careful = ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")  # The last one is Windows': it would change line ends.
    flags = [getattr(os, name, 0) for name in careful]
    descriptor = os.open(path, functools.reduce(operator.or_, flags, os.O_RDONLY))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        _check_rights(path, status)
        return file.read()


def _candidates() -> Iterator[Path]:
    chosen = os.environ.get("VIMTUNE_CACHE")
    if not chosen:
        caches = os.environ.get("XDG_CACHE_HOME", "")
        # Its standard has programs ignore what is not absolute.
        chosen = os.path.join(caches if os.path.isabs(caches) else os.path.join("~", ".cache"), "vimtune")
    folder = os.path.expanduser(chosen)
    if not folder.startswith("~"):  # No home folder is known.
        yield Path(folder)
    if _HAS_OWNERS:
        try:
            yield Path(tempfile.gettempdir()) / f"vimtune-{os.geteuid()}"
        except OSError:
            return  # There is no folder for temporary files.


def _check_owner(path: Path, status: os.stat_result) -> None:
    if _HAS_OWNERS and status.st_uid not in (0, os.geteuid()):
        raise Untrusted(f"{path} belongs to user {status.st_uid}")


def _check_rights(path: Path, status: os.stat_result) -> None:
    if not _HAS_OWNERS:
        return
    _check_owner(path, status)
    if status.st_mode & stat.S_IWOTH:
        raise Untrusted(f"everybody can write to {path}")
    if status.st_mode & stat.S_IWGRP and not _is_group_of_one(status.st_gid):
        raise Untrusted(f"group {status.st_gid} can write to {path}")


def _is_group_of_one(group: int) -> bool:
    """Whether a group is that of the present user alone, or of root."""
    import grp
    import pwd

    if group == 0:
        return True
    try:
        user = pwd.getpwuid(os.geteuid())
        entry = grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}
