"""Files that are passed on name no folders of the computer that they come from."""

from __future__ import annotations

import json
import ntpath
import os
import posixpath
from pathlib import Path
from typing import Any

from vimtune.files import read_regular_file
from vimtune.schema import MAX_TEXT_BYTES

MAX_SETTINGS = 2**18
"""Bytes of the largest JSON file that is taken for settings."""
NAMES = ("classes", "class_weights", "id2label", "label2id", "label_descriptions", "label_names")
"""Keys below which there are names of classes. Some look like paths, such as /m/01g317 in Open Images."""


def without_paths(value: Any) -> Any:
    """Plain values, with the name of a file or folder in the place of its path on this computer.

    A text is such a path where it is absolute, of this system or another, or names something that is there.
    What stands below one of the keys `NAMES` stays as it is.
    """
    if isinstance(value, dict):
        return {
            str(without_paths(key)): inner if key in NAMES else without_paths(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    return _name_of(value) if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if "\n" in text or len(text) > 4096:
        return False
    # A drive alone makes no path: "A: intact" may be the name of anything.
    if posixpath.isabs(text) or ntpath.isabs(text) or text.startswith("~"):
        return len(text) > 1
    return ("/" in text or os.sep in text) and os.path.exists(text)


def _name_of(path: str) -> str:
    return ntpath.basename(path.rstrip("/\\"))


def clean_json(folder: Path) -> None:
    """Take the paths of this computer out of the JSON files of a folder that are small enough to be settings;
    a vocabulary stays as it is."""
    for path in sorted(folder.rglob("*.json")):
        if path.stat().st_size > MAX_SETTINGS:
            continue
        values = json.loads(read_regular_file(path, MAX_TEXT_BYTES).decode("utf-8"))
        cleaned = without_paths(values)
        if cleaned != values:
            path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
