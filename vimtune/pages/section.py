"""What a page is made of. How it is written is the business of `page.py`.

A notebook asks a value how it is shown, by methods that IPython has named: `_repr_html_`, `_repr_png_`,
`_ipython_display_`. So a table, a picture and a section show themselves in a cell as they do on a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    caption: str
    """One line above it."""
    heading: Sequence[str]
    """Titles of the columns."""
    rows: Sequence[Sequence[str]]
    """Its cells, line by line; the first of a line is its name."""

    def _repr_html_(self) -> str:
        from vimtune.pages.page import table_to_html  # Late: matplotlib takes long to import.

        return table_to_html(self)


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows."""

    caption: str
    """What is to be seen, in whole sentences."""
    figure: Figure | Path
    """The drawing, or a PNG file that has it. A file that is not there, because drawing has failed, leaves
    the picture out."""

    def _repr_png_(self) -> bytes | None:
        from vimtune.pages.page import picture_to_png  # Late: matplotlib takes long to import.

        return picture_to_png(self)


@dataclass(frozen=True)
class Photo:
    """One of several images that are shown side by side."""

    load: Callable[[], Image.Image]
    """Gives the image, of any size, in RGB."""
    lines: Sequence[str]
    """Short lines below it."""
    title: str
    """What a pointer over it shows, such as its path."""


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    """Heading."""
    explanation: str
    """What was measured and by which formula, for a reader who has not seen the code."""
    findings: Sequence[str]
    """The result in a few sentences with numbers; the terminal may show these, too."""
    numbers: dict[str, Any]
    """Everything that was measured, as plain values for JSON."""
    tables: Sequence[Table] = field(default_factory=tuple)
    """In the order of the page, after the pictures."""
    pictures: Sequence[Picture] = field(default_factory=tuple)
    """In the order of the page."""
    photos: Sequence[Photo] = field(default_factory=tuple)
    """In the order of the page, before the tables."""

    def _ipython_display_(self) -> None:
        """Show everything in the order of the page; photographs become one picture."""
        from IPython.display import HTML, display  # IPython itself calls this.

        from vimtune.pages.page import findings_to_html
        from vimtune.pages.photos import draw_photos

        display(HTML(findings_to_html([self])))
        display(*self.pictures)
        if self.photos:
            display(Picture(self.title, draw_photos([(self.photos, "black")])))
        display(*self.tables)
