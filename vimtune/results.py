"""Predictions as CSV, as JSON and as a table on the terminal.

Class names and paths are somebody's text. Nothing of it is taken for a formula, for markup or for an
instruction to the terminal. Files are UTF-8. A byte of a path that is not UTF-8 is written as \\udcXX,
where XX is the byte in hexadecimal: in JSON that is an escape which readers undo, so that
`os.fsencode(path)` gives the file's name back.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vimtune.console import print_line
from vimtune.output import write_output
from vimtune.text import csv_cell, printable

SHOWN_IMAGES = 40
"""Rows of the printed table; the files written hold all of them."""
ROOM = 160
"""Columns of a table that goes to a file or a pipe."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first.

    Attributes:
        path: the image file.
        indices: numbers of the classes.
        classes: their names.
        probabilities: softmax of their logits, in [0, 1].
    """

    path: str
    indices: list[int]
    classes: list[str]
    probabilities: list[float]


def to_csv(predictions: Sequence[Prediction]) -> str:
    """One row per image: path, class1, probability1, class2, probability2, ..."""
    ranks = range(1, max((len(p.classes) for p in predictions), default=0) + 1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *(f"{name}{rank}" for rank in ranks for name in ("class", "probability"))])
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        cells = (cell for name, value in pairs for cell in (csv_cell(name), f"{value:.6f}"))
        writer.writerow([csv_cell(p.path), *cells])
    return text.getvalue()


def to_json(predictions: Sequence[Prediction]) -> str:
    """A list of {"path", "predictions": [{"class", "index", "probability"}, ...]}."""
    rows = [
        {
            "path": p.path,
            "predictions": [
                {"class": name, "index": index, "probability": value}
                for name, index, value in zip(p.classes, p.indices, p.probabilities, strict=True)
            ],
        }
        for p in predictions
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Prediction]], str]] = {".csv": to_csv, ".json": to_json}
"""How a file is written whose name ends so."""


def write_predictions(output: Path, predictions: Sequence[Prediction]) -> None:
    """Write `output` in the format that its name asks for.

    Raises:
        OutputError: the disk is full, or the like; an earlier file is then as it was.
    """
    content = FORMATS[output.suffix.lower()](predictions).encode("utf-8", "backslashreplace")

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_output(output, write)


def build_table(predictions: Sequence[Prediction]) -> Table:
    """Image, best class, its probability, then the other classes: at most `SHOWN_IMAGES` rows."""
    shown = predictions[:SHOWN_IMAGES]
    folder = _common_folder([p.path for p in shown]) if len(shown) > 1 else ""
    # Folded, because a shortened name would be another one.
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(_plain(f"image in {folder}" if folder else "image"), overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    if any(len(p.classes) > 1 for p in shown):
        table.add_column("then", overflow="fold")
    for p in shown:
        pairs = list(zip(p.classes, p.probabilities, strict=True))
        cells = [
            os.path.relpath(p.path, folder) if folder else p.path,
            pairs[0][0],
            f"{100 * pairs[0][1]:.1f} %",
            ", ".join(f"{name} {100 * value:.0f} %" for name, value in pairs[1:]),
        ]
        table.add_row(*map(_plain, cells[: len(table.columns)]))
    return table


def _common_folder(paths: Sequence[str]) -> str:
    return os.path.commonpath([os.path.abspath(os.path.dirname(path)) for path in paths])


def _plain(text: str) -> Text:
    """`text` for rich, which parses markup and emoji codes in a str, but not in this."""
    return Text(printable(text))


def print_predictions(predictions: Sequence[Prediction], console: Console) -> None:
    """Print the table, and how many images it leaves out."""
    if not console.is_terminal:
        console.width = max(console.width, ROOM)
    if predictions:
        console.print(build_table(predictions))
    if len(predictions) > SHOWN_IMAGES:
        more = len(predictions) - SHOWN_IMAGES
        print_line(console, f"... and {more} more images; --output writes all of them")
