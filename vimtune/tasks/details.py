"""What an evaluation says beyond its scores: in the final table, in files, and on a page.

A task says here which metrics it has (`vimtune.metrics` has formulas). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vimtune.pages.section import Section


@dataclass(frozen=True)
class Details:
    """What an evaluation says beyond its scores. This one has notes alone; tasks derive classes with more."""

    notes: Sequence[str] = field(default=(), kw_only=True)
    """What a reader of the scores has to know, in whole sentences, such as which examples were left out."""

    def scores(self) -> dict[str, float | None]:
        """Further numbers of the whole split by name, such as "macro_f1"; None for one without a value."""
        return {}

    def rows(self) -> Iterator[tuple[str, str]]:
        """Lines of the final table: names and values."""
        return iter(())

    def numbers(self) -> dict[str, Any]:
        """The notes, and everything that was measured beside `scores`, as plain values for JSON."""
        return {"notes": list(self.notes)}

    def mistake_columns(self) -> Sequence[str]:
        """The keys of each of `mistakes`, which stand above a table of them also where there are none."""
        return ()

    def mistakes(self) -> Sequence[dict[str, Any]] | None:
        """A mapping for each wrong answer, all with the same keys, the worst one first; None for a task whose
        answers are not right or wrong."""
        return None

    def sections(self, drawn: Path | None = None) -> dict[str, Section]:
        """The page below its facts: sections by a short name, such as "mistakes", in the order of the page.

        Args:
            drawn: a run folder, some of whose pictures need not be drawn again.
        """
        del drawn
        return {}
