"""The report: one HTML file that needs nothing else, and one JSON file with every number."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vimtune.analysis.section import Picture, Section, Table
from vimtune.schema import finite_json
from vimtune.text import printable, unicode_text
from vimtune.training.pictures import picture_style

DPI = 110
"""Dots per inch of the pictures."""

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color:
#222; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
.finding { background: #eef4fb; border-left: 4px solid #4a7ebb; padding: .5rem .8rem; margin: .5rem 0; } .wide
{ overflow-x: auto; max-height: 30rem; overflow-y: auto; } table { border-collapse: collapse; font-size: 13px;
} caption { text-align: left; font-weight: 600; padding: .3rem 0; } th, td { padding: .15rem .6rem;
text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; } th:first-child, td:first-child {
text-align: left; } figure { margin: 1.2rem 0; } figcaption { color: #555; font-size: 13px; } img { max-width:
100%; }
"""
"""The look of the page."""


@dataclass(frozen=True)
class AnalysisReport:
    """Sections by the name of their analysis, and what has been analysed."""

    facts: Mapping[str, str]
    """What was analysed, and with what, in words."""
    sections: Mapping[str, Section]
    """In the order of the report."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Analyses that had nothing to say, and why."""

    def to_json(self) -> str:
        """Facts and numbers; numbers that are not finite are null."""
        values: dict[str, Any] = {
            "facts": {name: unicode_text(text) for name, text in self.facts.items()},
            "analyses": {name: section.numbers for name, section in self.sections.items()},
            "findings": {name: list(section.findings) for name, section in self.sections.items()},
            "left_out": dict(self.left_out),
        }
        return finite_json(values, indent=1) + "\n"

    def to_html(self) -> str:
        """A page whose pictures are inside it. It runs no code and asks for nothing from anywhere."""
        facts = "".join(
            f"<tr><td>{_text(name)}</td><td>{_text(text)}</td></tr>" for name, text in self.facts.items()
        )
        parts = [f"<h1>What training has changed</h1><table>{facts}</table>"]
        parts += [_section(section) for section in self.sections.values()]
        if self.left_out:
            lines = "".join(f"<li>{_text(name)}: {_text(why)}</li>" for name, why in self.left_out.items())
            parts.append(f"<h2>Left out</h2><ul>{lines}</ul>")
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>vimtune analyze</title><style>{STYLE}</style></head>\n<body>\n"
            + "\n".join(parts)
            + "\n</body></html>\n"
        )


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section) -> str:
    findings = "".join(f'<p class="finding">{_text(finding)}</p>' for finding in section.findings)
    body = [f"<h2>{_text(section.title)}</h2>", findings, f"<p>{_text(section.explanation)}</p>"]
    body += [_figure(picture) for picture in section.pictures]
    body += [_table(table) for table in section.tables]
    return "\n".join(body)


def _table(table: Table) -> str:
    heading = "".join(f"<th>{_text(title)}</th>" for title in table.heading)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows
    )
    caption = f"<caption>{_text(table.caption)}</caption>"
    return f'<div class="wide"><table>{caption}<tr>{heading}</tr>\n{rows}</table></div>'


def _figure(picture: Picture) -> str:
    encoded = base64.b64encode(to_png(picture.figure)).decode("ascii")
    source = f'<img alt="" src="data:image/png;base64,{encoded}">'
    return f"<figure>{source}<figcaption>{_text(picture.caption)}</figcaption></figure>"


def to_png(figure: Figure) -> bytes:
    """A picture as the contents of a PNG file."""
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    with picture_style():
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
