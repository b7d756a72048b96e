"""Tables of a data set are read and checked: texts, numbers in range, plain names, files that are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vimtune.data.errors import DatasetError
from vimtune.files import read_regular_file
from vimtune.text import counted, printable, quote


def read_table(path: Path, limit: int, advice: str = "") -> str:
    """The text of a file of at most `limit` bytes; a `DatasetError`, which ends with the sentence `advice`,
    where there is none."""
    shown = printable(str(path))
    try:
        return read_regular_file(path, limit).decode("utf-8")
    except OSError as error:
        raise DatasetError(f"cannot read {shown}: {error.strerror}. {advice}".rstrip()) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{shown} is not a text file (byte {error.start} is not UTF-8).") from error
    except ValueError as error:
        raise DatasetError(f"{error}.") from error


def whole_numbers(values: Any, low: int, high: int, what: str) -> list[int]:
    """`values` of a file as ints; a `DatasetError` that names `what` where they are not `low` to `high`."""
    import numpy as np  # This comes late, because data sets are listed without numpy.

    numbers = np.atleast_1d(np.asarray(values))
    if numbers.dtype.kind not in "uif" or numbers.ndim != 1 or not numbers.size:
        raise DatasetError(f"{what} are no list of numbers.")
    if not (low <= numbers.min() and numbers.max() <= high and (numbers % 1 == 0).all()):
        raise DatasetError(f"{what} must be whole numbers from {low} to {high}.")
    return [int(number) for number in numbers]


def plain_name(name: Any, what: str) -> str:
    """`name` of a file, if it is that of a file in a folder and leads nowhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise DatasetError(f"{what} holds {quote(name)} where the name of a file belongs.")
    return name


def check_files_exist(paths: Sequence[str], what: str, advice: str) -> None:
    """Raise one `DatasetError` when some of `paths` are missing. Lists each folder once."""
    present = {folder: set(_list_names(folder)) for folder in {os.path.dirname(path) for path in paths}}
    missing = [p for p in paths if os.path.basename(p) not in present[os.path.dirname(p)]]
    if missing:
        raise DatasetError(
            f"{what} is incomplete: {len(missing)} of {counted(len(paths), 'images')} missing, "
            f"e.g. {printable(missing[0])}. {advice}"
        )


def _list_names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
