"""The tables of a comparison on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as TerminalTable

from vimtune.compare.results import Row, by_data
from vimtune.compare.tables.contents import details, overview, paired, shown_differences
from vimtune.compare.tables.notes import remarks_on
from vimtune.console import neutral, print_line
from vimtune.pages.section import Table
from vimtune.text import shorten


def print_rows(rows: Sequence[Row], console: Console, reference: str | None = None) -> None:
    """Print the overview of several data sets, the differences from the reference, and the table about each
    data set.

    Args:
        rows: those of the comparison.
        console: where to.
        reference: the method from which the differences of the others are shown; None for the first.
    """
    if (table := overview(rows)) is not None:
        _print_table(table.caption, table, console)
    if differences := shown_differences(rows, reference):
        table = paired(differences)
        _print_table(f"{table.caption}, ± standard error", table, console)
    for name, group in by_data(rows).items():
        _print_table(name, details(name, group), console)
    for remark in remarks_on(rows):
        print_line(console, remark)


def _print_table(title: str, table: Table, console: Console) -> None:
    print_line(console, "")
    print_line(console, title)
    printed = TerminalTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(table.heading):
        text = neutral(heading, console)
        printed.add_column(text, justify="right" if number else "left", overflow="fold", no_wrap=number == 0)
    for line in table.rows:
        printed.add_row(*(neutral(shorten(cell), console) for cell in line))
    console.print(printed)
