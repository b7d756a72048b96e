"""Tables of Markdown, read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markdown.extensions.toc import slugify


@dataclass(frozen=True)
class Table:
    """A table of a document."""

    title: str
    """The heading below which it stands."""
    header: list[str]
    """What its columns are called."""
    rows: list[list[str]]
    """Its cells."""

    @property
    def anchor(self) -> str:
        """The name of the heading in an address."""
        return slugify(self.title, "-")


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def read_tables(text: str) -> Iterator[Table]:
    """The tables of a document in their order."""
    title, lines = "", text.splitlines()
    for number, line in enumerate(lines):
        if heading := re.match(r"#+ (.+)", line):
            title = heading[1]
        if re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            rows = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                rows.append(_cells(row))
            yield Table(title, _cells(lines[number - 1]), rows)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
