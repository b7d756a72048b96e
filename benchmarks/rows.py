"""The rows of a benchmark as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def write_rows(output: str | None, device: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Write rows as JSON, with the device and the version of torch they were measured on and other facts.

    Args:
        output: the file; None writes nothing.
        device: name of the device.
        rows: the rows.
        facts: plain values that belong to all of them.
    """
    if output is not None:
        found = {"device": device, "torch": torch.__version__, **facts, "rows": rows}
        Path(output).write_text(json.dumps(found), encoding="utf-8")
