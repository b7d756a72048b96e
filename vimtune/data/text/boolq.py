"""BoolQ (Clark et al. 2019, arXiv 1905.10044): does a passage say yes or no to a question?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import HubPlace, TextFormat
from vimtune.text import quote

ANSWERS = ("no", "yes")
"""The choices of every question."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A line of SuperGLUE's files, and of the hub."""

    __pydantic_config__: ClassVar[Any] = LINE

    passage: Words
    question: Words
    label: bool | int

    def __post_init__(self) -> None:
        if self.label not in (0, 1):
            raise ValueError(
                f"label: expected true, false, 1 or 0 (found {quote(self.label)}); the official test file "
                "has no answers, use the validation file"
            )

    def example(self) -> Example:
        """What the line stands for."""
        context = f"{self.passage}\nQuestion: {self.question}?\nAnswer:"
        return Example.question(context, ANSWERS, int(self.label))


def _read(line: Line) -> Example:
    if line.has("answer") and not line.has("label"):  # in the first release the label is called answer
        line = line.with_field("label", line.field("answer"))
    return line.read(_Question).example()


BOOLQ = TextFormat(
    name="BoolQ",
    read=_read,
    with_answer=lambda line: line if line.has("answer") else line.with_default("label", 0),
    per_character=False,
    classes=ANSWERS,
    hub=HubPlace("aps/super_glue", "boolq", {"train": "train", "test": "validation"}),
    files={"train": ("train.jsonl",), "test": ("val.jsonl", "dev.jsonl", "validation.jsonl")},
)
"""Scores are those of the validation file: the answers of the test file are not public."""
