"""What can be wrong with data."""

from __future__ import annotations

from vimtune.text import printable


class DatasetError(ValueError):
    """A data set cannot be used as asked; the message says what was expected and what to do."""


class MissingSplitError(DatasetError):
    """The data set exists but has no such split (e.g. a folder without test images)."""


class CorruptImageError(ValueError):
    """An image cannot be decoded. What can be done about it depends on who wanted it, and is said there.

    Attributes:
        path: the image file.
        reason: what the decoder says is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot decode image {printable(path)}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[CorruptImageError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class ImageReadError(DatasetError):
    """The system cannot read a file or folder: it is gone, not permitted, on a failing disk, ...

    Such an error says nothing about the image, so images are not left out for it, whatever `on_corrupt` is.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read {printable(path)}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageReadError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class TooManyCorruptError(DatasetError):
    """So many images were left out as corrupt that what is left is no longer the data set."""


class WorkerError(DatasetError):
    """The processes that prepare images can no longer do so: one died, or the system ran out of something."""
