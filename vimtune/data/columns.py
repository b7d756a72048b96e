"""Columns of a user's tables, of images and of texts: names that are usual, and how a column is found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vimtune.data.errors import DatasetError
from vimtune.text import name_some, quote

LABELS = ("label", "labels", "class", "class_name", "category", "target", "tags", "sentiment", "species")
"""Usual names of the column of labels, in lower case; of several in one file the first here is taken."""


def usual_column(fields: Iterable[str], usual: Sequence[str]) -> str | None:
    """The first column with a usual name that is there, else None; `find_column` has the arguments."""
    by_name = {name.strip().lower(): name for name in reversed(list(fields))}
    return next((by_name[name] for name in usual if name in by_name), None)


def find_column(
    fields: Iterable[str], file: str, option: str, given: str | None, usual: Sequence[str]
) -> str | None:
    """The name of a column: the given one, or the first usual one that is there, else None.

    Args:
        fields: names of all columns; case and blanks around them do not matter for usual names.
        file: what messages call the file.
        option: by which the user gives the name.
        given: that name; None for the usual ones.
        usual: usual names in lower case, the one to prefer first.

    Raises:
        DatasetError: the file has no column of the given name.
    """
    fields = list(fields)
    if given is None:
        return usual_column(fields, usual)
    if given not in fields:
        raise DatasetError(f"{option} = {quote(given)}: {file} has {name_some(fields)}")
    return given
