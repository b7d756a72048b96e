"""A file of records that grows by whole ones.

A full disk ends the run where it meets it, with everything written before intact.
"""

from __future__ import annotations

import os
from pathlib import Path

from vimtune.run_folder import writing


class GrowingFile:
    """A file that grows by whole records."""

    def __init__(self, path: Path, within: Path, keep_bytes: int = 0) -> None:
        """Open the file, and make it where it is missing.

        Args:
            path: the file.
            within: the path that a message about it names.
            keep_bytes: what stays of an existing file.

        Raises:
            OutputError: it cannot be written.
        """
        self.path, self._within = path, within
        with writing(within):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
            self._file.truncate(min(keep_bytes, self._file.tell()))

    @property
    def length(self) -> int:
        """The length in bytes."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, record: bytes) -> None:
        """Write `record`, all of it or nothing.

        Raises:
            OutputError: it cannot be written.
        """
        rest, length = memoryview(record), self.length
        with writing(self._within):
            try:
                while rest:  # a full disk may take a part before it refuses the rest
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(length)
                raise

    def sync(self) -> None:
        """Have everything on disk.

        Raises:
            OutputError: the system refuses.
        """
        with writing(self._within):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
