"""PIQA (Bisk et al. 2020, arXiv 1911.11641): which of two ways leads to a goal in everyday life?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le

from vimtune.data.errors import DatasetError
from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import HubPlace, TextFormat
from vimtune.files import read_regular_file
from vimtune.text import printable, quote

MAX_LABELS_BYTES = 16 * 2**20
"""Longest file of labels that is read; the official ones have 32 kB."""


@dataclass(frozen=True)
class _Goal:
    """A line of the official files, with the label that stands in a file of its own there."""

    __pydantic_config__: ClassVar[Any] = LINE

    goal: Words
    sol1: Words
    sol2: Words
    label: Annotated[int, Ge(0), Le(1)]

    def example(self) -> Example:
        """What the line stands for."""
        return Example.question(f"Question: {self.goal}\nAnswer:", (self.sol1, self.sol2), self.label)


def _read(line: Line) -> Example:
    return line.read(_Goal).example()


def _with_labels(path: Path, lines: list[Line]) -> list[Line]:
    """The lines of a file with the labels of `valid-labels.lst` beside it, unless they have labels.

    Raises:
        DatasetError: that file has another number of lines, or one that is no label.
    """
    beside = path.with_name(f"{path.stem}-labels.lst")
    if any(line.has("label") for line in lines) or not beside.is_file():
        return lines
    shown = printable(str(beside))
    try:
        labels = read_regular_file(beside, MAX_LABELS_BYTES).decode("ascii", "replace").split()
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {shown}: {error}") from error
    if len(labels) != len(lines):
        raise DatasetError(f"{shown} has {len(labels)} labels: expected {len(lines)}, one for each line")
    for number, label in enumerate(labels, 1):
        if label not in ("0", "1"):
            raise DatasetError(f"{shown}, line {number}: expected 0 or 1 (found {quote(label)})")
    return [line.with_field("label", int(label)) for line, label in zip(lines, labels, strict=True)]


PIQA = TextFormat(
    name="PIQA",
    read=_read,
    with_answer=lambda line: line.with_default("label", 0),
    complete=_with_labels,
    hub=HubPlace("baber/piqa", None, {"train": "train", "test": "validation"}),
    files={
        "train": ("train.jsonl", "piqa_train.jsonl"),
        "test": ("valid.jsonl", "validation.jsonl", "piqa_valid.jsonl"),
    },
)
"""Scores are those of the validation file: the answers of the test file are not public."""
