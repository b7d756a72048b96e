"""All tables and pictures of a comparison as the files of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vimtune.compare.pictures import draw_curves, draw_differences, draw_pareto
from vimtune.compare.results import Row
from vimtune.compare.tables.contents import shown_differences
from vimtune.compare.tables.csv import paired_to_csv, rates_to_csv, runs_to_csv, to_csv
from vimtune.compare.tables.latex import to_latex
from vimtune.compare.tables.markdown import to_markdown
from vimtune.output import write_text
from vimtune.pages.style import save_picture

CURVES = "curves.png"
"""Name of the picture of the scores in training."""


def write_tables(
    rows: Sequence[Row], folder: Path, note: str, failures: Sequence[str], reference: str | None = None
) -> list[str]:
    """Write all tables and pictures of a comparison, each file whole or not at all.

    Args:
        rows: those of the comparison.
        folder: where the files go.
        note: what is said above the tables.
        failures: a line for each run that failed.
        reference: the method from which the differences of the others are shown; None for the first.

    Returns:
        The names of the files.

    Raises:
        OutputError: the system refuses to write.
    """
    texts = {
        "table.md": to_markdown(rows, note, failures, reference),
        "table.csv": to_csv(rows),
        "runs.csv": runs_to_csv(rows),
        "rates.csv": rates_to_csv(rows),
        "paired.csv": paired_to_csv(rows),
        "table.tex": to_latex(rows),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    pictures = {"pareto.png": draw_pareto(rows), CURVES: draw_curves(rows)}
    if differences := shown_differences(rows, reference):
        pictures["paired.png"] = draw_differences(differences)
    for name, picture in pictures.items():
        save_picture(picture, folder / name)
    return [*texts, *pictures]
