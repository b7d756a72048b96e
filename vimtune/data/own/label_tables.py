"""Labels of images in tables: which files have them, and what the images of a folder are by them.

The first line of a file names its columns, which commas, semicolons or tabs separate, in files whose names
end in .tsv tabs alone; `vimtune.data.own.label_columns` says what columns and cells mean. Paths of images
start at the folder of the data (or at one below it) and may lack their endings.

Nothing is guessed beyond that, and nothing is left out unsaid: an image that is not there, or a row without a
class where each image has one, is refused; images of the folder that no row names are counted in a note, and
so is the table of a split without any labels, as competitions publish that of the test images.

Tables without rows to train on can be scored.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vimtune.data.errors import DatasetError
from vimtune.data.own.label_columns import Columns, Row, label_notes, understand
from vimtune.data.own.label_images import TableImages
from vimtune.data.own.layout import Layout
from vimtune.data.text.lines import read_lines
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
    meaning, there = understand(first, columns), TableImages(base)
    unlabelled = {split: lines for split, lines in tables.items() if meaning.lacks_labels(lines[0])}
    rows: list[Row] = []
    for split, lines in tables.items():
        if split in unlabelled:
            meaning.pass_over(lines, there)
        else:
            rows += meaning.read(lines, split, there)
    there.demand_all()
    _refuse_twice(rows)
    classes = meaning.classes or sorted({label for row in rows for label in row.labels}, key=class_order)
    if len(classes) < 2:
        raise DatasetError(
            f"{first.file} has {len(classes)} classes ({name_some(classes) or 'none'}); a classifier "
            f"needs at least 2. {EXPECTED}"
        )
    layout = _layout(rows, classes, meaning.several)
    notes = layout.notes[next(split for split in _USUAL if split in layout.parts)]
    notes += label_notes(rows, meaning)
    notes += [f"not used: {quote(files[split].name)}, which has no column of labels" for split in unlabelled]
    used = [path.name for path in files.values()]
    if file is None and (others := [name for name in tables_in(root) if name not in used]):
        notes.append(f"not used: {name_some(others)} beside {name_some(used)}")
    if unused := there.unused():
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
    if not there:
        raise DatasetError(f"{_show(root)} has no file of labels. {EXPECTED}")
    return there


def tables_in(root: Path) -> list[str]:
    """The files in a folder that have usual names of tables of labels."""
    return [name for names in _USUAL.values() for name in names if (root / name).is_file()]


def _below(root: Path, name: str, what: str) -> Path:
    """A path below a folder.

    Raises:
        DatasetError: it leads out of the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DatasetError(f"{what} = {quote(name)}: expected a path below {_show(root)}")
    return root / path


def _refuse_twice(rows: Iterable[Row]) -> None:
    """Raise DatasetError if two rows are about one image."""
    places: dict[str, str] = {}
    for row in rows:
        if row.path in places:
            raise DatasetError(
                f"{row.place}: {_show(row.path)} stands in {places[row.path]} already: give each image one "
                "row (separator=... lets it have several labels)"
            )
        places[row.path] = row.place


def _layout(rows: Sequence[Row], classes: Sequence[str], several: bool) -> Layout:
    """The images by split and class, in the order of their paths.

    Raises:
        DatasetError: images of a class of which train has none.
    """
    number = {name: label for label, name in enumerate(classes)}
    labels = {row.path: tuple(sorted(number[name] for name in row.labels)) for row in rows}
    often = Counter(label for own in labels.values() for label in own)
    tags = labels if several else None
    layout = Layout(list(classes), tags=tags, missing="no {split} images{unused}: no row is one of {split}.")
    for row in sorted(rows, key=lambda row: row.path):
        rarest = min(labels[row.path], key=lambda label: (often[label], label), default=-1)
        layout.parts.setdefault(row.split, []).append((row.path, rarest))
    if "all" in layout.parts:
        return layout
    layout.names.update({split: f"rows of {split}" for split in layout.parts})
    if not several and "train" in layout.parts:
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
