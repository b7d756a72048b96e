"""A model that was scored: what is printed, and the files in which it is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from vimtune.console import neutral
from vimtune.output import save_as
from vimtune.pages.section import Section, Table
from vimtune.schema import finite_json
from vimtune.tasks import Details, Evaluation, Task
from vimtune.text import csv_text, quote


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        scores = ", ".join(f"{name}: {value}" for name, value in self._score_rows())
        return f"<{self.facts['model']} with {self.evaluation.count:,} {self.task.examples}: {scores}>"

    @property
    def scores(self) -> dict[str, Any]:
        """Every number of the whole split by name: of images "loss", "top1", "top5", "count" (of images),
        "macro_f1", "ece", "temperature" and others; percentages go from 0 to 100."""
        found = self.evaluation
        return {"loss": found.loss, **found.scores, "count": found.count, **self.details.scores()}

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything that was measured, as plain values: what was scored, `scores`, "classes",
        "most_confused", "reliability" and others, and "examples" where the task tells what it found for every
        single one."""
        examples = {"examples": list(self.examples)} if self.examples else {}
        return {**self.facts, **self.scores, **self.details.numbers(), **examples}

    @cached_property
    def sections(self) -> dict[str, Section]:
        """The parts of the page by name, each of which a notebook shows: of images "scores", "mistakes",
        "confusions", "classes" and "calibration"."""
        return self.details.sections()

    def rows(self) -> Iterator[tuple[str, str]]:
        """The final table: names and values."""
        yield from self._score_rows()
        yield from self.details.rows()
        yield self.task.examples, f"{self.evaluation.count:,}"
        for name, value in self.facts.items():
            if name not in ("task", "split"):
                yield name, "none" if value is None else str(value)

    def _score_rows(self) -> Iterator[tuple[str, str]]:
        """The scores of the task, then the loss."""
        found, split = self.evaluation, self.facts["split"]
        for score in self.task.scores:
            value = found.scores[score.name]
            if value is not None:
                yield f"{score.title} ({split})", score.show(value)
        yield f"loss ({split})", f"{found.loss:.4f}"

    def print(self, console: Console) -> None:
        """Print the final table."""
        table = TerminalTable(show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows():
            table.add_row(name, neutral(value, console))
        console.print(table)

    def to_json(self) -> str:
        """All numbers, those of classes and pairs included, and what was found for every example."""
        return finite_json(self.numbers, indent=1) + "\n"

    def to_csv(self) -> str:
        """One row: what was scored, and the numbers of the whole split."""
        row = {**self.facts, **self.scores}
        return _csv([row], list(row))

    def to_html(self) -> str:
        """A page with pictures; it needs nothing else."""
        from vimtune.pages.page import Page  # This comes late, because drawing takes long to import.

        title = f"{self.facts['model']} on {self.facts['split']}"
        return Page("vimtune evaluate", title, self.rows(), list(self.sections.values())).to_html()

    def mistakes(self) -> Sequence[dict[str, Any]]:
        """A mapping for each wrong answer, the worst one first: of images with "path", "true", "predicted",
        "probability", "true_probability", "loss" and "true_rank".

        Raises:
            ValueError: the answers of this task are not right or wrong.
        """
        found = self.details.mistakes()
        if found is None:
            raise ValueError(
                f"there are no mistakes to list: the answers to these {self.task.examples} are not right or "
                f"wrong (task {quote(self.task.name)})"
            )
        return found

    def mistakes_to_csv(self) -> str:
        """`mistakes` as a table with a row for each, below the names of the columns."""
        rows = self.mistakes()
        return _csv(rows, self.details.mistake_columns() or list(*rows[:1]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page with pictures (`.html`), all `numbers` (`.json`) or one row of scores (`.csv`).

        Raises:
            OutputError: another ending, or a file that cannot be written.
        """
        save_as(path, FORMATS, self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the final table."""
        return Table("", ["", ""], [list(row) for row in self.rows()])._repr_html_()


FORMATS: dict[str, Callable[[Scored], str]] = {
    ".csv": Scored.to_csv,
    ".html": Scored.to_html,
    ".json": Scored.to_json,
}
"""How a file is written whose name ends so."""


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table whose columns are the keys of all its rows."""
    return csv_text([columns, *(map(row.get, columns) for row in rows)])
