"""Where the files of a data set lie below the folder that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vimtune.data.errors import DatasetError

DEFAULT_DATA_DIR = "data"
"""Folder of the data sets, below the working directory, where the user names none."""
EMBEDDED_ALTERNATIVE = "No files at hand? `--dataset synthetic_flowers` is embedded and needs none."
"""Sentence that ends every message about missing files."""


def locate_root(data_dir: Path | None, folder_names: Sequence[str], marker: str) -> tuple[Path, bool]:
    """Find the folder that holds `marker`: `data_dir` itself or one of `folder_names` inside it.

    Returns:
        (folder, found). When nothing is found, the folder is where a download should go:
        `data_dir` if it carries one of the names already, else its first named sub-folder.
    """
    base = Path(DEFAULT_DATA_DIR) if data_dir is None else data_dir
    if data_dir is not None and not data_dir.is_dir():
        # A new folder for a download is fine; a path of which nothing exists is a slip.
        if data_dir.exists():
            raise DatasetError(f"data_dir {str(data_dir)!r} is a file; give the folder with the data.")
        if not data_dir.absolute().parent.is_dir():
            raise DatasetError(f"data_dir {str(data_dir)!r} does not exist. {EMBEDDED_ALTERNATIVE}")
    for candidate in (base, *(base / name for name in folder_names)):
        if (candidate / marker).exists():
            return candidate, True
    return (base if base.name in folder_names else base / folder_names[0]), False
