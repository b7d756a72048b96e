"""A page as one HTML file: it needs no other file, asks for nothing from anywhere and runs no code."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vimtune.pages.section import Photo, Picture, Section, Table
from vimtune.pages.style import picture_style
from vimtune.text import printable

DPI = 110
"""Dots per inch of the pictures."""
PHOTO_SIDE = 160
"""Pixels to which the longer side of a photograph is reduced."""
PHOTO_QUALITY = 85
"""Quality of photographs, as JPEG counts it."""

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color:
#222; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.finding { background: #eef4fb; border-left: 4px solid #4a7ebb; padding: .5rem .8rem; margin: .5rem 0; } .wide
{ overflow-x: auto; max-height: 30rem; overflow-y: auto; } table { border-collapse: collapse; font-size: 13px;
} caption { text-align: left; font-weight: 600; padding: .3rem 0; } th, td { padding: .15rem .6rem;
text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; } th:first-child, td:first-child {
text-align: left; } .facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; } .facts
td:first-child { white-space: nowrap; } figure { margin: 1.2rem 0; } figcaption { color: #555; font-size:
13px; } img { max-width: 100%; } .photos { display: flex; flex-wrap: wrap; gap: .8rem; } .photos figure {
margin: 0; width: 160px; } .photos img { width: 100%; } .photos figcaption {
overflow-wrap: anywhere; line-height: 1.3; }
"""
"""The look of the page."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets the page do, whatever the texts in it say."""


@dataclass(frozen=True)
class Page:
    """A heading, facts, and sections."""

    command: str
    """The command that has made it, for the title of the window."""
    title: str
    """Heading."""
    facts: Iterable[tuple[str, str]]
    """What the page is about: names and values, in the table at its top."""
    sections: Sequence[Section]
    """In the order of the page."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What could have been there and is not, and why."""

    def to_html(self) -> str:
        """The page, with all pictures inside it."""
        facts = "".join(f"<tr><td>{_text(name)}</td><td>{_text(text)}</td></tr>" for name, text in self.facts)
        parts = [f'<h1>{_text(self.title)}</h1><table class="facts">{facts}</table>']
        parts += [_section(section) for section in self.sections]
        if self.left_out:
            lines = "".join(f"<li>{_text(name)}: {_text(why)}</li>" for name, why in self.left_out.items())
            parts.append(f"<h2>Left out</h2><ul>{lines}</ul>")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{_text(self.command)}</title><style>{STYLE}</style></head>\n<body>\n"
            + "\n".join(parts)
            + "\n</body></html>\n"
        )


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section) -> str:
    findings = "".join(f'<p class="finding">{_text(finding)}</p>' for finding in section.findings)
    body = [f"<h2>{_text(section.title)}</h2>", findings, f"<p>{_text(section.explanation)}</p>"]
    body += [_figure(picture) for picture in section.pictures]
    if section.photos:
        body.append(f'<div class="photos">{"".join(map(_photo, section.photos))}</div>')
    body += [table_to_html(table) for table in section.tables]
    return "\n".join(body)


def findings_to_html(sections: Iterable[Section]) -> str:
    """The titles and findings of sections, for a place that has the style of others."""
    return "".join(
        f"<h4>{_text(section.title)}</h4>"
        + "".join(f"<p>{_text(finding)}</p>" for finding in section.findings)
        for section in sections
    )


def table_to_html(table: Table) -> str:
    """A table; every text in it stays a text."""
    heading = "".join(f"<th>{_text(title)}</th>" for title in table.heading)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>"
    return f'<div class="wide"><table>{caption}<tr>{heading}</tr>\n{rows}</table></div>'


def _figure(picture: Picture) -> str:
    content = picture_to_png(picture)
    if content is None:
        return ""
    return f"<figure>{_image('png', content)}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def _photo(photo: Photo) -> str:
    image = photo.load()
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=PHOTO_QUALITY)
    lines = "<br>".join(map(_text, photo.lines))
    source = _image("jpeg", file.getvalue(), photo.title)
    return f"<figure>{source}<figcaption>{lines}</figcaption></figure>"


def _image(kind: str, content: bytes, title: str = "") -> str:
    encoded = base64.b64encode(content).decode("ascii")
    named = f' title="{_text(title)}"' if title else ""
    return f'<img alt=""{named} src="data:image/{kind};base64,{encoded}">'


def picture_to_png(picture: Picture) -> bytes | None:
    """A picture as the contents of a PNG file; None for a file that is not there."""
    drawn = picture.figure
    if isinstance(drawn, Path):
        return drawn.read_bytes() if drawn.is_file() else None
    return to_png(drawn)


def to_png(figure: Figure) -> bytes:
    """A picture as the contents of a PNG file."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with picture_style():
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
