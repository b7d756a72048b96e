"""The report of an analysis: one HTML file that needs nothing else, and one JSON file with every number."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vimtune.output import save_as
from vimtune.pages.page import Page, findings_to_html
from vimtune.pages.section import Section
from vimtune.schema import finite_json
from vimtune.text import unicode_text


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
        """A page whose pictures are inside it; see `vimtune.pages`."""
        title, sections = "What training has changed", list(self.sections.values())
        return Page("vimtune analyze", title, self.facts.items(), sections, self.left_out).to_html()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a page (`.html`) or with all numbers (`.json`).

        Raises:
            OutputError: another ending, or a file that cannot be written.
        """
        save_as(path, FORMATS, self)

    def _repr_html_(self) -> str:
        """What a notebook shows: what was found, in sentences; `sections` show the rest."""
        return findings_to_html(self.sections.values())


FORMATS: dict[str, Callable[[AnalysisReport], str]] = {
    ".html": AnalysisReport.to_html,
    ".json": AnalysisReport.to_json,
}
"""How a report is written into a file whose name ends so."""
