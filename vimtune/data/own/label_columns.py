"""Columns of tables of labels: which of them mean what, and what the cells of a row say.

One column has the paths of the images. The labels are

- one column: the class of each image, or with a separator any number of them;
- or a column for each class, with 1 (or true) where an image has it and 0 (or false, or nothing) where not.

A column may say to which split an image belongs, in words that `vimtune.data.own.layout.split_of` knows. In
the table of one split it must not say another one: such rows would be trained on although they are marked as
test images.

What is no label but looks like one is told apart: "nan" is how Python writes an empty cell and means one
here, too, while NA, None and the like may be names of classes, which `label_notes` mentions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vimtune.data.columns import LABELS, find_column, usual_column
from vimtune.data.errors import DatasetError
from vimtune.data.own.label_images import TableImages
from vimtune.data.own.layout import split_of
from vimtune.data.text.lines import Line
from vimtune.text import counted, name_some, quote

_PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name"),
    *("image_id", "img", "img_path", "photo", "id"),
)
"""Usual names of the column of paths, in lower case; of several in one file the first here is taken."""
_SPLITS = ("split", "set", "subset", "partition")
"""Usual names of the column of splits, likewise."""
_MARKS = {
    **{"1": True, "1.0": True, "true": True},
    **{"0": False, "0.0": False, "false": False, "": False},
}
"""What may stand in the column of a class, in lower case, and whether the image has it."""
_EMPTY = ("", "nan", "<na>")
"""What stands in a cell without a label, in lower case: nothing, or how pandas writes that as a text."""
_DOUBTFUL = ("na", "n/a", "#n/a", "none", "null")
"""Names of classes, in lower case, that other programs write where nothing is."""
_SEPARATORS = (";", "|", ",")
"""Signs that people write between several labels of an image."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns; of those that are None the usual names are looked for."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    separator: str | None = None
    """The sign between the labels of an image."""


@dataclass(frozen=True)
class Row:
    """What a row says of its image."""

    place: str
    """Where it stands, for messages."""
    path: str
    """The image."""
    labels: tuple[str, ...]
    """Names of its classes."""
    split: str
    """Its split; "all" where the file does not say."""


@dataclass(frozen=True)
class Meaning:
    """Which columns mean what."""

    path: str
    label: str | None
    """The column of labels; None where each class has a column."""
    separator: str | None
    classes: list[str]
    """The classes that have a column each."""
    splits: Sequence[str]
    """What the column of splits may be called, in lower case."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels or none."""
        return self.label is None or self.separator is not None

    def lacks_labels(self, line: Line) -> bool:
        """Whether a table, of which this is a row, has no column of labels by any name."""
        names = self.classes if self.label is None else [self.label]
        return not any(map(line.has, names)) and usual_column(line.fields(), LABELS) is None

    def read(self, lines: Sequence[Line], split: str, images: TableImages) -> Iterable[Row]:
        """What the rows of a file say, whose images all belong to `split` unless it is "all".

        Raises:
            DatasetError: a row that is not understood.
        """
        column = usual_column(lines[0].fields(), self.splits)
        if column in (self.path, self.label):
            column = None
        for line in lines:
            text = self._cell(line, self.path)
            if not text:
                raise DatasetError(f"{line.place}: no path in column {quote(self.path)}")
            own = split if column is None else self._split(line, split, column)
            yield Row(line.place, images.find(text, line.place), self._labels(line), own)

    def pass_over(self, lines: Sequence[Line], images: TableImages) -> None:
        """Note the images of a table that is not used."""
        for line in lines:
            images.pass_over(str(line.field(self.path) or "").strip())

    def _labels(self, line: Line) -> tuple[str, ...]:
        if self.label is None:
            return tuple(name for name in self.classes if self._mark(line, name))
        text = self._cell(line, self.label)
        if self.separator is not None:
            parts = (part.strip() for part in text.split(self.separator))
            return tuple(dict.fromkeys(part for part in parts if part.lower() not in _EMPTY))
        if text.lower() in _EMPTY:
            found = f" ({quote(text)} stands for an empty cell)" if text else ""
            raise DatasetError(
                f"{line.place}: no label in column {quote(self.label)}{found}: give one, or remove the row; "
                f"if images may have several labels or none, give separator={_SEPARATORS[0]} (or the sign "
                "that stands between labels here) and train for task multilabel"
            )
        return (text,)

    def _mark(self, line: Line, name: str) -> bool:
        text = self._cell(line, name)
        if text.lower() not in _MARKS:
            raise DatasetError(
                f"{line.place}: column {quote(name)}: expected 0 or 1, or false or true, found {quote(text)}"
            )
        return _MARKS[text.lower()]

    def _split(self, line: Line, split: str, column: str) -> str:
        text = self._cell(line, column)
        found = split_of(text)
        if split == "all":
            if found is None:
                raise DatasetError(
                    f"{line.place}: column {quote(column)}: expected train, val or test, found {quote(text)}"
                )
            return found
        if text and found != split:
            file = os.path.basename(line.file)
            raise DatasetError(
                f"{line.place}: column {quote(column)}: found {quote(text)} in the table of {split}: correct "
                "the cell, move the row to the table of its split, or remove the column; with option "
                f"labels={file} that table is the only one, and its column decides"
            )
        return split

    def _cell(self, line: Line, name: str) -> str:
        text = line.field(name)
        if text is None:  # Another file of the same data has other columns.
            raise DatasetError(
                f"{line.place}: no column {quote(name)}: found {name_some(line.values)}. All tables of the "
                "data need the same names of columns"
            )
        return str(text).strip()


def understand(line: Line, columns: Columns) -> Meaning:
    """Which columns mean what, by their names and the first row of a file.

    Raises:
        DatasetError: no paths or no labels, or a column that is not there.
    """
    header = list(line.values)
    path = find_column(header, line.file, "path_column", columns.path, _PATHS)
    label = find_column(header, line.file, "label_column", columns.label, LABELS)
    split = find_column(header, line.file, "split_column", columns.split, _SPLITS)
    if path is None:
        raise DatasetError(
            f"{line.file} has no column of paths: found {name_some(header)}. The first line has to "
            "name the columns; give path_column=..."
        )
    splits = _SPLITS if columns.split is None else (columns.split.strip().lower(),)
    others = [name for name in header if name not in (path, split)]
    if label is not None:
        return Meaning(path, label, columns.separator, [], splits)
    if len(others) > 1 and all(str(line.field(name)).strip().lower() in _MARKS for name in others):
        return Meaning(path, None, None, others, splits)
    shown = name_some(others) or "nothing"
    raise DatasetError(
        f"{line.file} has no column of labels beside {quote(path)}: found {shown}"
        "; give label_column=..., or a column of 0 and 1 for each class"
    )


def label_notes(rows: Iterable[Row], meaning: Meaning) -> list[str]:
    """What has to be said of labels in one column that may not mean what they say."""
    often = Counter(label for row in rows for label in row.labels)
    if meaning.label is None:
        return []
    notes = [
        f"{quote(name)} is taken for a class ({counted(often[name], 'images')}), not for an empty cell"
        for name in sorted(often)
        if name.lower() in _DOUBTFUL
    ]
    for sign in _SEPARATORS if meaning.separator is None else ():
        if joined := _joined(often, sign):
            notes.append(
                f"classes that are made of others: {name_some(joined)}; if these are several labels of an "
                f"image, give separator={sign} and train for task multilabel"
            )
    return notes


def _joined(names: Iterable[str], sign: str) -> list[str]:
    """The labels that are several with a sign between them, each of which stands in another label, too."""
    parts = {name: {part.strip() for part in name.split(sign)} for name in sorted(names)}
    often = Counter(part for own in parts.values() for part in own)
    return [name for name, own in parts.items() if len(own) > 1 and all(often[part] > 1 for part in own)]
