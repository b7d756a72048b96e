"""Labels of images in tables: which columns mean what, and which image a row is about.

The first line of a file names its columns, which commas, semicolons or tabs separate, in files whose names
end in .tsv tabs alone. One column has the
paths of the images, which start at the folder of the data (or at one below it) and may lack their endings.
The labels are

- one column: the class of each image, or with a separator any number of them;
- or a column for each class, with 1 where an image has it and 0 or nothing where not.

A column may say to which split an image belongs, in words that `vimtune.data.own.layout.split_of` knows.
Nothing is guessed beyond that, and nothing is left out: an image that is not there, or a row without a class
where each image has one, is refused, and images of the folder that no row names are counted in a note.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vimtune.data.columns import LABELS, find_column
from vimtune.data.errors import DatasetError
from vimtune.data.files.images import find_images
from vimtune.data.own.layout import Layout, split_of
from vimtune.data.text.lines import Line, read_lines
from vimtune.text import name_some, printable, quote

EXPECTED = (
    "Expected <data-dir>/labels.csv (or metadata.csv; or train.csv with val.csv and test.csv; with tabs also "
    ".tsv), whose first line names the columns, such as path,label or path,label,split, and the images "
    "beside it."
)
"""The sentence that tells the user which files are understood."""

_USUAL = {
    "all": ("labels.csv", "labels.tsv", "metadata.csv", "metadata.tsv"),
    "train": ("train.csv", "train.tsv"),
    "val": ("val.csv", "val.tsv", "valid.csv", "valid.tsv", "validation.csv", "validation.tsv"),
    "test": ("test.csv", "test.tsv"),
}
"""Usual names of the files that have all images, or those of one split; of several the first is used."""
_PATHS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_name"),
    *("image_id", "img", "img_path", "photo", "id"),
)
"""Usual names of the column of paths, in lower case; of several in one file the first here is taken."""
_SPLITS = ("split", "set", "subset", "partition")
"""Usual names of the column of splits, likewise."""
_MARKS = {"1": True, "1.0": True, "0": False, "0.0": False, "": False}
"""What may stand in the column of a class, and whether the image has it."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns; of those that are None the usual names are looked for."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    separator: str | None = None
    """The sign between the labels of an image."""


@dataclass(frozen=True)
class _Row:
    """What a row says of its image."""

    place: str
    """Where it stands, for messages."""
    path: str
    """The image."""
    labels: tuple[str, ...]
    """Names of its classes."""
    split: str
    """Its split; "all" where the file does not say."""


def read_tables(root: Path, *, file: str | None, images: str | None, columns: Columns) -> Layout:
    """Read the labels of the images in a folder.

    Args:
        root: the folder.
        file: the table below it; None for the usual names.
        images: the folder below it at which paths start; None for itself.
        columns: which columns mean what.

    Raises:
        DatasetError: no file, one that is not understood, or images that are not there.
        ImageReadError: a folder cannot be read.
    """
    files = _find(root, file)
    tables = {split: read_lines(path) for split, path in files.items()}
    base = root if images is None else _below(root, images, "images")
    if not base.is_dir():
        raise DatasetError(f"images = {quote(images)} is no folder in {_show(root)}. {EXPECTED}")
    first = next(iter(tables.values()))[0]
    meaning = _understand(first, columns)
    resolve = _Images(base)
    rows = [row for split, lines in tables.items() for row in meaning.read(lines, split, resolve)]
    resolve.demand_all()
    _refuse_twice(rows)
    classes = meaning.classes or sorted({label for row in rows for label in row.labels}, key=class_order)
    if len(classes) < 2:
        raise DatasetError(
            f"{first.file} has {len(classes)} classes ({name_some(classes) or 'none'}); a classifier "
            f"needs at least 2. {EXPECTED}"
        )
    layout = _layout(rows, classes, meaning.several)
    notes = layout.notes["all" if "all" in layout.parts else "train"]
    if file is None and (others := _other_tables(root, files.values())):
        used = name_some(path.name for path in files.values())
        notes.append(f"not used: {name_some(others)} beside {used}")
    if unused := resolve.unused():
        shown = printable(os.path.relpath(unused[0], root))
        notes.append(f"not used: {len(unused)} images that no row names (such as {shown})")
    return layout


def _find(root: Path, file: str | None) -> dict[str, Path]:
    """The files to read by the split whose images each has; "all" where its rows or nobody says it.

    Raises:
        DatasetError: there are none.
    """
    if file is not None:
        path = _below(root, file, "labels")
        if not path.is_file():
            raise DatasetError(f"labels = {quote(file)} is no file in {_show(root)}. {EXPECTED}")
        return {"all": path}
    found = {
        split: next((root / name for name in names if (root / name).is_file()), None)
        for split, names in _USUAL.items()
    }
    there = {split: path for split, path in found.items() if path is not None}
    if "all" in there:
        return {"all": there["all"]}
    if "train" not in there:
        raise DatasetError(f"{_show(root)} has no file of labels. {EXPECTED}")
    return there


def _other_tables(root: Path, used: Iterable[Path]) -> list[str]:
    """The files with usual names in a folder beside those that are used."""
    known = {path.name for path in used}
    names = (name for names in _USUAL.values() for name in names)
    return [name for name in names if name not in known and (root / name).is_file()]


def _below(root: Path, name: str, what: str) -> Path:
    """A path below a folder.

    Raises:
        DatasetError: it leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DatasetError(f"{what} = {quote(name)}: expected a path below {_show(root)}")
    return root / path


# --------------------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Meaning:
    """Which columns of a file mean what."""

    path: str
    split: str | None
    label: str | None
    """The column of labels; None where each class has a column."""
    separator: str | None
    classes: list[str]
    """The classes that have a column each."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels or none."""
        return self.label is None or self.separator is not None

    def read(self, lines: Sequence[Line], split: str, images: _Images) -> Iterable[_Row]:
        """What the rows of a file say, whose images all belong to `split` unless it is "all".

        Raises:
            DatasetError: a row that is not understood.
        """
        for line in lines:
            text = self._cell(line, self.path)
            if not text:
                raise DatasetError(f"{line.place}: no path in column {quote(self.path)}")
            yield _Row(
                line.place, images.find(text, line.place), self._labels(line), self._split(line, split)
            )

    def _labels(self, line: Line) -> tuple[str, ...]:
        if self.label is None:
            return tuple(name for name in self.classes if self._mark(line, name))
        text = self._cell(line, self.label)
        if self.separator is not None:
            return tuple(dict.fromkeys(part.strip() for part in text.split(self.separator) if part.strip()))
        if not text:
            raise DatasetError(
                f"{line.place}: no label in column {quote(self.label)}: give one, or remove the row"
            )
        return (text,)

    def _mark(self, line: Line, name: str) -> bool:
        text = self._cell(line, name)
        if text not in _MARKS:
            raise DatasetError(f"{line.place}: column {quote(name)}: expected 0 or 1, found {quote(text)}")
        return _MARKS[text]

    def _split(self, line: Line, split: str) -> str:
        if split != "all" or self.split is None:
            return split
        text = self._cell(line, self.split)
        found = split_of(text)
        if found is None:
            raise DatasetError(
                f"{line.place}: column {quote(self.split)}: expected train, val or test, found {quote(text)}"
            )
        return found

    def _cell(self, line: Line, name: str) -> str:
        text = line.field(name)
        if text is None:  # Another file of the same data has other columns.
            raise DatasetError(f"{line.place}: no column {quote(name)}")
        return str(text).strip()


def _understand(line: Line, columns: Columns) -> _Meaning:
    """Which columns mean what, by their names and the first row of a file.

    Raises:
        DatasetError: no paths or no labels, or a column that is not there.
    """
    header = list(line.values)
    path = find_column(header, line.file, "path_column", columns.path, _PATHS)
    split = find_column(header, line.file, "split_column", columns.split, _SPLITS)
    label = find_column(header, line.file, "label_column", columns.label, LABELS)
    if path is None:
        raise DatasetError(
            f"{line.file} has no column of paths: found {name_some(header)}. The first line has to "
            "name the columns; give path_column=..."
        )
    others = [name for name in header if name not in (path, split)]
    if label is not None:
        return _Meaning(path, split, label, columns.separator, [])
    if len(others) > 1 and all(str(line.field(name)).strip() in _MARKS for name in others):
        return _Meaning(path, split, None, None, others)
    shown = name_some(others) or "nothing"
    raise DatasetError(
        f"{line.file} has no column of labels beside {quote(path)}: found {shown}"
        "; give label_column=..., or a column of 0 and 1 for each class"
    )


# --------------------------------------------------------------------------- images


class _Images:
    """The images below a folder, as rows name them."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._found = find_images(base).paths
        names = [PurePosixPath(os.path.relpath(path, base).replace(os.sep, "/")) for path in self._found]
        self._by_name = {str(name): path for name, path in zip(names, self._found, strict=True)}
        stems = Counter(str(name.with_suffix("")) for name in names)
        self._by_stem = {
            stem: path
            for name, path in zip(names, self._found, strict=True)
            if stems[stem := str(name.with_suffix(""))] == 1
        }
        self._named: set[str] = set()
        self._missing: list[tuple[str, str]] = []

    def find(self, text: str, place: str) -> str:
        """The image that a row at `place` names by `text`; `demand_all` reports one that is not there.

        Raises:
            DatasetError: it is no path below the folder.
        """
        path = Path(text.replace("\\", "/"))
        if path.is_absolute() and path.is_relative_to(self._base.absolute()):
            path = path.relative_to(self._base.absolute())
        if path.is_absolute() or ".." in path.parts or "\0" in text or not path.name:
            raise DatasetError(f"{place}: {quote(text)} is no path of an image below {_show(self._base)}")
        name = path.as_posix()
        found = self._by_name.get(name) or self._by_stem.get(name)
        if found is None:
            found = str(self._base / path)
            if not os.path.isfile(found):
                self._missing.append((place, text))
        self._named.add(found)
        return found

    def demand_all(self) -> None:
        """Raise DatasetError if images that rows name are not there."""
        if self._missing:
            place, text = self._missing[0]
            count = f"{len(self._missing)} of {len(self._named)} images"
            raise DatasetError(
                f"{count} are not in {_show(self._base)}, such as {quote(text)} ({place}). "
                "Paths start at that folder; name another one below the data by images=..."
            )

    def unused(self) -> list[str]:
        """The images that no row has named."""
        return [path for path in self._found if path not in self._named]


def _refuse_twice(rows: Iterable[_Row]) -> None:
    """Raise DatasetError if two rows are about one image."""
    places: dict[str, str] = {}
    for row in rows:
        if row.path in places:
            raise DatasetError(
                f"{row.place}: {_show(row.path)} stands in {places[row.path]} already: give each image one "
                "row (separator=... lets it have several labels)"
            )
        places[row.path] = row.place


# --------------------------------------------------------------------------- the layout


def _layout(rows: Sequence[_Row], classes: Sequence[str], several: bool) -> Layout:
    """The images by split and class, in the order of their paths.

    Raises:
        DatasetError: splits without train, or images of a class of which train has none.
    """
    number = {name: label for label, name in enumerate(classes)}
    labels = {row.path: tuple(sorted(number[name] for name in row.labels)) for row in rows}
    often = Counter(label for own in labels.values() for label in own)
    tags = labels if several else None
    layout = Layout(list(classes), tags=tags, missing="no test images{unused}: no row says so.")
    for row in sorted(rows, key=lambda row: row.path):
        rarest = min(labels[row.path], key=lambda label: (often[label], label), default=-1)
        layout.parts.setdefault(row.split, []).append((row.path, rarest))
    if "all" in layout.parts:
        return layout
    layout.names.update({split: f"rows of {split}" for split in layout.parts})
    if "train" not in layout.parts:
        raise DatasetError(f"no row is one of train, but of {name_some(layout.parts)}. {EXPECTED}")
    if not several:
        known = {label for _, label in layout.parts["train"]}
        if extra := sorted({label for part in layout.parts.values() for _, label in part} - known):
            raise DatasetError(
                f"train has no images of {name_some(classes[label] for label in extra)}, which other splits "
                "have: nothing could be learned of them"
            )
    return layout


def class_order(name: str) -> tuple[int, int, str]:
    """Key by which classes are sorted: whole numbers by their value, before names."""
    return (0, int(name), name) if name.isascii() and name.isdigit() and len(name) < 19 else (1, 0, name)


def _show(path: str | os.PathLike[str]) -> str:
    return printable(os.fspath(path))
