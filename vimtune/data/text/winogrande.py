"""Winogrande (Sakaguchi et al. 2019, arXiv 1907.10641): which of two names fills the gap of a sentence?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import HubPlace, TextFormat
from vimtune.text import quote

GAP = "_"
"""Stands in the sentence where one of the options belongs."""


@dataclass(frozen=True)
class _Sentence:
    """A line of the official files, and of the hub."""

    __pydantic_config__: ClassVar[Any] = LINE

    sentence: Words
    option1: Words
    option2: Words
    answer: str

    def __post_init__(self) -> None:
        if GAP not in self.sentence:
            raise ValueError(f"sentence: expected a gap {GAP!r} in it (found {quote(self.sentence)})")
        if self.answer not in ("1", "2"):
            raise ValueError(
                f"answer: expected '1' or '2' (found {quote(self.answer)}); the official test file has no "
                "answers, use dev"
            )

    def example(self) -> Example:
        """What the line stands for: the options differ in the context, what follows the gap is scored."""
        before, _, after = self.sentence.partition(GAP)
        options = (self.option1, self.option2)
        contexts = tuple(before + option for option in options)
        rest = after.strip()
        index = int(self.answer) - 1
        return Example(
            contexts=contexts,
            continuations=(f" {rest}",) * 2,
            choices=contexts,
            answer=index,
            prompt=f"Sentence: {before}",
            completion=options[index] + after,
        )


def _read(line: Line) -> Example:
    if not line.has("answer") and line.has("sentence"):
        line = line.with_field("answer", "")  # the message then says which file has answers
    return line.read(_Sentence).example()


WINOGRANDE = TextFormat(
    name="Winogrande",
    read=_read,
    with_answer=lambda line: line.with_default("answer", "1"),
    per_character=False,
    hub=HubPlace("allenai/winogrande", "winogrande_xl", {"train": "train", "test": "validation"}),
    files={
        "train": tuple(f"train_{size}.jsonl" for size in ("xl", "l", "m", "s", "xs")),
        "test": ("dev.jsonl",),
    },
)
"""Of several training files the largest is taken; scores are those of dev, whose answers are public."""
