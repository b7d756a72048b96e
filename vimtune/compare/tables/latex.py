"""The tables of a comparison as LaTeX."""

from __future__ import annotations

from collections.abc import Sequence

from vimtune.compare.results import Row, by_data
from vimtune.compare.tables.contents import details, overview
from vimtune.pages.section import Table
from vimtune.text import printable

_ESCAPES = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}
"""How LaTeX writes the characters that it takes for something else."""


def to_latex(rows: Sequence[Row]) -> str:
    """A `tabular` of the package booktabs for the overview of several data sets, and one for each of them."""
    tables = [overview(rows), *(details(name, group) for name, group in by_data(rows).items())]
    parts = [f"% {printable(table.caption)}\n{_tabular(table)}" for table in tables if table is not None]
    return "% needs \\usepackage{booktabs}\n\n" + "\n\n".join(parts) + "\n"


def _tabular(table: Table) -> str:
    body = [" & ".join(map(_escape, line)) + r" \\" for line in [table.heading, *table.rows]]
    rules = [r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(table.heading) - 1)}}}", *rules, r"\end{tabular}"])


def _escape(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in printable(text))
