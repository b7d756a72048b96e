"""What the tables of the library `datasets` mean: which column has the images, which one the labels."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimtune.data.columns import LABELS
from vimtune.data.errors import DatasetError, ImageReadError
from vimtune.data.own.label_tables import class_order
from vimtune.data.own.layout import Layout, split_of
from vimtune.text import name_some, printable, quote, shorten

_IMAGES = ("image", "img", "picture", "photo")
"""Usual names of the column of images, of which the first here is taken where there are several."""
_EXPECTED = (
    "give dataset_kwargs path=<name on the Hugging Face hub>, or a <data-dir> that save_to_disk of datasets "
    "has made (a folder of images is the data set 'folder')"
)
"""What tells the user how the data are named."""
_MAX_REASON = 300
"""Characters of the library's reason that a message repeats."""


@dataclass(frozen=True)
class Columns:
    """What the user says of columns and splits; of what is None the usual names are looked for."""

    image: str | None
    label: str | None
    splits: Mapping[str, str | None]
    """Our split -> its name there."""


@dataclass(frozen=True)
class Labelled:
    """Images with labels, as tables have them."""

    layout: Layout
    """Names of the images by split and class."""
    rows: dict[str, tuple[str, int]]
    """Name of an image -> its table and row."""
    images: dict[str, Any]
    """Tables with nothing but the images, which are not decoded."""
    image_column: str
    """The column that has them."""


# --------------------------------------------------------------------------- opening


def open_tables(
    data_dir: Path | None, path: str | None, config: str | None, revision: str | None, download: bool
) -> tuple[str, dict[str, Any]]:
    """Open a data set.

    Args:
        data_dir: the folder in which it was saved; None where it is on the hub.
        path, config, revision: what it is called there.
        download: whether it may be fetched.

    Returns:
        What messages call it, and its tables by the names of the splits; "" for one without splits.

    Raises:
        DatasetError: it is not there, or cannot be read, or the library is not installed.
    """
    if (data_dir is None) == (path is None):
        both = "two places are named" if path is not None else "no place is named"
        raise DatasetError(f"data set 'hf': {both}: {_EXPECTED}.")
    if path is None and (config is not None or revision is not None):
        raise DatasetError("data set 'hf': config and revision are for a data set of the hub: give its path.")
    if data_dir is not None and not data_dir.is_dir():
        raise DatasetError(f"data set 'hf': data_dir {quote(str(data_dir))} is no folder: {_EXPECTED}.")
    if importlib.util.find_spec("datasets") is None:
        raise DatasetError(
            "data set 'hf' needs the package datasets, which is not installed: pip install datasets"
        )
    import datasets

    def fetch() -> Any:
        return datasets.load_dataset(path, config, revision=revision)

    def read() -> Any:
        return datasets.load_from_disk(str(data_dir))

    if path is None:
        place = printable(str(data_dir))
        tables = _attempt(read, f"{quote(str(data_dir))} cannot be read: {_EXPECTED}")
    else:
        place = printable(" ".join(filter(None, [path, config, revision])))
        if not download and not datasets.config.HF_HUB_OFFLINE:
            raise DatasetError(
                f"data set 'hf': {quote(path)} is on the hub, and nothing is to be downloaded: set "
                "HF_HUB_OFFLINE=1 to use what was downloaded before"
            )
        tables = _attempt(fetch, f"{quote(place)} cannot be taken from the Hugging Face hub")
    return place, dict(tables) if isinstance(tables, Mapping) else {"": tables}


def _attempt(action: Callable[[], Any], what: str) -> Any:
    """Call the library, whose errors and those of the libraries below it are many."""
    try:
        return action()
    except Exception as error:
        reason = printable(shorten(" ".join(str(error).split()) or type(error).__name__, _MAX_REASON))
        raise DatasetError(f"data set 'hf': {what} ({reason})") from error


# --------------------------------------------------------------------------- understanding


def read_labels(tables: Mapping[str, Any], place: str, columns: Columns) -> Labelled:
    """Read the labels of all images.

    Args:
        tables: those of `open_tables`.
        place: what messages call them.
        columns: what the user says of them.

    Raises:
        DatasetError: columns or splits that are not there or could mean several things, or images without
            labels among others.
    """
    import datasets

    named = _name_splits(list(tables), place, columns.splits)
    first = tables[next(iter(named.values()))].features
    image = _image_column(first, place, columns.image)
    label = _label_column(first, place, columns.label)
    unlabelled: list[str] = []
    parts: dict[str, list[Any]] = {}
    for split, name in named.items():
        table, where = tables[name], f"{place}, split {quote(name)}" if name else place
        if lacking := [column for column in (image, label) if column not in table.features]:
            raise DatasetError(f"{where} has no column {quote(lacking[0])}.")
        values = _read_column(table, label, where)
        if any(value is not None for value in values):
            parts[split] = values
        else:
            unlabelled.append(name)
    if not {"train", "all"} & parts.keys():
        raise DatasetError(f"{place}: its images for training have no labels in column {quote(label)}.")
    missing = f"no {{split}} split with labels{{unused}}: it has {name_some(tables)}."
    layout, rows = _lay_out(parts, named, first[label], place, missing)
    notes = layout.notes["all" if "all" in parts else "train"]
    if unused := [name for name in tables if name not in named.values()]:
        notes.append(f"not used: {name_some(unused)}")
    if unlabelled:
        notes.append(f"not used: {name_some(unlabelled)} without labels")
    raw = datasets.Image(decode=False)
    images = {named[split]: tables[named[split]].select_columns([image]) for split in parts}
    return Labelled(
        layout, rows, {name: table.cast_column(image, raw) for name, table in images.items()}, image
    )


def _lay_out(
    parts: Mapping[str, Sequence[Any]], named: Mapping[str, str], kind: Any, place: str, missing: str
) -> tuple[Layout, dict[str, tuple[str, int]]]:
    """The images by split and class, and table and row of each.

    Args:
        parts: labels of the images by split.
        named: the tables of the splits.
        kind: the type of a label there.
        place: what messages call the data.
        missing: as in `Layout`.

    Raises:
        DatasetError: a label that is none of the classes.
    """
    several = _inner(kind) is not kind
    classes, numbered = _classes(parts, getattr(_inner(kind), "names", None), several, place)
    often = Counter(number for own in numbered.values() for numbers in own for number in numbers)
    tags: dict[str, tuple[int, ...]] = {}
    rows: dict[str, tuple[str, int]] = {}
    layout = Layout(classes, tags=tags if several else None, missing=missing)
    for split, own in numbered.items():
        if split != "all":
            layout.names[split] = named[split]
        layout.parts[split] = []
        for row, numbers in enumerate(own):
            key = f"{named[split]}/{row}"
            rows[key], tags[key] = (named[split], row), numbers
            rarest = min(numbers, key=lambda number: (often[number], number), default=-1)
            layout.parts[split].append((key, rarest))
    return layout, rows


def _name_splits(tables: Sequence[str], place: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """Our splits and the names of theirs; "all" where one table has all images.

    Raises:
        DatasetError: a split that is not there, several that could be meant, or none to train on.
    """
    named: dict[str, str] = {}
    for split, name in given.items():
        found = [table for table in tables if split_of(table) == split] if name is None else [name]
        if name is not None and name not in tables:
            raise DatasetError(f"{split}_from = {quote(name)}: {place} has {name_some(tables)}.")
        others = [other for other in found if other not in given.values() or other == name]
        if len(others) > 1:
            raise DatasetError(
                f"{place}: {name_some(others)} could be the split {split}: give {split}_from=..."
            )
        if others:
            named[split] = others[0]
    if len(tables) == 1:
        return {"all": tables[0]}
    if "train" not in named:
        raise DatasetError(f"{place} has no split to train on, but {name_some(tables)}: give train_from=...")
    return named


def _image_column(features: Mapping[str, Any], place: str, given: str | None) -> str:
    import datasets

    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _choose("image", "images", found, features, _IMAGES, place, given)


def _label_column(features: Mapping[str, Any], place: str, given: str | None) -> str:
    import datasets

    possible = [name for name, kind in features.items() if _is_label(_inner(kind))]
    if given in features and given not in possible:
        raise DatasetError(f"label_column = {quote(given)}: {place} has no labels there.")
    found = [name for name in possible if isinstance(_inner(features[name]), datasets.ClassLabel)]
    found = found or [name for name in possible if name.lower() in LABELS]
    return _choose("label", "labels", found, features, LABELS, place, given)


def _inner(kind: Any) -> Any:
    """The type of what a list holds, and of anything else its own type."""
    return getattr(kind, "feature", kind)


def _is_label(kind: Any) -> bool:
    """Whether values of a type can be labels: names or whole numbers."""
    import datasets

    plain = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "string", "bool"))
    return plain or isinstance(kind, datasets.ClassLabel)


def _choose(
    option: str,
    what: str,
    found: Sequence[str],
    features: Mapping[str, Any],
    usual: Sequence[str],
    place: str,
    given: str | None,
) -> str:
    """The given column, or the only one that was found, or that of the most usual name.

    Raises:
        DatasetError: none, or several without a usual name.
    """
    shown = ", ".join(f"{quote(name)} ({type(kind).__name__})" for name, kind in features.items())
    if given is not None:
        if given not in features or (option == "image" and given not in found):
            raise DatasetError(f"{option}_column = {quote(given)}: {place} has the columns {shown}.")
        return given
    best = [name for name in usual if name in found]
    if len(found) == 1 or best:
        return found[0] if len(found) == 1 else best[0]
    problem = f"several columns of {what}" if found else f"no column of {what}"
    raise DatasetError(f"{place} has {problem}: {shown}; give {option}_column=...")


def _read_column(table: Any, column: str, where: str) -> list[Any]:
    """The values of the column of labels; None for an image without one."""
    values = table.with_format(None).select_columns([column])[:][column]
    labels = [None if value is None or value == -1 else value for value in values]
    missing = sum(label is None for label in labels)
    if 0 < missing < len(labels):
        raise DatasetError(f"{where}: {missing} of {len(labels)} images have no label: leave them out there.")
    return labels


def _classes(
    parts: Mapping[str, Sequence[Any]], names: Sequence[str] | None, several: bool, place: str
) -> tuple[list[str], dict[str, list[tuple[int, ...]]]]:
    """Names of the classes, and the numbers of those of every image by split.

    Args:
        parts: labels of the images.
        names: of the classes, where labels are numbers of these.
        several: whether an image has a list of labels.
        place: what messages call the data.

    Raises:
        DatasetError: a label that is none of the classes.
    """
    lists = {split: [own if several else [own] for own in values] for split, values in parts.items()}
    if names is not None:
        known = {number: number for number in range(len(names))}
        classes = [str(name) for name in names]
    else:
        learnt = lists.get("train", lists.get("all", []))
        values = sorted({value for own in learnt for value in own}, key=lambda value: class_order(str(value)))
        known = {value: number for number, value in enumerate(values)}
        classes = [str(value) for value in values]
    numbered: dict[str, list[tuple[int, ...]]] = {}
    for split, rows in lists.items():
        for own in rows:
            for value in own:
                if value not in known:
                    raise DatasetError(
                        f"{place}: label {quote(value)} in {split} is none of the classes to be learned "
                        f"({name_some(classes)})."
                    )
        numbered[split] = [tuple(sorted({known[value] for value in own})) for own in rows]
    return classes, numbered


# --------------------------------------------------------------------------- sizes


def image_sizes(table: Any, column: str) -> list[int]:
    """How many bytes each image of a table has, without reading them where the table knows.

    Raises:
        ImageReadError: the file of an image that lies outside of the table is gone.
    """
    import pyarrow.compute

    sizes: list[int] = []
    for chunk in table.with_format("arrow")[:][column].chunks:
        lengths = pyarrow.compute.binary_length(chunk.field("bytes")).to_pylist()
        paths = chunk.field("path").to_pylist() if None in lengths else lengths
        sizes += [
            _file_size(path) if length is None else length
            for length, path in zip(lengths, paths, strict=True)
        ]
    return sizes


def _file_size(path: str | None) -> int:
    """The size of a file; 0 where there is no image at all."""
    if path is None:
        return 0
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise ImageReadError(path, error.strerror or str(error)) from error
