"""Parts of files."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """The part of a file that is one image, where a file holds many."""

    start: int
    """Number of bytes before it."""
    size: int
    """Number of its bytes."""

    def within(self, path: str) -> str:
        """The name of this part of the file `path` in messages."""
        return f"{path} (bytes {self.start} to {self.start + self.size})"
