"""Reading of safetensors files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says besides its tensors, which are not read.

    Raises:
        SafetensorError: truncated, or a file of another kind.
        OSError: it is not there or cannot be read.
    """
    # This raises the system's own error; safetensors takes every failure for a missing file.
    with open(path, "rb"):
        pass
    with safe_open(path, framework="np") as file:  # The framework "pt" refuses names that are not UTF-8.
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        SafetensorError: truncated, or a file of another kind.
        OSError: it is not there or cannot be read.
    """
    try:
        os.fspath(path).encode("utf-8")
        mapped = sys.platform != "win32"  # where a file that is mapped into memory cannot be replaced
    except UnicodeEncodeError:  # `load_file` refuses this name.
        mapped = False
    return load_file(path) if mapped else load(Path(path).read_bytes())
