"""A model that was scored: what is printed, and the files in which it is kept."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from vimtune.console import neutral
from vimtune.schema import finite_json
from vimtune.tasks import Details, Evaluation, Task
from vimtune.text import csv_cell, printable, quote


@dataclass(frozen=True)
class Scored:
    """The evaluation of a model, and what it belongs to."""

    task: Task
    """What the model was asked."""
    facts: Mapping[str, Any]
    """What was scored: "task", "model", "adapter", "split", "data", and options that were given."""
    evaluation: Evaluation
    """The scores."""
    details: Details
    """What there is to say beyond them."""
    examples: Sequence[Mapping[str, Any]] = ()
    """What was found for every single example, where the task tells it."""

    @property
    def numbers(self) -> dict[str, Any]:
        """What was scored, and every number of the whole split by name."""
        found = self.evaluation
        scores = {"loss": found.loss, **found.scores, "count": found.count}
        return {**self.facts, **scores, **self.details.scores()}

    def rows(self) -> Iterator[tuple[str, str]]:
        """The final table: names and values."""
        found, split = self.evaluation, self.facts["split"]
        for score in self.task.scores:
            value = found.scores[score.name]
            if value is not None:
                yield f"{score.title} ({split})", score.show(value)
        yield f"loss ({split})", f"{found.loss:.4f}"
        yield from self.details.rows()
        yield self.task.examples, f"{found.count:,}"
        for name, value in self.facts.items():
            if name not in ("task", "split"):
                yield name, "none" if value is None else str(value)

    def print(self, console: Console) -> None:
        """Print the final table."""
        table = Table(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, neutral(value, console))
        console.print(table)

    def to_json(self) -> str:
        """All numbers, those of classes and pairs included, and what was found for every example."""
        examples = {"examples": list(self.examples)} if self.examples else {}
        return finite_json({**self.numbers, **self.details.numbers(), **examples}, indent=1) + "\n"

    def to_csv(self) -> str:
        """One row: what was scored, and the numbers of the whole split."""
        return _csv([self.numbers])

    def to_html(self) -> str:
        """A page with pictures; it needs nothing else."""
        from vimtune.pages.page import Page  # This comes late, because drawing takes long to import.

        title = f"{self.facts['model']} on {self.facts['split']}"
        return Page("vimtune evaluate", title, self.rows(), self.details.sections()).to_html()

    def mistakes_to_csv(self) -> str:
        """A row for each wrong answer, the worst one first.

        Raises:
            ValueError: the answers of this task are not right or wrong.
        """
        found = self.details.mistakes()
        if found is None:
            raise ValueError(
                f"--mistakes: the answers to these {self.task.examples} are not right or wrong (task "
                f"{quote(self.task.name)}); leave it out"
            )
        return _csv(found)


FORMATS: dict[str, Callable[[Scored], str]] = {
    ".csv": Scored.to_csv,
    ".html": Scored.to_html,
    ".json": Scored.to_json,
}
"""How a file is written whose name ends so."""


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table whose columns are the keys of its rows; nothing of it is a formula for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows[:1]:
        writer.writerow(row)
    for row in rows:
        writer.writerow([csv_cell(printable(v)) if isinstance(v, str) else v for v in row.values()])
    return text.getvalue()
