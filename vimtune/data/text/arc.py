"""ARC, the AI2 Reasoning Challenge (Clark et al. 2018, arXiv 1803.05457): questions of school tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Len

from vimtune.data.text.examples import Example
from vimtune.data.text.lines import LINE, Line, Words
from vimtune.data.text.places import HubPlace, TextFormat
from vimtune.text import quote


def _example(question: str, texts: list[str], labels: list[str], key: str) -> Example:
    """The example of a question whose answers `texts` have these labels."""
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"label: expected each label once (found {quote(twice[0])} twice)")
    if key not in labels:
        raise ValueError(f"answerKey: expected one of the labels {', '.join(labels)} (found {quote(key)})")
    return Example.question(f"Question: {question}\nAnswer:", texts, labels.index(key))


@dataclass(frozen=True)
class _Choices:
    """Answers and their labels, side by side."""

    __pydantic_config__: ClassVar[Any] = LINE

    text: Annotated[list[Words], Len(2)]
    label: list[str]

    def __post_init__(self) -> None:
        if len(self.text) != len(self.label):
            raise ValueError(f"expected as many labels as texts ({len(self.text)}, found {len(self.label)})")


@dataclass(frozen=True)
class _HubLine:
    """A question as the hub and most copies have it."""

    __pydantic_config__: ClassVar[Any] = LINE

    question: Words
    choices: _Choices
    answerKey: str

    def __post_init__(self) -> None:
        self.example()

    def example(self) -> Example:
        """What the line stands for."""
        return _example(self.question, self.choices.text, self.choices.label, self.answerKey)


@dataclass(frozen=True)
class _Choice:
    """One answer of the files of AI2."""

    __pydantic_config__: ClassVar[Any] = LINE

    text: Words
    label: str


@dataclass(frozen=True)
class _Stem:
    """Question and answers in the files of AI2."""

    __pydantic_config__: ClassVar[Any] = LINE

    stem: Words
    choices: Annotated[list[_Choice], Len(2)]


@dataclass(frozen=True)
class _OriginalLine:
    """A question as in the archive that AI2 publishes."""

    __pydantic_config__: ClassVar[Any] = LINE

    question: _Stem
    answerKey: str

    def __post_init__(self) -> None:
        self.example()

    def example(self) -> Example:
        """What the line stands for."""
        choices = self.question.choices
        texts, labels = [choice.text for choice in choices], [choice.label for choice in choices]
        return _example(self.question.stem, texts, labels, self.answerKey)


def _read(line: Line) -> Example:
    if isinstance(line.field("question"), dict):
        return line.read(_OriginalLine).example()
    return line.read(_HubLine).example()


def _with_answer(line: Line) -> Line:
    """With the first label as the answer; a line without labels is refused by whoever reads it."""
    question = line.field("question")
    choices = question.get("choices") if isinstance(question, dict) else line.field("choices")
    labels = choices.get("label") if isinstance(choices, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        labels = [choices[0].get("label")]
    return line.with_default("answerKey", labels[0] if isinstance(labels, list) and labels else "A")


def _format(name: str) -> TextFormat:
    return TextFormat(
        name=name,
        read=_read,
        with_answer=_with_answer,
        hub=HubPlace("allenai/ai2_arc", name, {"train": "train", "test": "test"}),
        files={
            "train": (f"{name}-train.jsonl", f"{name}-Train.jsonl"),
            "test": (f"{name}-test.jsonl", f"{name}-Test.jsonl"),
        },
    )


ARC_EASY = _format("ARC-Easy")
"""The questions that simple methods answer, too."""
ARC_CHALLENGE = _format("ARC-Challenge")
"""The questions that simple methods get wrong."""
