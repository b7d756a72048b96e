"""The tables of a comparison as a Markdown document."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vimtune.compare.results import Row, best_of, by_data
from vimtune.compare.tables.contents import details, overview, paired, shown_differences
from vimtune.compare.tables.notes import PAIRED, remarks_on
from vimtune.pages.section import Table
from vimtune.text import escape_markdown


def to_markdown(
    rows: Sequence[Row], note: str, failures: Sequence[str] = (), reference: str | None = None
) -> str:
    """Everything: the note, the overview of several data sets, the differences from the reference, a table
    for each data set, and what failed.

    Args:
        rows: those of the comparison.
        note: what is said above the tables.
        failures: a line for each run that failed.
        reference: the method from which the differences of the others are shown; None for the first.
    """
    parts = ["# Comparison", note, *remarks_on(rows, escape_markdown)]
    if (table := overview(rows)) is not None:
        parts.append(_table(table))
    if differences := shown_differences(rows, reference):
        table = paired(differences)
        parts += [_section(table.caption), PAIRED, _table(table)]
    for name, group in by_data(rows).items():
        best = [group.index(row) for row in best_of(group)]
        parts += [_section(name), _table(details(name, group), best)]
    if failures:
        parts += [_section("Failed"), "\n".join(f"- {escape_markdown(failure)}" for failure in failures)]
    return "\n\n".join(parts) + "\n"


def _section(title: str) -> str:
    return f"## {escape_markdown(title)}"


def _table(table: Table, best: Collection[int] = ()) -> str:
    """A table. In the lines whose numbers are in `best` the second cell is bold, the most important score."""
    lines = [list(map(escape_markdown, table.heading)), ["---", *["---:"] * (len(table.heading) - 1)]]
    for number, line in enumerate(table.rows):
        cells = [escape_markdown(cell) for cell in line]
        if number in best:
            cells[1] = f"**{cells[1]}**"
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
