"""The confusion matrix as a table and as a picture, readable for few and for many classes. C classes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

from vimtune.files import atomic_write
from vimtune.pages import style
from vimtune.pages.style import font_families, picture_style, whole_numbers
from vimtune.run_folder import writing
from vimtune.text import printable, shorten, table_cell

MAX_NAMED_CLASSES = 30
"""More names than this cannot be read beside a confusion matrix."""
MAX_COUNTED_CLASSES = 20
"""Of more classes than this, the numbers in the cells of a confusion matrix cannot be read."""
MAX_NAME = 28
"""Characters of a class name that are shown."""
CONFUSION_PICTURE, CONFUSION_TABLE = "confusion_matrix.png", "confusion_matrix.csv"
"""Names of the picture and of the table in a run folder."""


def confusion_files(
    confusion: Tensor, classes: Sequence[str], title: str
) -> dict[str, Callable[[Path], None]]:
    """The confusion matrix of a result: names of files, and functions that write them.

    Args:
        confusion: counts of examples by true class and answer, (C, C).
        classes: C names.
        title: stands above the picture.
    """
    return {
        CONFUSION_TABLE: lambda path: write_confusion_table(confusion, classes, path),
        CONFUSION_PICTURE: lambda path: style.save_picture(
            draw_confusion_matrix(confusion, classes, title), path
        ),
    }


def confusion_title(confusion: Tensor, split: str, examples: str) -> str:
    """What stands above the picture: how many `examples`, such as "images", of a split were right."""
    right, count = int(confusion.diag().sum()), int(confusion.sum())
    return f"{split}: {100.0 * right / max(1, count):.1f} % of {count:,} {examples} right"


def write_confusion_table(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Write counts of examples as CSV: a row for each true class, a column for each answer."""
    names = [table_cell(name) for name in classes]

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["number", "true class", *names])
            for number, (name, counts) in enumerate(zip(names, confusion, strict=True)):
                writer.writerow([number, name, *counts.tolist()])

    with writing(path):
        atomic_write(path, write)


def draw_confusion_matrix(
    confusion: Tensor, classes: Sequence[str], title: str, numbered_in: str = CONFUSION_TABLE
) -> Figure:
    """Share of each true class (row) that was given each answer (column).

    Few classes have their counts of examples in the cells. Where names cannot be read or drawn, numbers in
    the order of the data set stand for them.

    Args:
        confusion: counts of examples, (C, C).
        classes: C names.
        title: stands above it.
        numbered_in: where a reader finds what the numbers mean.
    """
    with picture_style():
        number = len(classes)
        shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
        named, counted = number <= MAX_NAMED_CLASSES, number <= MAX_COUNTED_CLASSES
        names = class_labels(classes) if named else []
        numbered = not named or bool(undrawable(classes))
        cells = number * (0.42 if counted else 0.26) if named else 7.0
        side = max(3.0, cells) + 0.075 * max(map(len, names), default=0)
        figure = Figure(figsize=(side + 1.6, side + 0.8), layout="constrained")
        axes = figure.add_subplot()
        picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        hint = f" (numbers: see {numbered_in})" if numbered else ""
        axes.set(xlabel=f"predicted class{hint}", ylabel=f"true class{hint}")
        if named:
            axes.set_xticks(range(number), names, rotation=90, fontsize=8)
            axes.set_yticks(range(number), names, fontsize=8)
        else:
            axes.xaxis.set_major_locator(whole_numbers())
            axes.yaxis.set_major_locator(whole_numbers())
        if counted:
            _write_counts(axes, confusion, shares)
        axes.set_title(title)
        figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
        return figure


def class_labels(classes: Sequence[str]) -> list[str]:
    """Short names on one line; a class whose name no font can show is called by its number."""
    unshown = set(undrawable(classes))
    return [
        f"class {index}" if index in unshown else shorten(printable(name), MAX_NAME)
        for index, name in enumerate(classes)
    ]


def undrawable(classes: Sequence[str]) -> list[int]:
    """Numbers of the classes whose names have a character that no font at hand has."""
    shown = [printable(name) for name in classes]
    if all(map(str.isascii, shown)):
        return []
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in font_families()]
    known = {character for font in fonts for character in font.get_charmap()}
    return [index for index, name in enumerate(shown) if not known.issuperset(map(ord, name))]


def _write_counts(axes: Axes, confusion: Tensor, shares: Tensor) -> None:
    """The number of examples in each cell that has any, light on dark and dark on light."""
    for true, row in enumerate(confusion.tolist()):
        for predicted, count in enumerate(row):
            if count:
                color = "white" if shares[true, predicted] > 0.5 else "black"
                size = 8 if count < 1000 else 6
                axes.text(predicted, true, str(count), ha="center", va="center", color=color, fontsize=size)
