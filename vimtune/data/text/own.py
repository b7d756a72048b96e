"""A user's own texts: prompts with completions, texts with labels, or plain texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from vimtune.data.columns import LABELS
from vimtune.data.errors import DatasetError
from vimtune.data.text.columns import Columns, understand
from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import TextFormat
from vimtune.text import quote


@dataclass(frozen=True)
class _Prompted:
    """A prompt and what is to follow it, to the letter: a blank between them belongs to one of the two."""

    __pydantic_config__: ClassVar[Any] = LINE

    completion: Words
    prompt: str = ""

    def example(self) -> Example:
        """The completion as the only choice."""
        return Example(
            (self.prompt,), (self.completion,), (self.completion,), 0, self.prompt, self.completion
        )


@dataclass(frozen=True)
class _Labelled:
    """A text and the name or number of its class."""

    __pydantic_config__: ClassVar[Any] = LINE

    text: Words
    label: Words | int


@dataclass(frozen=True)
class _Plain:
    """A text, all of which is to be learnt."""

    __pydantic_config__: ClassVar[Any] = LINE

    text: Words

    def example(self) -> Example:
        """The text as the completion of nothing."""
        return Example(("",), (self.text,), (self.text,), 0, "", self.text)


def _read(line: Line) -> Example:
    if line.has("text") and not line.has("completion"):
        return line.read(_Plain).example()
    return line.read(_Prompted).example()


def _read_labelled(line: Line, classes: Sequence[str]) -> Example:
    if line.has("text") and not line.has("label"):
        raise DatasetError(
            f"{line.place} has no label, which texts of the training file have: expected a column "
            f"{', '.join(LABELS[:-1])} or {LABELS[-1]}, or the one that label_column=... names"
        )
    entry = line.read(_Labelled)
    label = str(entry.label)
    if label not in classes:
        known = ", ".join(map(quote, classes))
        raise DatasetError(
            f"{line.place}: label: expected one of the training file's labels {known} (found {quote(label)})"
        )
    return Example.question(entry.text, classes, list(classes).index(label))


@dataclass(frozen=True)
class _Prompt:
    """A text that is to be completed."""

    __pydantic_config__: ClassVar[Any] = LINE

    prompt: str


def _prompt(line: Line) -> str:
    if line.has("text") and not line.has("prompt"):
        return line.read(_Plain).text
    return line.read(_Prompt).prompt


def _classes(lines: Sequence[Line]) -> tuple[str, ...]:
    """The labels of a training file, sorted; none where its texts have no labels."""
    labelled = sum(line.has("text", "label") for line in lines)
    if not labelled:
        return ()
    names = {str(line.read(_Labelled).label) for line in lines}
    if len(names) < 2:
        raise DatasetError(
            f"{lines[0].place}: expected two labels at least in the file (found {len(names)}); without a "
            "column of labels it has plain texts, which are learnt as they are"
        )
    return tuple(sorted(names))


_FILES = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
"""Names of the files of a split, without their endings."""

OWN = TextFormat(
    name="text",
    read=_read,
    read_labelled=_read_labelled,
    find_classes=_classes,
    prompt=_prompt,
    understand=partial(understand, columns=Columns()),
    files={
        split: tuple(f"{name}.{ending}" for name in names for ending in ("jsonl", "csv", "tsv"))
        for split, names in _FILES.items()
    },
)
"""Fields prompt and completion, text and label, or text alone, the last two under any usual name; in JSON
Lines, or in CSV or TSV with a header."""


def own_texts(text_column: str | None, label_column: str | None) -> TextFormat:
    """`OWN` with columns that a user names; of those that are None usual names are looked for."""
    return replace(OWN, understand=partial(understand, columns=Columns(text_column, label_column)))
