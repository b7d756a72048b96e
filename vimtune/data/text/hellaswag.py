"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): how does a described scene go on?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import HubPlace, TextFormat
from vimtune.text import quote


def clean(text: str) -> str:
    """`text` without the marks of WikiHow: titles end a sentence, what is in square brackets goes."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """What the lines of all versions have."""

    __pydantic_config__: ClassVar[Any] = LINE

    activity_label: Words
    endings: Annotated[list[Words], Len(2)]
    label: int | str
    """Index of the right ending; a text on the hub."""

    def __post_init__(self) -> None:
        if str(self.label) not in map(str, range(len(self.endings))):
            raise ValueError(
                f"label: expected the index of an ending, 0 to {len(self.endings) - 1} (found "
                f"{quote(self.label)}); the official test file has none, use the validation file"
            )

    def example_of(self, first: str, second: str) -> Example:
        """The example of a scene that is `first`, with the beginning `second` of the sentence to complete."""
        # capitalize() also makes the rest small; the published scores were taken that way.
        context = clean(f"{self.activity_label}: {first} {second.capitalize()}")
        choices = [clean(ending) for ending in self.endings]
        prompt = f"Context: {self.activity_label} {clean(f'{first} {second}')}\nAnswer:"
        return Example.question(context, choices, int(self.label), prompt)


@dataclass(frozen=True, kw_only=True)
class _OfficialLine(_Scene):
    """A line of the official files, and of the hub."""

    ctx_a: str
    ctx_b: str

    def example(self) -> Example:
        """What the line stands for."""
        return self.example_of(self.ctx_a, self.ctx_b)


@dataclass(frozen=True, kw_only=True)
class _JoinedLine(_Scene):
    """A line of a copy in which both parts of the scene are one text."""

    ctx: Words

    def example(self) -> Example:
        """The example with the parts rebuilt: what follows the last whole sentence is the second one."""
        text = self.ctx.strip()
        ends = [found.end() for found in re.finditer(r"[.!?][\"')]*(?=\s|$)", text)]
        middle = ends[-1] if ends else 0
        return self.example_of(text[:middle], text[middle:].strip())


def _read(line: Line) -> Example:
    joined = line.has("ctx") and not line.has("ctx_a") and not line.has("ctx_b")
    return line.read(_JoinedLine).example() if joined else line.read(_OfficialLine).example()


def _note(lines: list[Line]) -> str:
    """What is to be said of a file: that it has not the official form, or endings of which nothing is left.

    The harness scores such an ending, too, so that it is not refused.
    """
    rebuilt = sum(line.has("ctx") and not line.has("ctx_a") for line in lines)
    blank = sum(not clean(ending).strip() for line in lines for ending in line.field("endings"))
    notes = []
    if rebuilt:
        notes.append(
            f"ctx_a and ctx_b of {rebuilt:,} lines are rebuilt from ctx (the part after its last whole "
            "sentence is ctx_b), so scores may differ a little from those of the official file"
        )
    if blank:
        notes.append(f"{blank:,} endings are marks in square brackets alone, so nothing is left of them")
    return "; ".join(notes)


HELLASWAG = TextFormat(
    name="HellaSwag",
    read=_read,
    with_answer=lambda line: line.with_default("label", 0),
    note=_note,
    hub=HubPlace("Rowan/hellaswag", None, {"train": "train", "test": "validation"}),
    files={
        "train": ("hellaswag_train.jsonl", "train.jsonl"),
        "test": ("hellaswag_val.jsonl", "val.jsonl", "validation.jsonl"),
    },
)
"""Scores are those of the validation file, as everywhere: the answers of the test file are not public."""
