"""Answers to a user's inputs, as CSV, as JSON and as a table on the terminal.

Texts, class names and paths are somebody's text. Nothing of it is taken for a formula, for markup or for an
instruction to the terminal. Files are UTF-8. A byte of a path that is not UTF-8 is written as \\udcXX,
where XX is the byte in hexadecimal: in JSON that is an escape which readers undo, so that
`os.fsencode(path)` gives the file's name back.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vimtune.output import write_text
from vimtune.text import counted, csv_text, printable, shorten

if TYPE_CHECKING:  # Answers are made, and written to files, without the library that draws on terminals.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHOWN = 40
"""Rows of the printed table; the files written hold all of them."""
ROOM = 160
"""Columns of a table that goes to a file or a pipe."""
SHOWN_TEXT = 160
"""Characters of a text in the printed table; the middle of a longer one is left out."""


@dataclass(frozen=True)
class Answer(ABC):
    """What a model says about one input of a user."""

    key: ClassVar[str]
    """What an input is called in files, such as "path"."""
    noun: ClassVar[str]
    """What it is called in the printed table, such as "image"."""
    headings: ClassVar[tuple[str, ...]]
    """Headings of the table, after the one of the input."""

    input: str
    """What was asked about: the path of an image, or a text."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What JSON says about the input."""

    @abstractmethod
    def columns(self) -> Mapping[str, str | float]:
        """What CSV says about the input by column: numbers, and texts, of which none becomes a formula."""

    @abstractmethod
    def cells(self) -> tuple[str, ...]:
        """What the printed table says below each of `headings`."""

    @classmethod
    def column(cls, inputs: Sequence[str]) -> tuple[str, list[str]]:
        """The heading of the table's first column, and how it shows the inputs."""
        return cls.noun, [shorten(text, SHOWN_TEXT) for text in inputs]


@dataclass(frozen=True)
class Ranking(Answer):
    """The most probable classes of one input, best first."""

    headings: ClassVar[tuple[str, ...]] = ("class", "", "then")

    indices: list[int]
    """Numbers of the classes."""
    classes: list[str]
    """Their names."""
    probabilities: list[float]
    """What the model gives each class, in [0, 1]."""

    def __str__(self) -> str:
        return f"{self.input}: {', '.join(self._shares(1))}"

    def _shares(self, digits: int) -> list[str]:
        """Each class with its probability in percent, with so many digits after the point."""
        pairs = zip(self.classes, self.probabilities, strict=True)
        return [f"{name} {100 * share:.{digits}f} %" for name, share in pairs]

    def record(self) -> dict[str, Any]:
        """The classes with index and probability."""
        rows = zip(self.classes, self.indices, self.probabilities, strict=True)
        return {
            "predictions": [
                {"class": name, "index": index, "probability": value} for name, index, value in rows
            ]
        }

    def columns(self) -> dict[str, str]:
        """class1, probability1, class2, probability2, ..."""
        found: dict[str, str] = {}
        for rank, (name, value) in enumerate(zip(self.classes, self.probabilities, strict=True), 1):
            found |= {f"class{rank}": name, f"probability{rank}": f"{value:.6f}"}
        return found

    def cells(self) -> tuple[str, ...]:
        """Best class, its probability, then the other classes."""
        return (
            self.classes[0],
            f"{100 * self.probabilities[0]:.1f} %",
            ", ".join(self._shares(0)[1:]),
        )


class Prediction(Ranking):
    """The most probable classes of one image, best first."""

    key = "path"
    noun = "image"

    @property
    def path(self) -> str:
        """The image file."""
        return self.input

    @classmethod
    def column(cls, inputs: Sequence[str]) -> tuple[str, list[str]]:
        """Paths from the folder that all images are in, which the heading names."""
        if len(inputs) < 2:
            return cls.noun, list(inputs)
        folder = os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in inputs])
        return f"{cls.noun} in {folder}", [os.path.relpath(path, folder) for path in inputs]


@dataclass(frozen=True)
class TagPrediction(Prediction):
    """The labels of one image that may have several or none, and its most probable classes, best first.

    Each class has a probability of its own; those of all classes need not be 1 together.
    """

    headings = ("labels", "most probable")

    labels: list[str]
    """Names of the classes that the image is said to have, the most probable one first."""

    def __str__(self) -> str:
        return f"{self.input}: {self._joined(', ')} ({', '.join(self._shares(1))})"

    def record(self) -> dict[str, Any]:
        """The list of labels, which may be empty, then the classes with index and probability."""
        return {"labels": self.labels, **super().record()}

    def columns(self) -> dict[str, str]:
        """labels, with semicolons between them, then class1, probability1, ..."""
        return {"labels": self._joined(";"), **super().columns()}

    def cells(self) -> tuple[str, ...]:
        """The labels, then the most probable classes, which need not be among them."""
        return (self._joined(", "), ", ".join(self._shares(0)))

    def _joined(self, sign: str) -> str:
        return sign.join(self.labels) or "none"


@dataclass(frozen=True)
class Neighbours(Answer):
    """The images that are most like one image, the most similar first."""

    key = "path"
    noun = "image"
    headings = ("nearest", "", "then")

    paths: list[str]
    """The images."""
    cosines: list[float]
    """Cosine of the features of each with those of the image, from -1 to 1."""

    def record(self) -> dict[str, Any]:
        """The images with their similarity."""
        rows = zip(self.paths, self.cosines, strict=True)
        return {"neighbours": [{"path": path, "cosine": cosine} for path, cosine in rows]}

    def columns(self) -> dict[str, str | float]:
        """path1, cosine1, path2, cosine2, ..."""
        found: dict[str, str | float] = {}
        for rank, (path, cosine) in enumerate(zip(self.paths, self.cosines, strict=True), 1):
            found |= {f"path{rank}": path, f"cosine{rank}": round(cosine, 6)}
        return found

    def cells(self) -> tuple[str, ...]:
        """The nearest image, its similarity, then the others."""
        rows = list(zip(self.paths, self.cosines, strict=True))
        first = (rows[0][0], f"{rows[0][1]:.3f}") if rows else ("none", "")
        return (*first, ", ".join(f"{path} {cosine:.3f}" for path, cosine in rows[1:]))

    @classmethod
    def column(cls, inputs: Sequence[str]) -> tuple[str, list[str]]:
        """Paths as those of predictions."""
        return Prediction.column(inputs)


class Choice(Ranking):
    """The most probable classes of one text, or the most probable answers to a question, best first."""

    key = "text"
    noun = "text"


@dataclass(frozen=True)
class Completion(Answer):
    """What a language model writes after one prompt."""

    key = "prompt"
    noun = "prompt"
    headings = ("completion",)

    completion: str
    """The text, without the prompt."""
    ended: bool
    """Whether the model ended it; if not, the limit of tokens did."""

    def record(self) -> dict[str, Any]:
        """The text, and whether it is whole."""
        return {"completion": self.completion, "ended": self.ended}

    def columns(self) -> dict[str, str]:
        """completion, ended"""
        return {"completion": self.completion, "ended": str(self.ended).lower()}

    def cells(self) -> tuple[str, ...]:
        """The text, with dots where the limit of tokens ended it."""
        return (self.completion + ("" if self.ended else " ..."),)


def to_csv(answers: Sequence[Answer], kind: type[Answer]) -> str:
    """One row for each input: the input itself, then the columns of its answer."""
    columns = [answer.columns() for answer in answers]
    names = max(map(list, columns), key=len, default=[])
    rows = [
        [answer.input, *(values.get(name, "") for name in names)]
        for answer, values in zip(answers, columns, strict=True)
    ]
    return csv_text([[kind.key, *names], *rows])


def to_json(answers: Sequence[Answer], kind: type[Answer]) -> str:
    """A list of objects: the input, as "path" for example, and what `Answer.record` says about it."""
    rows = [{kind.key: answer.input, **answer.record()} for answer in answers]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Answer], type[Answer]], str]] = {".csv": to_csv, ".json": to_json}
"""How a file is written whose name ends so."""


def write_answers(output: Path, answers: Sequence[Answer], kind: type[Answer]) -> None:
    """Write `output` in the format that its name asks for.

    Raises:
        OutputError: the disk is full, or the like; an earlier file is then as it was.
    """
    write_text(output, FORMATS[output.suffix.lower()](answers, kind))


def build_table(answers: Sequence[Answer], kind: type[Answer]) -> Table:
    """Inputs and answers: at most `SHOWN` rows, without columns in which nothing stands."""
    from rich.table import Table

    shown = answers[:SHOWN]
    heading, names = kind.column([answer.input for answer in shown])
    cells = [answer.cells() for answer in shown]
    used = [index for index in range(len(kind.headings)) if any(row[index] for row in cells)]
    # Folded, because a shortened name would be another one.
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(_plain(heading), overflow="fold")
    for index in used:
        numbers = not kind.headings[index]
        table.add_column(kind.headings[index], justify="right" if numbers else "left", overflow="fold")
    for name, row in zip(names, cells, strict=True):
        table.add_row(_plain(name), *(_plain(row[index]) for index in used))
    return table


def _plain(text: str) -> Text:
    """`text` for rich, which parses markup and emoji codes in a str, but not in this."""
    from rich.text import Text

    return Text(printable(text))


def print_answers(answers: Sequence[Answer], kind: type[Answer], console: Console) -> None:
    """Print the table, and how many inputs it leaves out."""
    from vimtune.console import print_line

    if not console.is_terminal:
        console.width = max(console.width, ROOM)
    if answers:
        console.print(build_table(answers, kind))
    if len(answers) > SHOWN:
        more = len(answers) - SHOWN
        print_line(console, f"... and {counted(more, f'more {kind.noun}s')}; --output writes all of them")
